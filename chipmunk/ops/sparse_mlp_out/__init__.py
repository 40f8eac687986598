"""The second linear of an MLP at the neurons that each group of rows keeps, added to the cached output."""

from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.sparse_mlp_out import reference

_NAME = "sparse_mlp_out"


def sparse_mlp_out(
    delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int, implementation: str = "auto"
) -> None:
    """`out_cache += delta · weight[:, indices]ᵀ`, by groups of rows.

    delta: (B, N, K). weight: (C, F), any strides, often a view of a larger parameter. indices:
    (B, ceil(N / group), K) int32, ascending. out_cache: (B, N, C), mutated; its dtype may be wider than delta's.
    """
    _operator(delta, weight, indices, out_cache, group, implementation)


@register.operator(
    _NAME,
    "(Tensor delta, Tensor weight, Tensor indices, Tensor(a!) out_cache, SymInt group, str implementation) -> ()",
)
def _operator(delta, weight, indices, out_cache, group, implementation):  # type: ignore[no-untyped-def]
    dispatch.call(_NAME, implementation, reference.sparse_mlp_out, _expect, delta, weight, indices, out_cache, group)


def _expect(delta, weight, indices, out_cache, group):  # type: ignore[no-untyped-def]
    dispatch.check(delta.dim() == 3 and weight.dim() == 2, _NAME, "delta must be (B, N, K) and the weight (C, F)")
    batch, rows, kept = delta.shape
    groups = dispatch.groups_of(rows, group)
    dispatch.check(indices.shape == (batch, groups, kept), _NAME, f"indices must be ({batch}, {groups}, {kept})")
    expected = (batch, rows, weight.shape[0])
    dispatch.check(out_cache.shape == expected, _NAME, f"the cache must be {expected}")


@register.fake(_NAME)
def _(delta, weight, indices, out_cache, group, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, delta, weight, indices, out_cache, group)
    return None
