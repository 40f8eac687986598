"""Which neurons of an MLP each group of rows computes anew: those whose means changed most, and some at random."""

import torch
from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.select_neurons import reference

_NAME = "select_neurons"


def select_neurons(
    new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int, implementation: str = "auto"
) -> Tensor:
    """The chosen neurons of each group; `means` takes the new means there.

    new, means: (B, G, P, R), the means of P parts of each group of rows through the R rows of fc1, one dtype; means is
    mutated. neurons: F, with R a multiple of it: rows j, F + j, … are those of neuron j. The score of a neuron is
    `|new − means|`, summed over its parts, then its rows. seed: 3 × int64, as for `select_columns`.
    Returns (B, G, keep + random) int32, ascending: what `select_columns` chooses of these scores.
    """
    result: Tensor = _operator(new, means, seed, neurons, keep, random, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor new, Tensor(a!) means, Tensor seed, SymInt neurons, SymInt keep, SymInt random, str implementation) "
    "-> Tensor",
)
def _operator(new, means, seed, neurons, keep, random, implementation):  # type: ignore[no-untyped-def]
    args = (new, means, seed, neurons, keep, random)
    return dispatch.call(_NAME, implementation, reference.select_neurons, _expect, *args)


def _expect(new, means, seed, neurons, keep, random):  # type: ignore[no-untyped-def]
    dispatch.check(new.dim() == 4, _NAME, "the means must be (B, G, P, R)")
    dispatch.check(new.shape == means.shape and new.dtype == means.dtype, _NAME, "new and means must be alike")
    dispatch.check(new.shape[3] % neurons == 0, _NAME, f"{new.shape[3]} rows are not those of {neurons} neurons")
    dispatch.check(keep >= 0 and random >= 0, _NAME, f"counts must not be negative: {keep} and {random}")
    dispatch.check(0 < keep + random <= neurons, _NAME, f"cannot keep {keep} + {random} of {neurons} neurons")
    dispatch.check(seed.dtype == torch.int64 and seed.numel() == 3, _NAME, "the seed must be 3 × int64")


@register.fake(_NAME)
def _(new, means, seed, neurons, keep, random, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, new, means, seed, neurons, keep, random)
    return new.new_empty((*new.shape[:2], keep + random), dtype=torch.int32)
