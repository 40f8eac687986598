"""The oracle is the measure of everything else, so it is itself held against hand-worked numbers and known limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chipmunk.config import Config
from chipmunk.rewrite.plan import BlockFacts
from chipmunk.verify import oracle as subject
from chipmunk.verify.oracle import Oracle
from tests.verify.tiny_flux import FACTS, FEATURES, TinyFlux, grid_ids, inputs


def config(attn: dict[str, Any] | None = None, mlp: dict[str, Any] | None = None, **others: Any) -> Config:
    """Small tiles, so that small models have several groups; first layers sparse too unless the test says otherwise."""
    settings = {
        "attn": {
            "is_enabled": True,
            "top_keys": 0.3,
            "full_step_every": 4,
            "counts_multiple_of": 2,
            "mbm": 8,
            "first_n_dense_layers": 0,
        }
        | (attn or {}),
        "mlp": {
            "is_enabled": True,
            "top_keys": 0.3,
            "random_keys": 0.05,
            "full_step_every": 4,
            "block_mask_cache": 1,
            "bm": 8,
            "mbm": 8,
            "counts_multiple_of": 4,
            "first_n_dense_layers": 0,
        }
        | (mlp or {}),
        "patchify": {"is_enabled": True, "chunk_size_1": 4, "chunk_size_2": 2},
        "min_steps": 1,
    }
    return Config.model_validate(settings | others)


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


class Identity(nn.Module):
    """A model whose output at a token is its own position, and which remembers the order in which it saw them."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList()

    def forward(self, img: Tensor, img_ids: Tensor) -> tuple[Tensor, str]:
        self.seen = img_ids[0, :, 1:].int().tolist()
        return img + img_ids, "more"


def test_tokens_are_ordered_by_patches_of_patches_and_restored() -> None:
    model, ids = Identity(), grid_ids(3, 5)
    settings = config(patchify={"is_enabled": True, "chunk_size_1": 4, "chunk_size_2": 2})
    with torch.no_grad(), Oracle(model, FACTS, settings):
        output, more = model(torch.zeros(1, 15, 3), ids)
    assert torch.equal(output, ids)
    assert more == "more"
    assert model.seen == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
        *([2, 0], [2, 1]),
        *([2, 2], [2, 3]),
        *([0, 4], [1, 4]),
        [2, 4],
    ]


@pytest.mark.parametrize("reference", [grid_ids(3, 5), grid_ids(2, 2) + torch.tensor([1.0, 0, 0])])
def test_reference_images_keep_their_place(reference: Tensor) -> None:
    model, ids = Identity(), torch.cat((grid_ids(3, 5), reference), dim=1)
    with torch.no_grad(), Oracle(model, FACTS, config()):
        output, _ = model(torch.zeros_like(ids), ids)
    assert torch.equal(output, ids)
    assert model.seen[:3] == [[0, 0], [0, 1], [1, 0]]
    assert model.seen[15:] == reference[0, :, 1:].int().tolist()


@pytest.mark.parametrize(
    "ids",
    [grid_ids(3, 5).flip(1), grid_ids(3, 5)[:, :-1], grid_ids(3, 5).roll(5, dims=1), torch.zeros(1, 15, 3)],
    ids=["backwards", "last token missing", "last row first", "all the same"],
)
def test_ids_that_are_no_grid_are_left_in_order(ids: Tensor) -> None:
    model = Identity()
    with torch.no_grad(), Oracle(model, FACTS, config()):
        model(torch.zeros_like(ids), ids)
    assert model.seen == ids[0, :, 1:].int().tolist()


def test_ids_that_differ_between_batch_elements_are_left_in_order() -> None:
    model, ids = Identity(), torch.cat((grid_ids(3, 5), grid_ids(5, 3)))
    with torch.no_grad(), Oracle(model, FACTS, config()):
        output, _ = model(torch.zeros_like(ids), ids)
    assert torch.equal(output, ids)
    assert model.seen == ids[0, :, 1:].int().tolist()


@pytest.mark.parametrize(
    ("other", "in_order"),
    [
        ({"residual": torch.zeros(1, 15, 9)}, True),
        ({"residuals": [torch.zeros(1, 2), torch.zeros(1, 4, 15, 9)]}, True),
        ({"residuals": {"first": torch.zeros(1, 15, 9)}}, True),
        ({"mask": torch.zeros(1, 15)}, True),
        ({"mask": torch.zeros(1, 1, 1, 18, dtype=torch.bool)}, True),
        ({"mask": torch.zeros(1, 1, 18, 18)}, True),
        ({"txt": torch.zeros(1, 18, 15)}, False),
        ({"txt": torch.zeros(1, 14, 99), "y": torch.zeros(1, 20), "time": torch.zeros(15), "flag": None}, False),
    ],
)
def test_other_inputs_by_token_leave_all_in_order(other: dict[str, Any], in_order: bool) -> None:
    class WithOthers(Identity):
        def forward(self, img: Tensor, img_ids: Tensor, **others: Any) -> tuple[Tensor, str]:
            return super().forward(img, img_ids)

    model, ids = WithOthers(), grid_ids(3, 5)
    with torch.no_grad(), Oracle(model, FACTS, config()):
        model(torch.zeros_like(ids), ids, **other)
    assert (model.seen == ids[0, :, 1:].int().tolist()) == in_order


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
    assert oracle.calls == {(0, "attention", "full"): 1}


