"""A model that writes to its arguments: the caller's tensors hold the same as without Chipmunk, in their own order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_model import Flux, build, inputs, small
from torch import Tensor

import chipmunk

EVERYTHING = small(mlp__top_keys=1.0, attn__top_keys=1.0)
FORWARD: Any = Flux.forward.__wrapped__  # type: ignore[attr-defined]


class Writing(Flux):
    """Adds to the image and to the ids that it is given, token by token."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, **rest: Any) -> Any:
        img += 0.1 * img.flip(-1)
        img_ids.mul_(0.9)
        return FORWARD(self, img, img_ids, **rest)


class WritingToAView(Flux):
    """The same, to a view of the image; its output is no sequence of tokens, so calls are made again in order."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, **rest: Any) -> Any:
        img.view(-1, img.shape[-1])[:, 1:].clamp_(-1, 1).mul_(0.9)
        return FORWARD(self, img, img_ids, **rest).mean(1, keepdim=True)


def drawn(model: Any, given: dict[str, Tensor], mode: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the model returns, step by step, and what has become of its arguments."""
    with mode():
        given = {name: value.clone() for name, value in given.items()}
        outputs = [
            model(**given, timesteps=torch.full((1,), 1 - step / 20)).clone()
            for step in chipmunk.steps(model, range(9))
        ]
    return outputs, given


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [Writing, WritingToAView])
def test_what_the_model_writes_reaches_the_caller(kind: type[Flux], mode: Any) -> None:
    model = build(kind=kind)
    outputs, arguments = drawn(model, inputs(), mode)
    chipmunk.enable(model, EVERYTHING)
    got, after = drawn(model, inputs(), mode)
    orders = chipmunk.statistics(model).token_order
    assert any(order.startswith("reordered") for order in orders), orders
    assert max(error(a, b) for a, b in zip(got, outputs, strict=True)) < 1e-5
    for name, value in arguments.items():
        assert error(after[name], value) < 1e-5 if value.any() else not after[name].any(), name


def test_arguments_that_are_only_read_are_left_alone() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, EVERYTHING)
    with torch.no_grad():
        before = {name: (value._version, value.clone()) for name, value in given.items()}
        for step in chipmunk.steps(model, range(9)):
            model(**given, timesteps=torch.full((1,), 1 - step / 20))
    for name, (version, value) in before.items():
        assert given[name]._version == version, name
        assert torch.equal(given[name], value), name
