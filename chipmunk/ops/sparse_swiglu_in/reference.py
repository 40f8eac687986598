"""The gathered gate and value of a SwiGLU MLP in plain PyTorch, one group of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sparse_swiglu_in(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
) -> Tensor:
    """See `chipmunk.ops.sparse_swiglu_in`. Computed in float32 at least; the activation is rounded, then subtracted."""
    batch, rows, _ = x.shape
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    delta = x.new_empty(batch, rows, indices.shape[-1])

    def through(row: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor) -> Tensor:
        hidden = row @ weight[chosen].to(exact).T
        return hidden if bias is None else hidden + bias[chosen].to(exact)

    for element in range(batch):
        for index, start in enumerate(range(0, rows, group)):
            span = slice(start, start + group)
            chosen = indices[element, index].long()
            row = x[element, span].to(exact)
            gated = functional.silu(through(row, gate, gate_bias, chosen))
            new = (gated * through(row, value, value_bias, chosen)).to(act_cache.dtype)
            cached = act_cache[element, span]
            delta[element, span] = new.to(exact) - cached[:, chosen].to(exact)
            cached[:, chosen] = new
    return delta