# Schedules.


def kinds(settings: Config, steps: int, part: str, known: int | None = None) -> str:
    """The kinds of the steps as a string: F full, s sparse, d dense."""
    torch.manual_seed(0)
    model, letters = TinyFlux(1, 1), []
    with torch.no_grad(), Oracle(model, FACTS, settings, known) as oracle:
        for step in range(steps):
            before = oracle.calls.copy()
            model(**inputs(3, 4), t=1 - step / steps)
            (kind,) = {kind for layer, p, kind in oracle.calls - before if p == part and layer == 1}
            letters.append({"full": "F", "sparse": "s", "dense": "d"}[kind])
    return "".join(letters)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"full_step_every": 4}, "FFssFsssFsss"),
        ({"full_step_every": 2}, "FFFsFsFsFsFs"),
        ({"full_step_every": None}, "FFsFsssFssss"),
        ({"full_step_every": 1}, "FFFFFFFFFFFF"),
        ({"full_step_schedule": [0, 1, 6]}, "FFssssFsssss"),
        ({"full_step_schedule": [3]}, "FssFssssssss"),
        ({"full_step_schedule": []}, "Fsssssssssss"),
        ({"first_n_dense_layers": 2}, "dddddddddddd"),
        ({"first_n_dense_layers": 1}, "FFssFsssFsss"),
        ({"counts_multiple_of": 16}, "dddddddddddd"),
        ({"top_keys": 1.0}, "FFssFsssFsss"),
        ({"mbm": 15}, "dddddddddddd"),
        ({"mbm": 14}, "FFssFsssFsss"),
    ],
)
def test_kinds_of_attention_steps(settings: dict[str, Any], expected: str) -> None:
    assert kinds(config(settings), 12, "attention") == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"full_step_every": 4}, "FsssFsssFsss"),
        ({"full_step_every": None}, "FssFsssFssss"),
        ({"full_step_every": 1}, "FFFFFFFFFFFF"),
        ({"top_keys": 0.9}, "dddddddddddd"),
        ({"bm": 15, "mbm": 15}, "dddddddddddd"),
        ({"bm": 14, "mbm": 7}, "FsssFsssFsss"),
    ],
)
def test_kinds_of_mlp_steps(settings: dict[str, Any], expected: str) -> None:
    assert kinds(config(mlp=settings), 12, "mlp") == expected


def test_loops_known_to_be_short_stay_dense() -> None:
    settings = config(min_steps=8)
    assert kinds(settings, 5, "mlp", known=7) == "ddddd"
    assert kinds(settings, 5, "mlp", known=8) == "FsssF"
    assert kinds(settings, 5, "attention") == "FFssF"


# Numbers worked out from the rules by other means.


@pytest.mark.parametrize(
    ("top", "random", "multiple", "tokens", "expected"),
    [
        (0.165, 0.0, 112, 4352, (672, 0)),
        (0.165, 0.0, 112, 100, (100, 0)),
        (0.001, 0.0, 112, 4352, (112, 0)),
        (0.5, 0.0, 2, 5, (2, 0)),
        (0.6, 0.0, 2, 5, (4, 0)),
        (0.5, 0.0, 1, 5, (3, 0)),
        (0.5, 0.1, 1, 5, (3, 1)),
        (0.9, 0.9, 1, 10, (9, 1)),
        (1.0, 0.1, 112, 100, (100, 0)),
    ],
)
def test_count_of_keys(top: float, random: float, multiple: int, tokens: int, expected: tuple[int, int]) -> None:
    settings = config({"top_keys": top, "random_keys": random, "counts_multiple_of": multiple})
    assert Oracle(Identity(), FACTS, settings)._keys_kept(tokens) == expected


