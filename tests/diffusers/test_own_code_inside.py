"""Code of the user's own inside a transformer of diffusers: it runs as ever, and finds tokens where they lay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import diffusers
import torch
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from tiny_pipelines import KEPT, draw, error, flux1, pipeline, random, reasons
from torch import Tensor, nn

import chipmunk

Prepare = Callable[[Any, list[Tensor], pytest.MonkeyPatch], None]


class Store:
    """A processor that keeps what it was given, and computes what diffusers' own does."""

    _attention_backend = _parallel_config = None

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen, self.inner = seen, FluxAttnProcessor()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        self.seen.append(hidden_states.mean(dim=-1))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def a_processor_in_each_block(pipe: Any, seen: list[Tensor], _: pytest.MonkeyPatch) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(Store(seen))


def the_call_of_the_processors_class(pipe: Any, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = FluxAttnProcessor.__call__

    def call(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden_states.mean(dim=-1))
        return original(self, attn, hidden_states, *args, **kwargs)

    monkeypatch.setattr(FluxAttnProcessor, "__call__", call)


def a_hook_of_a_block(pipe: Any, seen: list[Tensor], _: pytest.MonkeyPatch) -> None:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        seen.append(result[1].mean(dim=-1))

    pipe.transformer.transformer_blocks[1].register_forward_hook(hook)


def a_hook_of_a_layer_behind_the_blocks(pipe: Any, seen: list[Tensor], _: pytest.MonkeyPatch) -> None:
    pipe.transformer.proj_out.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean(dim=-1)))


def the_forward_of_a_block(pipe: Any, seen: list[Tensor], _: pytest.MonkeyPatch) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        text, image = type(self).forward(self, *args, **kwargs)
        seen.append(image.mean(dim=-1))
        return text, image

    block = pipe.transformer.transformer_blocks[1]
    block.forward = MethodType(forward, block)


