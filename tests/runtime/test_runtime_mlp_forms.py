"""MLPs of every form that the patches know compute what the oracle does, or run dense and say why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from flux_model import denoise, error, inputs, same, small
from mlp_forms import CASES, HIDDEN, SINGLES, Mlp, facts_of, model_of, patch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import chipmunk
from chipmunk.config import Config
from chipmunk.verify.oracle import Oracle


@pytest.mark.parametrize(("mlp", "single"), CASES)
@torch.no_grad()
def test_off_everything_kept_and_sparse(mlp: str, single: str) -> None:
    model, given = model_of(mlp, single), inputs(6, 7, batch=2)
    patch(model, False)
    dense = denoise(model, 9, **given)
    config = small(mlp__random_keys=0.1, mlp__mbm=8, mlp__top_keys=0.4)
    oracle = Oracle(model, facts_of(mlp, single), Config.model_validate(config), steps=9)
    with oracle:
        oracle.auto_step()
        expected = denoise(model, 9, **given)
    patch(model)
    assert same(denoise(model, 9, **given), dense)
    chipmunk.enable(model, config)
    got = denoise(model, 9, **given)
    assert oracle.smallest_margin > 2e-7, "a tie: choose another seed"
    assert error(got, expected) < 1e-5
    assert error(got, dense) > 1e-3, "nothing was sparse"
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])
    chipmunk.enable(model, small(mlp__top_keys=1.0, attn__top_keys=1.0))
    assert error(denoise(model, 9, **given), dense) < 1e-5
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])


@torch.no_grad()
def test_a_second_mlp_of_a_block_runs_dense() -> None:
    """A block keeps the caches of one MLP: what its code calls after that is left alone."""
    model, given = model_of("its own class", "separate projections, MLP first"), inputs(6, 7)
    patch(model, False)
    for block in model.double_blocks:
        block.more = Mlp().eval()
        block.forward = partial(_with_more, block, block.forward)
    dense = denoise(model, 9, **given)
    patch(model)
    chipmunk.enable(model, small(mlp__top_keys=1.0, attn__top_keys=1.0))
    assert error(denoise(model, 9, **given), dense) < 1e-5
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])


def _with_more(block: Any, forward: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    img, txt = forward(*args, **options)
    hidden = chipmunk.mlp_linear(block, block.more.fc1, img)
    img = img + chipmunk.out_linear(block, block.more.fc2, chipmunk.activate(block, block.more.act, hidden))
    return img + chipmunk.mlp(block, block.more, img, parts="fc1, act, fc2", of="Mlp"), txt


@pytest.mark.parametrize(("mlp", "single"), [CASES[1], CASES[6], CASES[7]])
@torch.no_grad()
def test_compiled_without_graph_breaks(mlp: str, single: str) -> None:
    torch._dynamo.reset()
    model, given = model_of(mlp, single), inputs(6, 7)
    patch(model)
    chipmunk.enable(model, small(min_steps=1, mlp__full_step_every=3))
    expected = denoise(model, 7, **given)
    graphs = CompileCounter()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=64):
        assert error(denoise(model, 7, **given), expected) < 1e-5
        few = graphs.frame_count
        denoise(model, 13, **given)
    assert graphs.frame_count == few, "compiled anew at later steps"
    assert few <= 8


@torch.no_grad()
def test_weights_are_views() -> None:
    model = model_of("SwiGLU", "a variable whose shape is asked, SwiGLU")
    patch(model)
    chipmunk.enable(model, small(min_steps=1))
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: list[tuple[int, ...]] = []
    record = _Weights(seen)
    with record:
        denoise(model, 3, **inputs(6, 7))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert seen
    assert all(pointer in storages for pointers in seen for pointer in pointers)
    assert parameters == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


class _Weights(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes where the weights lie that the gated operator is given."""

    def __init__(self, seen: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.chipmunk.sparse_swiglu_in.default:
            self.seen.append(tuple(weight.untyped_storage().data_ptr() for weight in args[1:3]))
        return func(*args, **(kwargs or {}))


class Linear(nn.Linear):
    """As a LoRA layer: another class, of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


def _subclass(mlp: Any) -> None:
    mlp.fc1.__class__ = Linear


def _hook(mlp: Any) -> None:
    mlp.drop.register_forward_hook(lambda module, args, output: output * 1.1)


def _train(mlp: Any) -> None:
    mlp.drop.train()
    mlp.drop.p = 1.0


def _other_class(mlp: Any) -> None:
    mlp.__class__ = type("Scaled", (Mlp,), {"forward": lambda self, x: 2 * Mlp.forward(self, x)})


def _other_activation(mlp: Any) -> None:
    mlp.act = nn.SiLU()


def _own_forward(mlp: Any) -> None:
    mlp.forward = lambda x: 3 * Mlp.forward(mlp, x)


def _without(mlp: Any) -> None:
    mlp.first, mlp.fc1 = mlp.fc1, None
    mlp.forward = lambda x: mlp.fc2(mlp.first(x).tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_subclass, "the linear layer is a test_runtime_mlp_forms.Linear"),
        (_hook, "a hook watches or changes the MLP"),
        (_train, "dropout is active in the MLP"),
        (_other_class, "the MLP holds a Scaled, which is not understood"),
        (_other_activation, "the activation is a SiLU that is not understood"),
        (_own_forward, "a hook watches or changes the MLP"),
        (_without, "the MLP has lost a part that the patch has seen"),
    ],
)
@torch.no_grad()
def test_an_mlp_that_was_changed_runs_dense(change: Callable[[Any], None], reason: str) -> None:
    model, given = model_of("its own class", "separate projections, MLP first"), inputs(6, 7)
    for block in model.double_blocks:
        change(block.img_mlp)
    dense = denoise(model, 3, **given)
    patch(model)
    chipmunk.enable(model, small(min_steps=1, attn__is_enabled=False, patchify__is_enabled=False))
    for block in model.single_blocks:
        block.proj_mlp.__class__ = Linear
    expected = denoise(model, 3, **given)
    layers = chipmunk.statistics(model).layers
    assert layers[1].mlp["main"].dense == {reason: 3}
    assert layers[3].mlp["main"].dense == {"the linear layer is a test_runtime_mlp_forms.Linear": 3}
    chipmunk.disable(model)
    assert same(expected, denoise(model, 3, **given))
    for block in model.single_blocks:
        block.proj_mlp.__class__ = nn.Linear
    assert same(denoise(model, 3, **given), dense)


@pytest.mark.parametrize("single", list(SINGLES))
@torch.no_grad()
def test_a_second_linear_that_changes_between_steps(single: str) -> None:
    """The sparse step finds it out at its end, when the activations are known to it alone."""
    model, given = model_of("SwiGLU", single), inputs(6, 7)
    patch(model)

    def wrap(step: int) -> None:
        for block in model.single_blocks:
            block.linear2.__class__ = Linear if step == 2 else nn.Linear

    dense = denoise(model, 5, each=wrap, **given)
    chipmunk.enable(model, small(min_steps=1, mlp__top_keys=1.0, attn__is_enabled=False))
    assert error(denoise(model, 5, each=wrap, **given), dense) < 1e-5
    counts = chipmunk.statistics(model).layers[3].mlp["main"]
    assert counts.dense == {"the linear layer is a test_runtime_mlp_forms.Linear": 1}
    assert (counts.full, counts.sparse) == (2, 2)


@torch.no_grad()
def test_an_activation_that_is_not_understood_is_found_between_the_linears() -> None:
    model, given = model_of("SwiGLU", "a variable whose shape is asked, SwiGLU"), inputs(6, 7)
    dense = denoise(model, 3, **given)
    patch(model)
    for block in model.single_blocks:
        block.gate.act = nn.Tanh()
    changed = denoise(model, 3, **given)
    assert not same(changed, dense)
    chipmunk.enable(model, small(min_steps=1, attn__is_enabled=False, mlp__top_keys=1.0))
    assert error(denoise(model, 3, **given), changed) < 1e-5
    reason = "the activation is a Gate that is not understood"
    assert chipmunk.statistics(model).layers[3].mlp["main"].dense == {reason: 3}


@torch.no_grad()
def test_rounding_keeps_every_neuron() -> None:
    model = model_of("SwiGLU", "separate projections, MLP first")
    patch(model)
    chipmunk.enable(model, small(min_steps=1, mlp__counts_multiple_of=2 * HIDDEN))
    denoise(model, 3, **inputs(6, 7))
    for layer in chipmunk.statistics(model).layers[1:]:
        assert layer.mlp["main"].dense == {"rounding keeps every neuron": 3}
