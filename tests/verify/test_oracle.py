"""The oracle is the measure of everything else, so it is itself held against known limits, and leaves no trace."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chipmunk.rewrite.plan import BlockFacts
from chipmunk.verify import oracle as package
from chipmunk.verify.oracle import Oracle
from tests.verify.tiny_flux import FACTS, FEATURES, TinyFlux, config, grid_ids, inputs

EVERYTHING = {"top_keys": 1.0}
OFF = {"is_enabled": False}


@pytest.fixture(scope="module")
def model() -> TinyFlux:
    torch.manual_seed(0)
    return TinyFlux()


def denoise(model: nn.Module, arguments: dict[str, Tensor], steps: int, between: Any = None) -> list[Tensor]:
    """The outputs of each step of a plain Euler loop."""
    outputs, img = [], arguments["img"]
    with torch.no_grad():
        for step in range(steps):
            if between is not None:
                between(step)
            outputs.append(model(**(arguments | {"img": img}), t=1 - step / steps))
            img = img - outputs[-1] / steps
    return outputs


def error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    return float(max((a - b).norm() / b.norm() for a, b in zip(outputs, expected, strict=True)))


# Limits in which the sparse result is known.


@given(
    height=st.integers(2, 9),
    width=st.integers(1, 9),
    text=st.integers(1, 5),
    batch=st.integers(1, 2),
    chunks=st.sampled_from([(8, 4), (4, 2), (3, 2), (1, 1)]),
)
@settings(max_examples=12, deadline=None)
def test_everything_kept_equals_dense(height: int, width: int, text: int, batch: int, chunks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = TinyFlux(1, 1)
    arguments = inputs(height, width, text, batch)
    dense = denoise(model, arguments, 4)
    patchify = {"is_enabled": True, "chunk_size_1": chunks[0], "chunk_size_2": chunks[1]}
    with Oracle(model, FACTS, config(EVERYTHING, EVERYTHING, patchify=patchify)) as oracle:
        oracle.auto_step()
        sparse = denoise(model, arguments, 4)
    assert error(sparse, dense) < 1e-5


def test_a_step_that_changes_nothing_gives_the_dense_result(model: TinyFlux) -> None:
    """However few keys and neurons are kept: the caches make up for all others exactly."""
    arguments = inputs()
    with torch.no_grad():
        dense = model(**arguments, t=0.5)
        with Oracle(model, FACTS, config({"top_keys": 0.05}, {"top_keys": 0.1})) as oracle:
            oracle.auto_step()
            for _ in range(4):
                torch.testing.assert_close(model(**arguments, t=0.5), dense, rtol=1e-5, atol=1e-5)
        assert oracle.calls[0, "attention", "sparse"] == 2
        assert oracle.calls[5, "mlp", "sparse"] == 3


def test_both_parts_disabled_is_the_same_to_the_bit(model: TinyFlux) -> None:
    arguments = inputs()
    dense = denoise(model, arguments, 3)
    with Oracle(model, FACTS, config(OFF, OFF)) as oracle:
        oracle.auto_step()
        assert all(torch.equal(a, b) for a, b in zip(denoise(model, arguments, 3), dense, strict=True))


def test_sparse_steps_differ_from_dense_ones(model: TinyFlux) -> None:
    """The near miss of the tests above: an oracle that left everything dense would pass them."""
    arguments = inputs()
    dense = denoise(model, arguments, 4)
    for only in (config(mlp=OFF), config(attn=OFF)):
        with Oracle(model, FACTS, only) as oracle:
            oracle.auto_step()
            assert error(denoise(model, arguments, 4), dense) > 1e-4


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_keeping_more_is_closer_to_dense(model: TinyFlux, part: str) -> None:
    arguments = inputs(8, 8, batch=2)
    dense = denoise(model, arguments, 6)
    errors = []
    for fraction in (0.1, 0.4, 0.8, 1.0):
        kept = {part: {"top_keys": fraction, "random_keys": 0.0}}
        other = {"mlp" if part == "attn" else "attn": OFF}
        with Oracle(model, FACTS, config(**kept, **other)) as oracle:
            oracle.auto_step()
            errors.append(error(denoise(model, arguments, 6), dense))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


def test_batch_elements_do_not_see_one_another(model: TinyFlux) -> None:
    both = inputs(batch=2)
    with Oracle(model, FACTS, config()) as oracle:
        together = denoise(model, both, 6)
        for b in range(2):
            oracle.end_generation()
            alone = denoise(model, {name: x[b : b + 1] for name, x in both.items()}, 6)
            assert error(alone, [x[b : b + 1] for x in together]) < 1e-5


# Hooks: left off afterwards, order undone, generations and slots apart.


def test_the_model_is_as_before_afterwards(model: TinyFlux) -> None:
    arguments = inputs()
    dense = denoise(model, arguments, 2)
    with pytest.raises(ZeroDivisionError), Oracle(model, FACTS, config()):
        denoise(model, arguments, 2, between=lambda step: 1 / (1 - step))
    assert all(torch.equal(a, b) for a, b in zip(denoise(model, arguments, 2), dense, strict=True))


def test_a_second_generation_starts_clean(model: TinyFlux) -> None:
    first, second = inputs(), inputs(4, 6, seed=1)
    with Oracle(model, FACTS, config()) as oracle:
        alone = denoise(model, second, 5)
        oracle.end_generation()
        denoise(model, first, 3)
        oracle.end_generation()
        assert all(torch.equal(a, b) for a, b in zip(denoise(model, second, 5), alone, strict=True))


def test_slots_keep_caches_and_counts_apart(model: TinyFlux) -> None:
    """Two calls a step, the second one from step 2 on: each as if it were alone."""
    first, second = inputs(seed=1), inputs(seed=2)

    def run(model: TinyFlux, arguments: dict[str, Tensor], step: int) -> Tensor:
        return model(**arguments, t=1 - step / 8)

    with torch.no_grad(), Oracle(model, FACTS, config()) as oracle:
        alone = []
        for arguments, start in ((first, 0), (second, 2)):
            oracle.end_generation()
            alone.append([run(model, arguments, step) for step in range(start, 8)])
        told: list[list[Tensor]] = [[], []]
        oracle.end_generation()
        for step in range(8):
            oracle.begin_step(step)
            oracle.slot("pred")
            told[0].append(run(model, first, step))
            if step >= 2:
                oracle.slot("neg_pred")
                told[1].append(run(model, second, step))
        followed: list[list[Tensor]] = [[], []]
        oracle.end_generation()
        oracle.follow(
            [(step, name) for step in range(8) for name in ("pred", "neg_pred") if name == "pred" or step > 1]
        )
        for step in range(8):
            followed[0].append(run(model, first, step))
            if step >= 2:
                followed[1].append(run(model, second, step))
    for outputs in (told, followed):
        for a, b in zip(outputs, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class LoraLinear(nn.Linear):
    """A subclass with its own forward, as the official Control LoRA has."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


