"""Weights that change while a sampling loop runs: what was cached under the old ones is not used with the new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flux_model import Flux, build, denoise, error, inputs, same, small, sparse_calls
from torch import Tensor, nn

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")

EVERYTHING = small(attn__top_keys=1.0, mlp__top_keys=1.0)


def _load(model: Flux) -> None:
    model.load_state_dict(build(seed=8).state_dict())


def _assign(model: Flux) -> None:
    model.load_state_dict(build(seed=8).state_dict(), assign=True)


def _merge(model: Flux) -> None:
    for linear in (model.double_blocks[1].img_mlp[0], model.single_blocks[1].linear2):
        linear.weight.add_(torch.full_like(linear.weight, 0.05))


def _replace_linear(model: Flux) -> None:
    old = model.single_blocks[1].linear1
    new = nn.Linear(old.in_features, old.out_features)
    new.weight.copy_(old.weight * 0.5)
    new.bias.copy_(old.bias)
    model.single_blocks[1].linear1 = new


def _replace_mlp(model: Flux) -> None:
    model.double_blocks[2].img_mlp = copy.deepcopy(build(seed=8).double_blocks[2].img_mlp)


def _replace_block(model: Flux) -> None:
    model.double_blocks[2] = copy.deepcopy(build(seed=8).double_blocks[2])


CHANGES = (_load, _assign, _merge, _replace_linear, _replace_mlp, _replace_block)


def _at(step: int, change: Callable[[Flux], None], model: Flux) -> Callable[[int], None]:
    return lambda now: change(model) if now == step else None


@pytest.mark.parametrize("change", CHANGES)
def test_everything_kept_is_dense_with_the_new_weights(change: Callable[[Flux], None]) -> None:
    model, other, given = build(), build(), inputs()
    expected = denoise(other, 10, _at(5, change, other), **given)
    chipmunk.enable(model, EVERYTHING)
    got = denoise(model, 10, _at(5, change, model), **given)
    assert error(got, expected) < 1e-5
    assert sparse_calls(model) > 20


@pytest.mark.parametrize("change", CHANGES)
def test_the_slot_starts_over_once(change: Callable[[Flux], None]) -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    denoise(model, 10, _at(5, change, model), **given)
    assert chipmunk.statistics(model).restarts == {"weights changed": 1}
    assert sparse_calls(model) == 5 * 8  # five layers, ten steps of which two begin


@pytest.mark.parametrize("change", CHANGES)
def test_steps_are_not_skipped_on_what_the_old_weights_left(change: Callable[[Flux], None]) -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small(step_caching__is_enabled=True, step_caching__threshold=1e9))
    img = given["img"]
    times = torch.linspace(1, 0, 12)
    outs: list[Tensor] = []
    for step, time in enumerate(chipmunk.steps(model, times.tolist())):
        if step == 6:
            change(model)
        outs.append(model(**{**given, "img": img}, timesteps=torch.full((1,), time)))
    dense = build()
    change(dense)
    expected = dense(**given, timesteps=torch.full((1,), times[6].item()))
    assert torch.allclose(outs[6], expected, atol=1e-5)


def test_an_image_after_such_a_one_is_that_of_a_fresh_model() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    denoise(model, 10, _at(4, _load, model), **given)
    fresh = build(seed=8)
    chipmunk.enable(fresh, small())
    assert same(denoise(model, 10, **given), denoise(fresh, 10, **given))


def test_two_images_in_turns_both_notice() -> None:
    """Weights change while another loop on the same model is at work: each begins anew, once."""
    model, given = build(), inputs()
    chipmunk.enable(model, EVERYTHING)

    def image(seed: int) -> Iterator[Tensor]:
        own = inputs(seed=seed)
        for time in chipmunk.steps(model, torch.linspace(1, 0, 9).tolist()):
            yield model(**own, timesteps=torch.full((1,), time))

    plain = build()
    for step, (first, second) in enumerate(zip(image(1), image(2), strict=True)):
        if step > 4:
            time = torch.linspace(1, 0, 9)[step : step + 1]
            assert torch.allclose(first, plain(**given, timesteps=time), atol=1e-4)
            assert torch.allclose(second, plain(**inputs(seed=2), timesteps=time), atol=1e-4)
        if step == 4:
            _load(model)
            _load(plain)
    assert chipmunk.statistics(model).restarts == {"weights changed": 2}


# What is no change of the weights.


def _moved(model: Flux) -> None:
    """As offloading does: the data is elsewhere, and the same."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _saved(model: Flux) -> None:
    copy.deepcopy(model)
    model.state_dict()


def _frozen(model: Flux) -> None:
    model.requires_grad_(False).eval()


@pytest.mark.parametrize("nothing", [_moved, _saved, _frozen])
def test_the_same_weights_go_on(nothing: Callable[[Flux], Any]) -> None:
    model, other, given = build(), build(), inputs()
    for each in (model, other):
        chipmunk.enable(each, small())
    assert same(denoise(model, 10, lambda _: nothing(model), **given), denoise(other, 10, **given))
    assert not chipmunk.statistics(model).restarts


@pytest.mark.parametrize("how", ["written to", "exchanged"])
def test_weights_that_are_brought_during_the_call(how: str) -> None:
    """Streaming copies a block's weights into place before it runs; FSDP exchanges its parameters."""
    model, other, given = build(), build(), inputs()
    for each in (model, other):
        chipmunk.enable(each, small())
    for block in (*model.double_blocks, *model.single_blocks):
        content = {name: value.clone() for name, value in block.state_dict().items()}

        def bring(module: nn.Module, *_: Any, content: dict[str, Tensor] = content) -> None:
            module.load_state_dict(content, assign=how == "exchanged")

        bring.__module__ = "torch.hooks"  # which read no tokens: they may be moved
        block.register_forward_pre_hook(bring)
    assert same(denoise(model, 10, **given), denoise(other, 10, **given))
    assert not chipmunk.statistics(model).restarts


def test_weights_made_in_inference_mode() -> None:
    """They have no version, and are known by what they are."""
    with torch.inference_mode():
        model, given = build(), inputs()
        chipmunk.enable(model, EVERYTHING)
        other = build()
        got = denoise(model, 10, _at(5, _assign, model), **given)
        assert error(got, denoise(other, 10, _at(5, _assign, other), **given)) < 1e-5
    assert chipmunk.statistics(model).restarts == {"weights changed": 1}
