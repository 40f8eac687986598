"""The gathered first linear in plain PyTorch, one group of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sparse_mlp_in(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, act_cache: Tensor, group: int, activation: str
) -> Tensor:
    """See `chipmunk.ops.sparse_mlp_in`. Computed in float32 at least; the activation is rounded, then subtracted."""
    batch, rows, _ = x.shape
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    delta = x.new_empty(batch, rows, indices.shape[-1])
    for element in range(batch):
        for index, start in enumerate(range(0, rows, group)):
            span = slice(start, start + group)
            chosen = indices[element, index].long()
            hidden = x[element, span].to(exact) @ weight[chosen].to(exact).T
            if bias is not None:
                hidden = hidden + bias[chosen].to(exact)
            new = functional.gelu(hidden, approximate=approximate).to(act_cache.dtype)
            cached = act_cache[element, span]
            delta[element, span] = new.to(exact) - cached[:, chosen].to(exact)
            cached[:, chosen] = new
    return delta