def test_a_subclass_of_linear_stays_dense(model: TinyFlux) -> None:
    torch.manual_seed(0)
    model = TinyFlux(1, 1)
    model.double_blocks[0].img_mlp[0] = LoraLinear(16, FEATURES)
    model.single_blocks[0].linear1 = LoraLinear(16, 48 + FEATURES)
    with Oracle(model, FACTS, config()) as oracle:
        denoise(model, inputs(), 4)
    assert {part for _, part, _ in oracle.calls} == {"attention"}


class AroundLinear(nn.Module):
    """A LoRA layer that holds the linear layer, and matrices of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Parameter(torch.ones(2, linear.in_features)), nn.Parameter(torch.ones(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("place", [0, 2])
def test_a_layer_around_a_linear_stays_dense(place: int) -> None:
    torch.manual_seed(0)
    model = TinyFlux(1, 1)
    mlp = model.double_blocks[0].img_mlp
    mlp[place] = AroundLinear(mlp[place])
    model.single_blocks[0].linear2 = AroundLinear(model.single_blocks[0].linear2)
    with Oracle(model, FACTS, config()) as oracle:
        denoise(model, inputs(), 4)
    assert {part for _, part, _ in oracle.calls} == {"attention"}


def test_a_modulation_that_is_a_sequence_is_no_stream() -> None:
    class Pair(nn.Module):
        def forward(self, img: Tensor, txt: Tensor, modulation: Tensor) -> Tensor:
            q = torch.cat((txt, img), dim=1)[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, txt.shape[1] :] + modulation.mean(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_blocks, self.single_blocks = nn.ModuleList([Pair()]), nn.ModuleList()

        def forward(self, img: Tensor, img_ids: Tensor) -> Tensor:
            return self.double_blocks[0](img, img[:, :7], modulation=img[:, :6] * 2)

    facts = replace(FACTS, double_block=BlockFacts("", "Pair", attention=True))
    with torch.no_grad(), Oracle(Model(), facts, config()) as oracle:
        oracle.model(torch.randn(1, 20, 8), grid_ids(4, 5))
    assert oracle.calls == {(0, "attention", "full"): 1}


def test_masked_and_cross_attention_are_left_alone() -> None:
    without_mlp = replace(FACTS, single_block=BlockFacts("", "Block", attention=True))

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            attend = nn.functional.scaled_dot_product_attention
            q = x[:, None]
            attend(q, q[:, :, :4], q[:, :, :4])
            attend(q, q, q, attn_mask=torch.ones(20, 20, dtype=torch.bool))
            attend(q, q, q, is_causal=True)
            attend(q[:, :, :5], q[:, :, :5], q[:, :, :5])
            return attend(query=q, key=q, value=q)[:, 0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList([Block()])

        def forward(self, img: Tensor, img_ids: Tensor) -> Tensor:
            x = nn.functional.scaled_dot_product_attention(img, img, img)
            return self.single_blocks[0](x)

    with torch.no_grad(), Oracle(Model(), without_mlp, config()) as oracle:
        oracle.model(torch.randn(1, 20, 8), grid_ids(4, 5))
    assert oracle.calls == {(0, "attention", "masked"): 1, (0, "attention", "full"): 1}


def test_gradients_are_refused(model: TinyFlux) -> None:
    with Oracle(model, FACTS, config()), pytest.raises(RuntimeError, match="no_grad"):
        model(**inputs(), t=0.5)


def test_it_shares_no_code_with_what_it_checks() -> None:
    files = [file for folder in package.__path__ for file in Path(folder).glob("*.py")]
    imported = {
        node.module
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("chipmunk")
    }
    outside = {module for module in imported if not module.startswith("chipmunk.verify.oracle.")}
    assert outside == {"chipmunk.config", "chipmunk.rewrite.plan"}
