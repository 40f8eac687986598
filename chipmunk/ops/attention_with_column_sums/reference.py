"""Attention with column sums in plain PyTorch: one query group at a time, so that no (N, N) matrix is ever whole."""

from __future__ import annotations

import torch
from torch import Tensor

from chipmunk.ops.dispatch import groups_of


def attention_with_column_sums(q: Tensor, k: Tensor, v: Tensor, group: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `chipmunk.ops.attention_with_column_sums`. Half precision is computed in float32 and rounded once."""
    batch, heads, rows, width = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = k.to(exact).transpose(-1, -2), v.to(exact)
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    sums = q.new_empty(batch, heads, groups_of(rows, group), rows, dtype=exact)
    for index, start in enumerate(range(0, rows, group)):
        probabilities = torch.softmax(q[:, :, start : start + group].to(exact) @ keys * scale, dim=-1)
        out[:, :, start : start + group] = probabilities @ values
        sums[:, :, index] = probabilities.sum(dim=-2)
    return out, sums
