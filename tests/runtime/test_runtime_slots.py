"""Several places that call the model in one step: each has caches and counts of its own."""

from __future__ import annotations

import pytest
import torch
from flux_model import Flux, denoise, error, inputs, same, small
from torch import Tensor
from two_blocks import STEPS, build, call, enabled

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_slots_have_caches_of_their_own() -> None:
    model, positive, negative = enabled(), inputs(seed=1), inputs(seed=2)
    got: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in chipmunk.steps(model, range(STEPS)):
        got[0].append(call(model, step, positive))
        got[1].append(call(chipmunk.slot(model, "negative"), step, negative))
    for given, predictions in zip((positive, negative), got, strict=True):
        alone = enabled()
        assert same(predictions, [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))])
    assert set(chipmunk.statistics(model).layers[2].attention) == {"main", "negative"}


def test_a_slot_that_starts_later_starts_with_a_full_step() -> None:
    model, given, got = enabled(), inputs(seed=2), []
    for step in chipmunk.steps(model, range(STEPS)):
        call(model, step, inputs(seed=1))
        if step >= 3:
            got.append(call(chipmunk.slot(model, "negative"), step, given))
    alone = enabled(min_steps=0)
    expected = [call(alone, step + 3, given) for step in chipmunk.steps(alone, range(STEPS - 3))]
    assert same(got, expected)


def test_a_second_untagged_call_runs_dense_and_touches_nothing() -> None:
    model, one, two = enabled(), inputs(seed=1), inputs(seed=2)
    got = []
    for step in chipmunk.steps(model, range(STEPS)):
        got.append(call(model, step, one))
        assert torch.equal(call(model, step, two), call(build(), step, two))
    alone = enabled()
    assert same(got, [call(alone, step, one) for step in chipmunk.steps(alone, range(STEPS))])
    (reason,) = chipmunk.statistics(model).dense_model_calls
    assert "second call" in reason
    assert "chipmunk.slot" in reason


def test_a_slot_that_changes_shape_starts_over() -> None:
    model, one, two = enabled(), inputs(batch=2), inputs(batch=1)
    got = [call(model, step, one if step < 5 else two) for step in chipmunk.steps(model, range(17))]
    alone = enabled()
    expected = [call(alone, step + 5, two) for step in chipmunk.steps(alone, range(12))]
    assert same(got[5:], expected)
    assert chipmunk.statistics(model).restarts == {"shape, dtype or device of the inputs changed": 1}


def test_a_skipped_layer_keeps_its_own_count() -> None:
    """A block that is not run in some steps cannot shift another one, nor itself."""

    class Skipping(Flux):
        skip = False

    model = build(kind=Skipping)
    chipmunk.enable(model, small())
    block = model.single_blocks[1]
    calls: list[str] = []
    original = block.forward

    def forward(x: Tensor, **rest: Tensor) -> Tensor:
        if model.skip:
            return x
        calls.append(block.__dict__["_chipmunk"].attention + "/" + block.__dict__["_chipmunk"].mlp)
        return original(x, **rest)

    block.forward = forward  # type: ignore[method-assign]

    def each(step: int) -> None:
        model.skip = step % 2 == 1

    denoise(model, 8, each=each, **inputs())
    assert calls == ["dense/full", "full/sparse", "sparse/sparse", "sparse/sparse"]
    layers = chipmunk.statistics(model).layers
    assert layers[3].attention["main"].total == 4
    assert layers[2].attention["main"].sparse == 6


def test_a_model_that_calls_itself() -> None:
    class Twice(Flux):
        @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
        def forward(self, img: Tensor, img_ids: Tensor, again: bool = True, **rest: Tensor) -> Tensor:
            inner = Flux.forward.__wrapped__  # type: ignore[attr-defined]
            other = self(img, img_ids, again=False, **rest) if again else 0
            return inner(self, img, img_ids, **rest) + other

    model = build(kind=Twice)
    given = inputs()
    chipmunk.enable(model, small(patchify__is_enabled=False))
    got = [call(model, step, given) for step in chipmunk.steps(model, range(STEPS))]
    alone = enabled(patchify__is_enabled=False)
    once = [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))]
    dense = build()
    assert error(got, [a + call(dense, step, given) for step, a in enumerate(once)]) < 1e-6
    assert chipmunk.statistics(model).dense_model_calls == {"the model calls itself": STEPS}
