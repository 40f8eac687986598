"""Linear layers that bring their weight to the input at each call, as ComfyUI's do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from flux_model import Flux, build, denoise, error, inputs, same, small
from torch import nn
from torch._dynamo.testing import CompileCounter

import chipmunk

CLASSES = """
import torch
from torch import nn


def cast(layer, like):
    weight, bias = layer.weight.to(like), None if layer.bias is None else layer.bias.to(like)
    for function in layer.weight_function:
        weight = function(weight)
    for function in layer.bias_function:
        bias = function(bias)
    return weight, bias


class Casting:
    comfy_cast_weights = False
    weight_function = []
    bias_function = []


class disable_weight_init:
    class Linear(nn.Linear, Casting):
        def forward(self, x):
            if self.comfy_cast_weights or self.weight_function or self.bias_function:
                return nn.functional.linear(x, *cast(self, x))
            return super().forward(x)


class manual_cast(disable_weight_init):
    class Linear(disable_weight_init.Linear):
        comfy_cast_weights = True


class fp8_ops(manual_cast):
    class Linear(manual_cast.Linear):
        pass
"""


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with such classes, of that name."""
    module = ModuleType("comfy.ops")
    monkeypatch.setitem(sys.modules, "comfy.ops", module)
    exec(CLASSES, module.__dict__)
    return module


def model_with(kind: type[nn.Linear]) -> Flux:
    """The model with all its linear layers of that class."""
    model = build(0)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                layer = kind(child.in_features, child.out_features, bias=child.bias is not None)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer)
    return model.eval()


def mlp_linears(model: Flux) -> list[nn.Module]:
    found = [block.img_mlp[0] for block in model.double_blocks]
    return [*found, *(block.linear1 for block in model.single_blocks)]


def add_function(linear: Any) -> None:
    linear.weight_function = [lambda weight: 2 * weight]


def offload(linear: Any) -> None:
    linear._v = object()


def lower(linear: Any) -> None:
    linear.to(torch.bfloat16)


def replace_forward(linear: Any) -> None:
    type(linear).forward = lambda self, x: torch.nn.functional.linear(x, self.weight.to(x), self.bias.to(x)) + 1


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("manual_cast", add_function, "changes its weight at each call"),
        ("disable_weight_init", add_function, "changes its weight at each call"),
        ("manual_cast", offload, "changes its weight at each call"),
        ("manual_cast", lower, "the weight's dtype is not that of the activations"),
        ("disable_weight_init", replace_forward, "the linear layer is a comfy.ops.Linear"),
        ("fp8_ops", lambda linear: None, "the linear layer is a comfy.ops.Linear"),
    ],
)
@torch.no_grad()
def test_a_layer_that_does_more_stays_dense(ops: Any, kind: str, change: Callable[[Any], None], reason: str) -> None:
    model, given = model_with(getattr(ops, kind).Linear), inputs(6, 7)
    for linear in mlp_linears(model):
        change(linear)
    dense = denoise(model, 9, **given)
    chipmunk.enable(model, small(attn__is_enabled=False))
    assert error(denoise(model, 9, **given), dense) < 1e-5
    for layer in chipmunk.statistics(model).layers[1:]:
        (slot,) = layer.mlp.values()
        assert slot.sparse == 0
        assert all(reason in found for found in slot.dense), slot.dense


@pytest.mark.parametrize("kind", ["disable_weight_init", "manual_cast"])
@torch.no_grad()
def test_a_layer_whose_weight_is_as_the_input_runs_sparse(ops: Any, kind: str) -> None:
    plain, model, given = build(0), model_with(getattr(ops, kind).Linear), inputs(6, 7)
    dense = denoise(model, 9, **given)
    assert same(dense, denoise(plain, 9, **given))
    for config in (small(mlp__top_keys=1.0, attn__top_keys=1.0), small()):
        chipmunk.enable(plain, config)
        chipmunk.enable(model, config)
        found = denoise(model, 9, **given)
        assert error(found, denoise(plain, 9, **given)) == 0
        assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])
    assert error(found, dense) > 1e-3, "nothing was sparse"


@torch.no_grad()
def test_a_function_that_comes_and_goes_is_noticed_at_the_next_call(ops: Any) -> None:
    model, given = model_with(ops.disable_weight_init.Linear), inputs(6, 7)
    chipmunk.enable(model, small(attn__is_enabled=False, mlp__top_keys=1.0))
    linear = model.double_blocks[1].img_mlp[2]
    expected = denoise(model, 9, **given)
    linear.weight_function = [lambda weight: 2 * weight]
    changed = denoise(model, 9, **given)
    chipmunk.disable(model)
    assert error(changed, denoise(model, 9, **given)) < 1e-5
    linear.weight_function = []
    chipmunk.enable(model, small(attn__is_enabled=False, mlp__top_keys=1.0))
    assert error(denoise(model, 9, **given), expected) < 1e-5


@torch.no_grad()
def test_compiled_into_as_many_graphs_as_plain_layers(ops: Any) -> None:
    given, counts = inputs(6, 7), []
    for model in (build(0), model_with(ops.manual_cast.Linear)):
        torch._dynamo.reset()
        chipmunk.enable(model, small(min_steps=1, mlp__full_step_every=3))
        expected = denoise(model, 7, **given)
        graphs = CompileCounter()
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(backend=graphs, fullgraph=True, dynamic=False)
        assert error(denoise(model, 7, **given), expected) < 1e-5
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1] > 1
