"""Section 10 of the algorithm's description: defects of the original implementation, none of which may come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_model import build, denoise, error, inputs, same, small

import chipmunk
from chipmunk.config import Config, ConfigError, parse

pytestmark = pytest.mark.usefixtures("no_gradients")


def enabled(**changes: Any) -> Any:
    model = build()
    chipmunk.enable(model, small(**changes))
    return model


def test_the_step_counter_does_not_shift_later_images() -> None:
    """Upstream's counter resets one submodule early: every later image starts shifted."""
    model = enabled()
    for image in range(1, 4):
        denoise(model, 12, **inputs(seed=image))
        for layer in chipmunk.statistics(model).layers[1:]:
            assert (layer.attention["main"].full, layer.attention["main"].sparse) == (3 * image, 9 * image)
            assert (layer.mlp["main"].full, layer.mlp["main"].sparse) == (2 * image, 10 * image)


@pytest.mark.parametrize("steps", [8, 28])
def test_any_number_of_steps_and_no_cache_of_the_image_before(steps: int) -> None:
    """Upstream counts to 50: with 28 steps the second image reuses the first one's caches."""
    model = enabled()
    denoise(model, steps, **inputs(seed=1))
    assert same(denoise(model, steps, **inputs(seed=2)), denoise(enabled(), steps, **inputs(seed=2)))


def test_a_change_of_resolution_gets_its_own_positions() -> None:
    """Upstream caches the permuted positional table for ever. With everything kept, a wrong table is seen at once."""
    model = enabled(mlp__top_keys=1.0, attn__top_keys=1.0)
    for height, width in ((9, 7), (7, 9), (8, 12), (9, 7)):
        given = inputs(height, width)
        assert error(denoise(model, 9, **given), denoise(build(), 9, **given)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(5, 11), (17, 3)])
def test_any_batch_and_any_grid(batch: int, height: int, width: int) -> None:
    """Upstream: batch 1, and widths and heights that are multiples of 128 pixels (8 tokens)."""
    given = inputs(height, width, batch=batch)
    model = enabled(mlp__top_keys=1.0, attn__top_keys=1.0)
    assert error(denoise(model, 9, **given), denoise(build(), 9, **given)) < 1e-5


def test_batch_elements_do_not_see_each_other() -> None:
    """Each element of a batch gets what it gets alone."""
    both, model = inputs(batch=2, seed=6), enabled()
    together = denoise(model, 12, **both)
    for element in range(2):
        alone = denoise(model, 12, **{name: value[element : element + 1] for name, value in both.items()})
        assert error([prediction[element : element + 1] for prediction in together], alone) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(dtype: torch.dtype) -> None:
    """Upstream: bfloat16 on compute capability 9.0 only."""
    model = enabled().to(dtype)
    given = {name: value.to(dtype) if name in ("img", "txt") else value for name, value in inputs().items()}
    assert all(prediction.isfinite().all() for prediction in denoise(model, 12, **given))
    layer = chipmunk.statistics(model).layers[2]
    assert (layer.attention["main"].sparse, layer.mlp["main"].sparse) == (9, 10)


def test_what_an_mlp_returns_is_not_the_cache() -> None:
    """Upstream's MLP returns its cache: an in-place operation of the caller corrupts it."""
    model = enabled(attn__is_enabled=False)
    expected = denoise(model, 12, **inputs())
    original = chipmunk.mlp

    def spoiling(block: Any, module: Any, x: Any) -> Any:
        out = original(block, module, x)
        kept = out.clone()
        out.zero_()
        return kept

    import flux_model

    class Spoiling:
        mlp = staticmethod(spoiling)

        def __getattr__(self, name: str) -> Any:
            return getattr(chipmunk, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_model, "chipmunk", Spoiling())
        assert same(denoise(model, 12, **inputs()), expected)


@pytest.mark.parametrize("top", [0.0, 0.001, 0.999, 1.0])
@pytest.mark.parametrize("random", [0.0, 1.0])
def test_tiny_and_whole_fractions_work(top: float, random: float) -> None:
    """Upstream fails for a count of 0, and for one rounded past N."""
    changes = {
        f"{part}__{key}": value
        for part in ("mlp", "attn")
        for key, value in (("top_keys", top), ("random_keys", random))
    }
    model, dense = enabled(**changes), denoise(build(), 9, **inputs())
    assert error(denoise(model, 9, **inputs()), dense) < (1e-5 if top == 1.0 else 1.0)


def test_fp8_is_refused_instead_of_failing_later() -> None:
    """Upstream's FP8 sparse MLP cannot run at all."""
    with pytest.raises(ConfigError, match="is_fp8"):
        parse("mlp:\n  is_fp8: true\n")
    assert not Config().mlp.is_fp8


def test_extra_calls_skipped_blocks_and_second_models_do_not_desynchronise() -> None:
    """Upstream has one global counter."""
    model, other = enabled(), build(seed=9)
    chipmunk.enable(other, small())
    alone = enabled()
    expected = [alone(**inputs(), timesteps=torch.full((1,), 1 - s / 12)) for s in chipmunk.steps(alone, range(12))]
    got = []
    for step in chipmunk.steps(model, chipmunk.steps(other, range(12))):
        got.append(model(**inputs(), timesteps=torch.full((1,), 1 - step / 12)))
        if step % 3:
            other(**inputs(seed=3), timesteps=torch.ones(1))
        if step >= 5:  # CFG from step 5 on
            chipmunk.slot(model, "negative")(**inputs(seed=2), timesteps=torch.ones(1))
    assert same(got, expected)


def test_weights_are_not_captured_at_load_time() -> None:
    """Upstream ignores LoRA, quantisation and `.to()` after loading."""
    model = enabled(mlp__top_keys=1.0, attn__top_keys=1.0)
    denoise(model, 9, **inputs())
    changed = build()
    for target in (model, changed):
        for block in target.single_blocks:
            block.linear1.weight.add_(0.05 * torch.ones_like(block.linear1.weight))
    assert error(denoise(model, 9, **inputs()), denoise(changed, 9, **inputs())) < 1e-5
