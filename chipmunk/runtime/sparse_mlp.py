"""The MLPs of both kinds of block: calls that stand where the code had its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chipmunk import ops
from chipmunk.ops.dispatch import groups_of
from chipmunk.runtime.layer_state import DONE, LayerState, state_of
from chipmunk.runtime.linears import activation_name, why_not_linear, why_not_mlp


def mlp(block: nn.Module, module: Any, x: Tensor) -> Tensor:
    """`module(x)` for the image MLP of a double block, or its sparse form. x: (B, N, C). Never a cache's storage."""
    state = state_of(block)
    if state is None:
        out: Tensor = module(x)
        return out
    reason = why_not_mlp(module, x)
    if reason is None:
        reason = _why_dense(state, x, module[0].weight.shape[0])
    if reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        out = module(x)
        return out

    first, activation, second = module
    state.mlp_done = DONE
    if state.mlp == "full":
        state.means = _means_through(state, x, first.weight, first.bias)
        activations = activation(first(x))
        out = second(activations)
        state.activations, state.output = _by_neuron(activations), out.clone()
        return out
    delta = _changed_activations(state, x, first.weight, first.bias, activation_name(activation))
    return _updated_output(state, delta, second.weight).clone()


def split_linear(block: nn.Module, linear: Any, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """`torch.split(linear(x), sizes, dim=-1)`, or its sparse form, for the first linear of a single block.

    x: (B, N, C). sizes: columns of [attention, MLP]. On a sparse step the second tensor holds how the chosen
    activations changed, (B, N, K), and only `cat_linear` can use it.
    """
    state = state_of(block)
    if state is None:
        return torch.split(linear(x), sizes, dim=-1)
    reason = why_not_linear(linear, x, x.shape[-1])
    if reason is None and (x.dim() != 3 or len(sizes) != 2 or sizes[0] + sizes[1] != linear.weight.shape[0]):
        reason = "the split of the linear layer is not understood"
    if reason is None:
        reason = _why_dense(state, x, sizes[1])
    if reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        state.single_mlp = "dense"
        return torch.split(linear(x), sizes, dim=-1)

    state.single_mlp = state.mlp
    attention, neurons = slice(sizes[0]), slice(sizes[0], None)
    bias = None if linear.bias is None else linear.bias[neurons]
    if state.mlp == "full":
        state.means = _means_through(state, x, linear.weight[neurons], bias)
        return torch.split(linear(x), sizes, dim=-1)
    delta = _changed_activations(state, x, linear.weight[neurons], bias, state.activation)
    bias = None if linear.bias is None else linear.bias[attention]
    return functional.linear(x, linear.weight[attention], bias), delta


def cat_linear(
    block: nn.Module, linear: Any, attended: Tensor, activation: Callable[[Tensor], Tensor], mlp: Tensor
) -> Tensor:
    """`linear(torch.cat((attended, activation(mlp)), dim=-1))`, or its sparse form, for the second linear.

    attended: (B, N, C), the attention's output. mlp: what `split_linear` gave. Returns (B, N, C), never a cache.
    """
    state = state_of(block)
    if state is None or state.single_mlp == "dense":
        out: Tensor = linear(torch.cat((attended, activation(mlp)), dim=-1))
        return out
    kind, state.single_mlp = state.single_mlp, "dense"
    width = attended.shape[-1]
    if kind == "full":
        reason = why_not_linear(linear, attended, width + mlp.shape[-1])
        name = activation_name(activation)
        if name is None:
            reason = f"the activation is a {type(activation).__name__} that is not understood"
        if reason is not None or name is None:
            state.mlp_done = reason
            out = linear(torch.cat((attended, activation(mlp)), dim=-1))
            return out
        state.activation = name
        activations = activation(mlp)
        state.output = functional.linear(activations, linear.weight[:, width:])
        state.activations = _by_neuron(activations)
    else:
        assert state.activations is not None
        reason = why_not_linear(linear, attended, width + state.activations.shape[-1])
        if (
            reason is not None
        ):  # the layer was changed since the full step; what it would be given is known all the same
            state.mlp_done = reason
            out = linear(torch.cat((attended, state.activations), dim=-1))
            return out
        _updated_output(state, mlp, linear.weight[:, width:])
    assert state.output is not None
    state.mlp_done = DONE
    return functional.linear(attended, linear.weight[:, :width], linear.bias) + state.output


def part_means(x: Tensor, group: int, part: int) -> Tensor:
    """Means of x (B, N, C) over parts of `part` rows of groups of `group` rows: (B, groups, parts, C), dtype of x.

    Summed in float32 (float64 for float64). A part without rows, at the end of the last group, gives zero.
    """
    batch, rows, width = x.shape
    groups, parts = groups_of(rows, group), groups_of(group, part)
    missing = groups * group - rows
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
    padded = padded.reshape(batch, groups, group, width)
    if parts * part != group:
        padded = functional.pad(padded, (0, 0, 0, parts * part - group))
    sums = padded.reshape(batch, groups, parts, part, width).sum(dim=3, dtype=wide)
    ends = torch.arange(1, groups * parts + 1, device=x.device).reshape(groups, parts)
    index, number = (ends - 1) // parts, (ends - 1) % parts
    left = torch.clamp(rows - index * group, max=group) - number * part
    counts = torch.clamp(left, min=1, max=part)
    return (sums / counts[None, :, :, None]).to(x.dtype)


def _by_neuron(activations: Tensor) -> Tensor:
    """A copy of (B, N, F) in which the values of one neuron lie together."""
    return activations.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _means_through(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The block means: fc1 of the mean input, (B, groups, parts, F)."""
    return functional.linear(part_means(x, state.mlp_rules.group, state.mlp_rules.part), weight, bias)


def _changed_activations(
    state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """How the activations at the chosen neurons changed, (B, N, K); selects neurons first where this step is to."""
    rules, implementation = state.mlp_rules, state.implementation
    assert activation is not None
    assert state.activations is not None
    if state.select_neurons:
        assert state.means is not None
        assert state.mlp_seed is not None
        new = _means_through(state, x, weight, bias)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = (new.to(wide) - state.means.to(wide)).abs().sum(dim=2)
        keep, random = rules.kept(weight.shape[0])
        state.neurons = ops.select_columns(scores, state.mlp_seed, keep, random, implementation)
        chosen = state.neurons.long()[:, :, None].expand(-1, -1, new.shape[2], -1)
        state.means = state.means.scatter(-1, chosen, new.gather(-1, chosen))
    assert state.neurons is not None
    return ops.sparse_mlp_in(x, weight, bias, state.neurons, state.activations, rules.group, activation, implementation)


def _updated_output(state: LayerState, delta: Tensor, weight: Tensor) -> Tensor:
    """The output cache, with what the changed activations add to it."""
    assert state.neurons is not None
    assert state.output is not None
    ops.sparse_mlp_out(delta, weight, state.neurons, state.output, state.mlp_rules.group, state.implementation)
    return state.output


def _why_dense(state: LayerState, x: Tensor, neurons: int) -> str | None:
    """Why an MLP that is understood is faster, or only possible, dense."""
    rules = state.mlp_rules
    if groups_of(x.shape[1], rules.group) < 2:
        return "fewer than two groups of rows"
    if rules.top_keys < 1 and sum(rules.kept(neurons)) >= neurons:
        return "rounding keeps every neuron"
    if state.mlp == "sparse" and (
        state.activations is None or state.activations.shape != (x.shape[0], x.shape[1], neurons)
    ):
        return "the number of tokens changed"
    return None
