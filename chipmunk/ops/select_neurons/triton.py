"""Scores, selection and the refreshed means in one Triton kernel, a program a group of rows.

A row of scores stays in registers from the means it is made of to the choice; `select_columns` says how that is found.
The last walk over the row, which stores the choice, also refreshes the cached means of what is chosen.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.launch import empty, launch
from chipmunk.ops.select_columns.triton import LONGEST, choose, is_chosen, pieces, put

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if new.dtype not in _DTYPES:
        return f"means in {new.dtype}"
    if neurons > LONGEST:
        return f"more than {LONGEST} neurons"
    if not means.is_contiguous():
        return "cached means that are not contiguous"
    if new.numel() == 0:
        return "an empty input"
    if new.device.type == "cuda":
        return None if tuning.capability(new.device) >= (8, 0) else "a GPU older than compute capability 8.0"
    return tuning.device_reason(new)


def select_neurons(new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int) -> Tensor:
    """See `chipmunk.ops.select_neurons`."""
    batch, groups, parts, rows = new.shape
    indices = empty((batch, groups, keep + random), new, dtype=torch.int32)
    head, tail, threads = pieces(neurons, batch * groups)
    launch(
        _kernel,
        (batch * groups,),
        new.contiguous(),
        means,
        seed.contiguous(),
        indices,
        neurons,
        keep,
        random,
        groups,
        parts=parts,
        rows=rows // neurons,
        head=head,
        tail=tail,
        tile=4 * threads,
        has_best=keep > 0,
        has_random=random > 0,
        num_warps=threads // 32,
    )
    return indices


@triton.jit
def _score(new, means, neuron, neurons, parts: tl.constexpr, rows: tl.constexpr):
    """How much the means of these neurons changed, over all parts and rows."""
    inside = neuron < neurons
    score = tl.zeros(neuron.shape, tl.float32)
    for row in tl.static_range(rows):
        of_row = tl.zeros(neuron.shape, tl.float32)
        for part in tl.static_range(parts):
            at = (part * rows + row) * neurons + neuron
            changed = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
            of_row += tl.abs(changed - tl.load(means + at, mask=inside, other=0.0).to(tl.float32))
        score += of_row
    return score


@triton.jit
def _kernel(
    new,
    means,
    seed,
    indices,
    neurons,
    keep,
    random,
    groups,
    parts: tl.constexpr,
    rows: tl.constexpr,
    head: tl.constexpr,
    tail: tl.constexpr,
    tile: tl.constexpr,
    has_best: tl.constexpr,
    has_random: tl.constexpr,
):
    list_number = tl.program_id(0)
    group = list_number % groups
    new += list_number.to(tl.int64) * (parts * rows) * neurons
    means += list_number.to(tl.int64) * (parts * rows) * neurons
    indices += list_number.to(tl.int64) * (keep + random)
    head_neuron = tl.arange(0, head)
    tail_neuron = head + tl.arange(0, tail)
    head_score = _score(new, means, head_neuron, neurons, parts, rows)
    tail_score = _score(new, means, tail_neuron, neurons, parts, rows)
    bounds = choose(
        head_score, tail_score, head_neuron, tail_neuron, seed, group, neurons, keep, random, has_best, has_random
    )
    stored = 0
    for first in range(0, neurons, tile):
        neuron = first + tl.arange(0, tile)
        score = _score(new, means, neuron, neurons, parts, rows)
        chosen = (neuron < neurons) & is_chosen(score, neuron, seed, group, bounds, has_best, has_random)
        stored = put(indices, stored, neuron, chosen)
        for index in tl.static_range(parts * rows):
            at = index * neurons + neuron
            tl.store(means + at, tl.load(new + at, mask=chosen, other=0.0), mask=chosen)
