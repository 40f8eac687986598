"""How much of what a sparse step leaves out it may leave out: attention mass and MLP change that is covered.

Computed beside the sparse step, on its own inputs, exactly: for one picture of a configuration, with uncompiled blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chipmunk import ops
from chipmunk.fidelity.block_calls import block_calls
from chipmunk.runtime import linears, mlp_caches, sparse_mlp
from chipmunk.runtime.layer_state import LayerState
from chipmunk.runtime.mlp_caches import Rows

Coverage = dict[int, list[tuple[int, float]]]
"""By layer, the model call and the share that was covered."""


@contextmanager
def coverage(model: nn.Module, blocks: list[nn.Module]) -> Iterator[dict[str, Coverage]]:
    """While this is open, note what each sparse step covers.

    `attention`: mean share of the probability that lies on the kept keys. `mlp`: share of the activations' absolute
    change that is at the kept neurons.
    """
    found: dict[str, Coverage] = {"attention": {}, "mlp": {}}
    call, inside = [-1], [0]
    original_attention, original_change = ops.column_sparse_attention, mlp_caches.changed_activations

    def before_model(*_: object) -> None:
        call[0] += 1

    def before_block(index: int) -> None:
        inside[0] = index

    def attention(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, addend: Any, group: int, scale: float, subtract: bool, how: str
    ) -> Tensor:
        if not subtract:  # with it, the step is a full one
            found["attention"].setdefault(inside[0], []).append((call[0], kept_mass(q, k, keys, group, scale)))
        return original_attention(q, k, v, keys, addend, group, scale, subtract, how)

    def changed(state: LayerState, x: Tensor, rows: Rows, activation: str) -> Tensor:
        assert state.activations is not None
        hidden = [functional.linear(x, *row) for row in zip(rows.weights, rows.biases, strict=True)]
        name = activation if len(hidden) == 1 else "swiglu"  # gate and value are two linears
        change = linears.activate(name, torch.cat(hidden, dim=-1)) - state.activations
        delta = original_change(state, x, rows, activation)
        assert state.neurons is not None
        share = kept_change(change, state.neurons, state.mlp_rules.group)
        found["mlp"].setdefault(inside[0], []).append((call[0], share))
        return delta

    handle = model.register_forward_pre_hook(before_model)
    _put(attention, changed)
    try:
        with block_calls(blocks, before_block):
            yield found
    finally:
        _put(original_attention, original_change)
        handle.remove()


def _put(attention: Callable[..., Any], change: Callable[..., Any]) -> None:
    """Make these what the runtime calls."""
    setattr(ops, "column_sparse_attention", attention)  # noqa: B010
    setattr(sparse_mlp, "changed_activations", change)  # noqa: B010


def kept_mass(q: Tensor, k: Tensor, keys: Tensor, group: int, scale: float | None = None) -> float:
    """Mean, over all rows and heads, of the probability of dense attention that lies on the kept keys.

    q, k: (B, H, N, D). keys: (B, H, groups, K) indices. scale: 1 / √D by default.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    total = 0.0
    for number in range(keys.shape[2]):
        rows = q[:, :, number * group : (number + 1) * group].float()
        probability = torch.softmax(rows @ k.float().transpose(-1, -2) * factor, dim=-1)
        kept = keys[:, :, number].long()[:, :, None].expand(-1, -1, rows.shape[2], -1)
        total += float(probability.gather(-1, kept).sum())
    return total / (q.shape[0] * q.shape[1] * q.shape[2])


def kept_change(change: Tensor, neurons: Tensor, group: int) -> float:
    """Share of the sum of |change| (B, N, F) at the neurons (B, groups, K) that each group of rows keeps; 1 where there
    is no change at all."""
    kept, size = 0.0, change.float().abs()
    for number in range(neurons.shape[1]):
        rows = size[:, number * group : (number + 1) * group]
        chosen = neurons[:, number].long()[:, None].expand(-1, rows.shape[1], -1)
        kept += float(rows.gather(-1, chosen).sum())
    whole = float(size.sum())
    return kept / whole if whole else 1.0