def the_forward_of_a_blocks_class(pipe: Any, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformer_flux.FluxTransformerBlock.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        text, image = original(self, *args, **kwargs)
        seen.append(image.mean(dim=-1))
        return text, image

    monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", forward)


def the_forward_of_the_models_class(pipe: Any, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = diffusers.FluxTransformer2DModel.forward

    def forward(self: Any, hidden_states: Tensor, timestep: Any = None, img_ids: Any = None, **kwargs: Any) -> Any:
        seen.append(hidden_states.mean(dim=-1))
        return original(self, hidden_states, timestep=timestep, img_ids=img_ids, **kwargs)

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", forward)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (a_processor_in_each_block, "the attention processor Store is not diffusers' own"),
        (the_call_of_the_processors_class, "the attention processor FluxAttnProcessor is not diffusers' own"),
        (a_hook_of_a_block, "a hook of transformer_blocks.1 may read its tokens"),
        (a_hook_of_a_layer_behind_the_blocks, "a hook of proj_out may read its tokens"),
        (the_forward_of_a_block, "the forward of FluxTransformerBlock is not diffusers' own"),
        (the_forward_of_a_blocks_class, "the forward of FluxTransformerBlock is not diffusers' own"),
        (the_forward_of_the_models_class, "FluxTransformer2DModel.forward is not diffusers' own"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_sees_what_it_saw(prepare: Prepare, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What such code keeps (attention maps, features of places in the picture) is the same, call by call."""
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    drawn = {}
    for on in (False, True):
        with monkeypatch.context() as changes:
            pipe = pipeline(flux1())
            prepare(pipe, seen[on], changes)
            if on:
                chipmunk.enable(pipe, KEPT)
            drawn[on] = draw(pipe)
            if on:
                orders = chipmunk.statistics(pipe).token_order
    assert error(drawn[True], drawn[False]) < 1e-5
    assert len(seen[True]) == len(seen[False]) > 0
    assert max(error(got, wanted) for got, wanted in zip(seen[True], seen[False], strict=True)) < 1e-5
    assert len(orders) == 1
    assert reason in next(iter(orders))


def test_a_hook_of_the_model_itself_sees_tokens_in_order() -> None:
    """It stands outside of what Chipmunk does: the order may change inside."""
    seen: list[Tensor] = []
    pipe = pipeline(flux1())
    pipe.transformer.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    wanted = draw(pipe)
    first, seen[:] = list(seen), []
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), wanted) < 1e-5
    assert max(error(got, was) for got, was in zip(seen, first, strict=True)) < 1e-5
    assert chipmunk.statistics(pipe).token_order == {"reordered": 1}


def test_a_processor_whose_call_was_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    draw(pipe)
    the_call_of_the_processors_class(pipe, [], monkeypatch)
    draw(pipe, seed=1)
    reason = "FluxAttnProcessor.__call__ was replaced by code that is not diffusers' own"
    assert reasons(chipmunk.statistics(pipe)) == {reason}
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == {FluxAttnProcessor}


def test_a_forward_of_the_model_that_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools that store attention maps put it there, with a pipeline that gives it the picture's size."""

    def forward(self: Any, hidden_states: Tensor, *, height: int | None = None, **kwargs: Any) -> Any:
        heights.append(height)
        return type(self).forward(self, hidden_states, **kwargs)

    heights: list[int | None] = []
    pipe = pipeline(flux1())
    wanted = draw(pipe)
    pipe.transformer.forward = MethodType(forward, pipe.transformer)
    chipmunk.enable(pipe, KEPT)
    inner = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: inner(*args, height=9, **kwargs)
    assert error(draw(pipe), wanted) < 1e-5
    assert heights == 12 * [9]


def test_a_forward_of_the_class_that_is_put_there_later_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = diffusers.FluxTransformer2DModel.forward
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    wanted = draw(pipe)
    calls: list[int] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", forward)
    assert error(draw(pipe), wanted) < 1e-5
    assert len(calls) == 12
    dense = chipmunk.statistics(pipe).dense_model_calls
    assert dense["the forward of the model's class was replaced after Chipmunk was enabled"] == 12


def test_a_forward_of_the_class_that_names_nothing_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    original = diffusers.FluxTransformer2DModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    pipe = pipeline(flux1())
    wanted = draw(pipe)
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", forward)
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), wanted) < 1e-5
    assert chipmunk.statistics(pipe).dense_model_calls == {"the image is not one tensor (B, L, …)": 12}


@dataclass
class Means:
    """What a model that was distilled from FLUX predicts: more than one tensor, and no `sample`."""

    means: Tensor
    spread: Tensor


class Distilled(diffusers.FluxTransformer2DModel):
    def forward(self, hidden_states: Tensor, timestep: Any = None, img_ids: Any = None, **given: Any) -> Any:
        given |= {"return_dict": False}
        (out,) = super().forward(hidden_states, timestep=timestep, img_ids=img_ids, **given)
        return Means(out, out.std(dim=-1))


def test_a_model_that_returns_something_else() -> None:
    made = flux1()
    model = Distilled.from_config(made.config).eval().requires_grad_(False)
    model.load_state_dict(made.state_dict())
    given = {"encoder_hidden_states": random(1, 11, 24), "pooled_projections": random(1, 20)}
    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(7.0))
    given |= {"txt_ids": torch.zeros(11, 3), "img_ids": rows, "guidance": torch.ones(1)}

    @torch.no_grad()
    def run() -> list[Any]:
        times = torch.linspace(1, 0.1, 10).split(1)
        return [model(hidden_states=random(1, 42, 16), timestep=t, **given) for t in times]

    wanted = run()
    chipmunk.enable(model, KEPT)
    got = run()
    assert {type(one) for one in got} == {Means}
    assert max(error(a.means, b.means) + error(a.spread, b.spread) for a, b in zip(got, wanted, strict=True)) < 1e-5
    sparse = chipmunk.statistics(model).layers[-1].mlp
    assert sum(calls.sparse for calls in sparse.values()) > 0
