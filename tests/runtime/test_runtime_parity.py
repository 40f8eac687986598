"""What is computed: nothing new while off, the dense result with everything kept, the stated rules otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_model import build, denoise, error, inputs, same, small
from torch import nn

import chipmunk
from chipmunk.config import Config
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.oracle import Oracle

EVERYTHING = small(mlp__top_keys=1.0, attn__top_keys=1.0)


class Unpatched:
    """The expressions that the inserted calls replaced."""

    @staticmethod
    def layer(block: nn.Module) -> dict[str, Any]:
        return {}

    @staticmethod
    def attention(layer: None, function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    @staticmethod
    def mlp(block: nn.Module, module: Any, x: Any) -> Any:
        return module(x)

    @staticmethod
    def split_linear(block: nn.Module, linear: Any, x: Any, sizes: list[int]) -> Any:
        return torch.split(linear(x), sizes, dim=-1)

    @staticmethod
    def cat_linear(block: nn.Module, linear: Any, attn: Any, act: Any, mlp: Any) -> Any:
        return linear(torch.cat((attn, act(mlp)), 2))

    @staticmethod
    def blocks(blocks: Any, model: nn.Module, image: Any = None) -> Any:
        return blocks

    @staticmethod
    def hidden(model: nn.Module, image: Any) -> Any:
        return image

    @staticmethod
    def steps(model: Any, iterable: Any) -> Any:
        return iterable


@pytest.mark.parametrize("batch", [1, 2])
def test_off_is_bit_identical_and_stores_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import flux_model

    model = build()
    before = [set(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        off = denoise(model, **inputs(batch=batch))
        assert [set(module.__dict__) for module in model.modules()] == before
        monkeypatch.setattr(flux_model, "chipmunk", Unpatched)
        assert same(off, denoise(model, **inputs(batch=batch)))


def test_off_trains_as_before() -> None:
    model = build()
    model(**inputs(), timesteps=torch.ones(1)).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("double_blocks.2.txt"))


def test_both_parts_disabled_is_bit_identical() -> None:
    model = build()
    with torch.no_grad():
        dense = denoise(model, **inputs())
        chipmunk.enable(model, small(mlp__is_enabled=False, attn__is_enabled=False))
        assert same(denoise(model, **inputs()), dense)
    assert chipmunk.statistics(model).dense_model_calls == {"neither attn nor mlp is enabled": 12}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("height", "width", "text"), [(9, 7, 5), (8, 8, 16), (4, 13, 1)])
def test_everything_kept_is_dense(height: int, width: int, text: int, batch: int) -> None:
    model, given = build(), inputs(height, width, text, batch)
    with torch.no_grad():
        dense = denoise(model, **given)
        chipmunk.enable(model, EVERYTHING)
        assert error(denoise(model, **given), dense) < 1e-5
    layers = chipmunk.statistics(model).layers
    assert all(layer.attention["main"].sparse == 9 and layer.mlp["main"].sparse == 10 for layer in layers[1:])


def test_everything_kept_is_dense_with_parts_of_groups_and_random_columns() -> None:
    model = build()
    config = small(mlp__top_keys=1.0, mlp__mbm=4, mlp__random_keys=0.2, attn__top_keys=1.0, attn__random_keys=0.2)
    with torch.no_grad():
        dense = denoise(model, **inputs())
        chipmunk.enable(model, config)
        assert error(denoise(model, **inputs()), dense) < 1e-5


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_one_part_alone(part: str) -> None:
    model = build()
    other = "mlp" if part == "attn" else "attn"
    with torch.no_grad():
        dense = denoise(model, **inputs())
        chipmunk.enable(model, {**small(**{f"{other}__is_enabled": False})})
        sparse = denoise(model, **inputs())
    assert 1e-4 < error(sparse, dense) < 0.2
    layer = chipmunk.statistics(model).layers[2]
    counts = {"attn": layer.attention["main"], "mlp": layer.mlp["main"]}
    assert counts[part].sparse > 0
    assert counts[other].dense == {"not enabled": 12}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_follows_float32(dtype: torch.dtype, allowed: float) -> None:
    model, given = build(), inputs()
    half = {name: value.to(dtype) if name in ("img", "txt") else value for name, value in given.items()}
    with torch.no_grad():
        chipmunk.enable(model, small(mlp__random_keys=0.0))
        expected = denoise(model, **given)
        got = denoise(model.to(dtype), **half)
    assert all(prediction.dtype == dtype for prediction in got)
    assert error([prediction.float() for prediction in got], expected) < allowed
    layer = chipmunk.statistics(model).layers[2]
    assert layer.attention["main"].sparse == 18
    assert layer.mlp["main"].sparse == 20


FACTS = ModelFacts(
    file="flux_model.py",
    name="Flux",
    double="double_blocks",
    single="single_blocks",
    image="img",
    ids="img_ids",
    double_block=BlockFacts("flux_model.py", "DoubleBlock", True, mlp="img_mlp"),
    single_block=BlockFacts("flux_model.py", "SingleBlock", True, linear_in="linear1", linear_out="linear2"),
)


@pytest.mark.parametrize(
    ("config", "batch", "seed"),
    [
        (small(), 1, 1),
        (small(mlp__mbm=8, attn__random_keys=0.1, mlp__block_mask_cache=3), 2, 2),
        (small(attn__recompute_mask=False, attn__full_step_schedule=[0, 1, 5, 6, 11], mlp__full_step_every=4), 1, 1),
        (small(mlp__top_keys=0.0, mlp__random_keys=0.0, attn__top_keys=0.0), 2, 1),
        (small(patchify__is_enabled=False, attn__full_step_schedule=[3], mlp__bm=32, mlp__mbm=8), 1, 1),
    ],
)
def test_sparse_run_equals_the_plain_statement_of_the_rules(config: dict[str, Any], batch: int, seed: int) -> None:
    model, given = build(), inputs(batch=batch, seed=seed)
    with torch.no_grad():
        oracle = Oracle(model, FACTS, Config.model_validate(config), steps=13)
        with oracle:
            oracle.auto_step()
            expected = denoise(model, 13, **given)
        chipmunk.enable(model, config)
        got = denoise(model, 13, **given)
        chipmunk.disable(model)
        dense = denoise(model, 13, **given)
    assert oracle.smallest_margin > 2e-7, "a tie: choose another seed"
    assert error(got, expected) < 1e-5
    assert error(got, dense) > 1e-3, "nothing was sparse"
