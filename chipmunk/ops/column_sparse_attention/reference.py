"""Column-sparse attention in plain PyTorch: the keys of one query group are gathered at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def column_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    addend: Tensor | None,
    group: int,
    scale: float,
    subtract: bool,
) -> Tensor:
    """See `chipmunk.ops.column_sparse_attention`. Half precision is computed in float32 and rounded once."""
    batch, heads, rows, width = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    for index, start in enumerate(range(0, rows, group)):
        chosen = indices[:, :, index].long()[..., None].expand(-1, -1, -1, width)
        keys, values = k.gather(2, chosen).to(exact), v.gather(2, chosen).to(exact)
        queries = q[:, :, start : start + group].to(exact)
        sparse = torch.softmax(queries @ keys.transpose(-1, -2) * scale, dim=-1) @ values
        if subtract:
            sparse = -sparse
        if addend is not None:
            sparse = sparse + addend[:, :, start : start + group]
        out[:, :, start : start + group] = sparse
    return out
