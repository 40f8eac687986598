"""The gathered second linear in plain PyTorch, one group of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_mlp_out(delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int) -> None:
    """See `chipmunk.ops.sparse_mlp_out`. Half precision is computed in float32 and rounded once."""
    batch, rows, _ = delta.shape
    exact = torch.float64 if delta.dtype == torch.float64 else torch.float32
    for element in range(batch):
        for index, start in enumerate(range(0, rows, group)):
            span = slice(start, start + group)
            gathered = weight[:, indices[element, index].long()].to(exact)
            out_cache[element, span] = out_cache[element, span].to(exact) + delta[element, span].to(exact) @ gathered.T