@pytest.mark.parametrize(
    ("top", "random", "multiple", "neurons", "expected"),
    [
        (0.3, 0.05, 256, 12288, (4352 - 614, 614)),
        (0.3, 0.0, 256, 12288, (3840, 0)),
        (0.0, 0.0, 256, 12288, (1, 0)),
        (0.0, 0.05, 256, 12288, (768 - 614, 614)),
        (0.0, 0.5, 1, 2, (1, 0)),
        (0.3, 0.05, 256, 100, (95, 5)),
        (1.0, 0.05, 256, 100, (100, 0)),
    ],
)
def test_count_of_neurons(top: float, random: float, multiple: int, neurons: int, expected: tuple[int, int]) -> None:
    settings = config(mlp={"top_keys": top, "random_keys": random, "counts_multiple_of": multiple})
    assert Oracle(Identity(), FACTS, settings)._neurons_kept(neurons) == expected


@given(*(st.integers(0, 2**20) for _ in range(4)))
def test_hash_in_wrapping_arithmetic(step: int, layer: int, group: int, index: int) -> None:
    """Against NumPy's unsigned 32-bit integers, which wrap by themselves."""

    def mix(h: np.ndarray) -> np.ndarray:
        h = h ^ (h >> np.uint32(16))
        h = h * np.uint32(0x7FEB352D)
        h = h ^ (h >> np.uint32(15))
        h = h * np.uint32(0x846CA68B)
        return h ^ (h >> np.uint32(16))

    h = mix(np.array([step], dtype=np.uint32))
    for number in (layer, group, index):
        h = mix(np.array([number], dtype=np.uint32) + np.uint32(0x9E3779B9) * h)
    assert subject._hash(step, layer, group, index) == int(h[0])


def test_choice_best_first_ties_to_the_lower_index_then_random_ascending() -> None:
    oracle = Oracle(Identity(), FACTS, config())
    assert oracle._choose([1.0, 3.0, 3.0, 2.0, 3.0], 2, 0, 0, 0, 0) == [1, 2]
    rest = sorted([0, 3, 4], key=lambda index: subject._hash(5, 6, 7, index))
    assert oracle._choose([1.0, 3.0, 3.0, 2.0, 3.0], 2, 2, 5, 6, 7) == sorted([1, 2, *rest[:2]])
    assert oracle.smallest_margin == 0


def test_mlp_by_hand() -> None:
    """One single block without attention to speak of: y = W2·relu-like(W1·x), three neurons, one kept, two groups."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(1, 3 + 3), nn.Linear(1 + 3, 1)
            self.linear1.weight.data = torch.tensor([0.0, 0, 0, 1, 2, 3])[:, None]
            self.linear1.bias.data = torch.tensor([0.0, 0, 0, 0, 0, -100])
            self.linear2.weight.data = torch.tensor([[7.0, 1, 10, 100]])
            self.linear2.bias.data = torch.tensor([0.5])

        def forward(self, x: Tensor) -> Tensor:
            mlp = self.linear1(x)[..., 3:]
            return self.linear2(torch.cat((x * 0, mlp.relu()), dim=-1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList([Block()])

        def forward(self, img: Tensor, img_ids: Tensor) -> Tensor:
            return self.single_blocks[0](img)

    mlp = {"top_keys": 0.01, "random_keys": 0.0, "counts_multiple_of": 1, "bm": 2, "mbm": 1, "full_step_every": 3}
    steps = [[1.0, 1, 5], [2.0, 0, 5], [2.0, 4, 40], [2.0, 4, 40]]
    with torch.no_grad(), Oracle(Model(), FACTS, config(mlp=mlp)) as oracle:
        outputs = [oracle.model(torch.tensor(x)[None, :, None], grid_ids(1, 3)).flatten().tolist() for x in steps]
    dense = [[21.5, 21.5, 105.5], [42.5, 0.5, 105.5], [42.5, 84.5, 2000 + 840.5], [42.5, 84.5, 2840.5]]
    assert outputs[0] == dense[0]
    # Step 1: in the first group neuron 2 has moved most (|3| + |3|) but is still at zero; nothing changes.
    assert outputs[1] == dense[0]
    # Step 2: neuron 2 was refreshed, so its score is |0| + |12| against |2| + |6| of neuron 1: again neuron 2.
    # The second group's neuron 2 has moved by 105 and is active now: 20 · 100.
    assert outputs[2] == [21.5, 21.5, 105.5 + 2000]
    assert outputs[3] == dense[3]


def test_gradients_are_refused(model: TinyFlux) -> None:
    with Oracle(model, FACTS, config()), pytest.raises(RuntimeError, match="no_grad"):
        model(**inputs(), t=0.5)


def test_a_model_without_ids_is_not_reordered(model: TinyFlux) -> None:
    facts = replace(FACTS, ids=None)
    arguments = inputs()
    with Oracle(model, facts, config(OFF, EVERYTHING)) as oracle:
        plain = denoise(model, arguments, 3)
        assert oracle._order is None
    with Oracle(model, FACTS, config(OFF, EVERYTHING)):
        assert error(denoise(model, arguments, 3), plain) < 1e-5
