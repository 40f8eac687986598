"""Tokens in another order."""

from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.reorder_tokens import reference

_NAME = "reorder_tokens"


def reorder_tokens(x: Tensor, order: Tensor, implementation: str = "auto") -> Tensor:
    """`x[:, order]`: x (B, L, …), any strides and dtype; order (L′) int64. Returns a new contiguous tensor."""
    result: Tensor = _operator(x, order, implementation)
    return result


@register.operator(_NAME, "(Tensor x, Tensor order, str implementation) -> Tensor")
def _operator(x, order, implementation):  # type: ignore[no-untyped-def]
    return dispatch.call(_NAME, implementation, reference.reorder_tokens, _expect, x, order)


def _expect(x, order):  # type: ignore[no-untyped-def]
    dispatch.check(x.dim() >= 2 and order.dim() == 1, _NAME, "x must be (B, L, …) and the order (L)")


@register.fake(_NAME)
def _(x, order, implementation):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], order.shape[0], *x.shape[2:]))
