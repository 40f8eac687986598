"""Dense attention that also says how much each query group looks at each key."""

import torch
from torch import Tensor
from torch.nn import functional

from chipmunk.ops import dispatch, register
from chipmunk.ops.attention_with_column_sums import reference

_NAME = "attention_with_column_sums"


def attention_with_column_sums(
    q: Tensor, k: Tensor, v: Tensor, group: int, scale: float, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, and the column sums of its probability matrix over each group of query rows.

    q, k, v: (B, H, N, D), any strides, one floating dtype. Groups are `group` consecutive rows, the last one partial.
    Returns `out` (B, H, N, D), dtype of q, a transposed view of a contiguous (B, N, H, D) tensor so that merging the
    heads costs nothing; and `column_sums` (B, H, ceil(N / group), N), contiguous, float32 (float64 for float64 inputs):
    `column_sums[b, h, g, j]` is the sum of `softmax(scale · q kᵀ)[i, j]` over the rows i of group g
    (zeros within `ops.dense_results_only`).
    """
    result: tuple[Tensor, Tensor] = _operator(q, k, v, group, scale, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, SymInt group, float scale, str implementation) -> (Tensor, Tensor)",
)
def _operator(q, k, v, group, scale, implementation):  # type: ignore[no-untyped-def]
    if dispatch.is_dense_only():
        out, sums = _empty(q, group)
        return out.copy_(functional.scaled_dot_product_attention(q, k, v, scale=scale)), sums.zero_()
    return dispatch.call(_NAME, implementation, reference.attention_with_column_sums, _expect, q, k, v, group, scale)


def _expect(q, k, v, group, scale):  # type: ignore[no-untyped-def]
    dispatch.check(q.dim() == 4 and q.shape == k.shape == v.shape, _NAME, "q, k and v must have one shape (B, H, N, D)")
    dispatch.check(q.dtype == k.dtype == v.dtype, _NAME, "q, k and v must have one dtype")


@register.fake(_NAME)
def _(q, k, v, group, scale, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, q, k, v, group, scale)
    return _empty(q, group)


def _empty(q: Tensor, group: int) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = q.shape
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    sums_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(batch, heads, dispatch.groups_of(rows, group), rows, dtype=sums_dtype)
