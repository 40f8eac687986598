"""What all sparse MLPs share: block means, the choice of neurons, and the caches of activations and outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chipmunk import ops
from chipmunk.ops.dispatch import groups_of
from chipmunk.runtime.layer_state import LayerState
from chipmunk.runtime.linears import GATED, rows_per_neuron


class Rows(NamedTuple):
    """The rows of fc1 that are an MLP's: of one weight, or of the gate's and the value's."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, *linears: Any) -> Rows:
        return cls(tuple(linear.weight for linear in linears), tuple(linear.bias for linear in linears))


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


def by_neuron(activations: Tensor) -> Tensor:
    """A copy of (B, N, F) in which the values of one neuron lie together."""
    return activations.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def means_through(state: LayerState, x: Tensor, rows: Rows) -> Tensor:
    """The block means: fc1 of the mean input, (B, groups, parts, rows of fc1)."""
    means = part_means(x, state.mlp_rules.group, state.mlp_rules.part)
    found = [functional.linear(means, *row) for row in zip(rows.weights, rows.biases, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def changed_activations(state: LayerState, x: Tensor, rows: Rows, activation: str) -> Tensor:
    """How the activations at the chosen neurons changed, (B, N, K); selects neurons first where this step is to."""
    rules, implementation = state.mlp_rules, state.implementation
    weights, biases = rows
    assert state.activations is not None
    if state.select_neurons:
        _select(state, x, rows, sum(weight.shape[0] for weight in weights) // rows_per_neuron(activation))
    assert state.neurons is not None
    if activation not in GATED:
        cache = state.activations
        return ops.sparse_mlp_in(
            x, weights[0], biases[0], state.neurons, cache, rules.group, activation, implementation
        )
    gate, value = 0, 1
    if len(weights) == 1:
        gate, value = GATED[activation], 1 - GATED[activation]
        biases = (None, None) if biases[0] is None else biases[0].chunk(2)
        weights = weights[0].chunk(2)
    halves = (weights[gate], weights[value], biases[gate], biases[value])
    return ops.sparse_swiglu_in(x, *halves, state.neurons, state.activations, rules.group, implementation)


def _select(state: LayerState, x: Tensor, rows: Rows, neurons: int) -> None:
    """Choose the neurons whose block means changed most, and refresh their means."""
    assert state.means is not None
    assert state.mlp_seed is not None
    keep, random = state.mlp_rules.kept(neurons)
    new = means_through(state, x, rows)
    state.neurons = ops.select_neurons(new, state.means, state.mlp_seed, neurons, keep, random, state.implementation)


def updated_output(state: LayerState, delta: Tensor, weight: Tensor) -> Tensor:
    """The output cache, with what the changed activations add to it."""
    assert state.neurons is not None
    assert state.output is not None
    ops.sparse_mlp_out(delta, weight, state.neurons, state.output, state.mlp_rules.group, state.implementation)
    return state.output


def why_dense(state: LayerState, x: Tensor) -> str | None:
    """Why an MLP on these rows is faster, or only possible, dense."""
    if groups_of(x.shape[1], state.mlp_rules.group) < 2:
        return "fewer than two groups of rows"
    if state.mlp == "sparse" and (state.activations is None or state.activations.shape[:2] != x.shape[:2]):
        return "the number of tokens changed"
    return None


def why_everything(state: LayerState, neurons: int) -> str | None:
    """Why an MLP of so many neurons has nothing to leave out, or is not the one whose caches are held."""
    rules = state.mlp_rules
    if rules.top_keys < 1 and sum(rules.kept(neurons)) >= neurons:
        return "rounding keeps every neuron"
    if state.mlp == "sparse" and state.activations is not None and state.activations.shape[-1] != neurons:
        return "the number of neurons changed"
    return None
