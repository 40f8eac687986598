"""Attention in which each query group looks at its own list of keys only."""

from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.column_sparse_attention import reference

_NAME = "column_sparse_attention"


def column_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    addend: Tensor | None,
    group: int,
    scale: float,
    subtract: bool,
    implementation: str = "auto",
) -> Tensor:
    """`addend + sparse`, or `addend − sparse` with `subtract`; `addend` None counts as zero.

    q, k, v: (B, H, N, D), any strides. indices: (B, H, ceil(N / group), K) int32, ascending: the keys of each group of
    query rows. addend: (B, H, N, D), any strides. `sparse` is `softmax(scale · q kᵀ) v` over the listed keys alone,
    normalised over them. Returns (B, H, N, D), dtype of q, a transposed view of a contiguous (B, N, H, D) tensor; never
    the addend's storage. Within `ops.dense_results_only`, `addend − sparse` is zeros.
    """
    result: Tensor = _operator(q, k, v, indices, addend, group, scale, subtract, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? addend, SymInt group, float scale, bool subtract, "
    "str implementation) -> Tensor",
)
def _operator(q, k, v, indices, addend, group, scale, subtract, implementation):  # type: ignore[no-untyped-def]
    if subtract and dispatch.is_dense_only():
        return _empty(q).zero_()
    args = (q, k, v, indices, addend, group, scale, subtract)
    return dispatch.call(_NAME, implementation, reference.column_sparse_attention, _expect, *args)


def _expect(q, k, v, indices, addend, group, scale, subtract):  # type: ignore[no-untyped-def]
    dispatch.check(q.dim() == 4 and q.shape == k.shape == v.shape, _NAME, "q, k and v must have one shape (B, H, N, D)")
    dispatch.check(q.dtype == k.dtype == v.dtype, _NAME, "q, k and v must have one dtype")
    groups = dispatch.groups_of(q.shape[2], group)
    dispatch.check(indices.shape[:-1] == (*q.shape[:2], groups), _NAME, f"indices must be (B, H, {groups}, K)")
    dispatch.check(indices.shape[-1] > 0, _NAME, "at least one key must be kept")
    dispatch.check(addend is None or addend.shape == q.shape, _NAME, "the addend must have the shape of q")


@register.fake(_NAME)
def _(q, k, v, indices, addend, group, scale, subtract, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, q, k, v, indices, addend, group, scale, subtract)
    return _empty(q)


def _empty(q: Tensor) -> Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)
