"""Which keys, or which neurons, each group keeps: the best scores, and some more at random."""

import torch
from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.select_columns import reference

_NAME = "select_columns"


def select_columns(scores: Tensor, seed: Tensor, keep: int, random: int, implementation: str = "auto") -> Tensor:
    """The columns of each row of `scores`: the `keep` largest, then `random` others by a counter-based hash.

    scores: (B, …, N) float32 (or float64), contiguous; all dimensions but the first and the last, flattened, number
    the groups. seed: 3 × int64 on the device of `scores`: step, layer, unused. `keep + random ≤ N`.
    Returns (B, …, keep + random) int32, contiguous, ascending, each column at most once. Ties go to the lower column;
    the random ones have the smallest `hash(step, layer, group, column)` of docs/architecture.md among those not kept,
    the same for every batch element, so a result depends on nothing but its arguments.
    """
    result: Tensor = _operator(scores, seed, keep, random, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor scores, Tensor seed, SymInt keep, SymInt random, str implementation) -> Tensor",
)
def _operator(scores, seed, keep, random, implementation):  # type: ignore[no-untyped-def]
    return dispatch.call(_NAME, implementation, reference.select_columns, _expect, scores, seed, keep, random)


def _expect(scores, seed, keep, random):  # type: ignore[no-untyped-def]
    columns = scores.shape[-1]
    dispatch.check(scores.dim() >= 2, _NAME, "scores must be (B, …, N)")
    dispatch.check(keep >= 0 and random >= 0, _NAME, f"counts must not be negative: {keep} and {random}")
    dispatch.check(0 < keep + random <= columns, _NAME, f"cannot keep {keep} + {random} of {columns} columns")
    dispatch.check(seed.dtype == torch.int64 and seed.numel() == 3, _NAME, "the seed must be 3 × int64")


@register.fake(_NAME)
def _(scores, seed, keep, random, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, scores, seed, keep, random)
    return scores.new_empty((*scores.shape[:-1], keep + random), dtype=torch.int32)
