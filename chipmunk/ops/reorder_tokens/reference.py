"""Token reordering in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def reorder_tokens(x: Tensor, order: Tensor) -> Tensor:
    """See `chipmunk.ops.reorder_tokens`."""
    return x.index_select(1, order).contiguous()
