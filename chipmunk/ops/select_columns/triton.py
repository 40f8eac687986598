"""Selection in one Triton kernel, a program a row: no sort, no host synchronisation.

The k-th largest score is searched for among the scores' bits, mapped so that unsigned integers order as floats do. A
count over the row, held in registers, says on which side of a guess it lies, and the nearest value that occurs bounds
the rest; guesses interpolate between the counts, and every fourth halves. A running count then says for each column how
many chosen ones come before it: that is its place in the result, ascending for nothing. Ties go to the lower column.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.launch import launch

LONGEST = 131072


def unsupported(scores: Tensor, seed: Tensor, keep: int, random: int) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if scores.dtype != torch.float32:
        return f"scores in {scores.dtype}"
    if scores.shape[-1] > LONGEST:
        return f"rows longer than {LONGEST}"
    if scores.numel() == 0:
        return "an empty input"
    if scores.device.type == "cuda":
        return None if tuning.capability(scores.device) >= (8, 0) else "a GPU older than compute capability 8.0"
    return tuning.device_reason(scores)


def select_columns(scores: Tensor, seed: Tensor, keep: int, random: int) -> Tensor:
    """See `chipmunk.ops.select_columns`."""
    scores = scores.contiguous()
    columns = scores.shape[-1]
    rows = scores.numel() // columns
    indices = torch.empty(*scores.shape[:-1], keep + random, dtype=torch.int32, device=scores.device)
    padded = triton.next_power_of_2(columns)
    launch(
        _kernel,
        (rows,),
        scores,
        seed.contiguous(),
        indices,
        columns,
        keep,
        random,
        rows // scores.shape[0],
        padded=padded,
        has_best=keep > 0,
        has_random=random > 0,
        num_warps=warps(padded, rows),
    )
    return indices


def warps(padded: int, rows: int) -> int:
    """How many warps share a row of `padded` scores, where there are so many rows."""
    wanted = tuning.override.get("select_columns", {}).get("warps", 0)
    return wanted or min(max(padded // (1024 if rows < 256 else 2048), 4), 16)


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _largest(ordered, free, free_count, wanted):
    """Which of the `free` columns hold the `wanted` largest of unsigned integers, ties to the lower column."""
    ordered = tl.where(free, ordered, 0)  # never counted: every threshold below is above 0
    low = tl.min(tl.where(free, ordered, 0xFFFFFFFF), 0).to(tl.int64)
    high = tl.max(ordered, 0).to(tl.int64) + 1
    # At least `wanted` values reach low, fewer reach high; low and high − 1 are values that occur.
    reach_low = free_count
    reach_high = 0
    turn = 0
    while (high - low > 1) & (reach_low != wanted):
        share = (reach_low - wanted + 0.5) / (reach_low - reach_high).to(tl.float32)
        share = tl.where(turn % 4 == 3, 0.5, share)  # so that no distribution takes long
        middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reaches = ordered >= middle.to(tl.uint32)
        reach = tl.sum(reaches.to(tl.int32), 0)
        if reach >= wanted:
            low = tl.min(tl.where(reaches, ordered, 0xFFFFFFFF), 0).to(tl.int64)
            reach_low = reach
        else:
            high = tl.max(tl.where(reaches, 0, ordered), 0).to(tl.int64) + 1
            reach_high = reach
        turn += 1
    threshold = low.to(tl.uint32)
    chosen = (ordered >= threshold) & free
    if reach_low != wanted:  # several at the threshold itself
        equal = (ordered == threshold) & free
        rank = tl.cumsum(equal.to(tl.int32), 0)
        chosen = chosen & ((equal == 0) | (rank <= wanted - reach_high))
    return chosen


@triton.jit
def choose(score, column, seed, group, columns, keep, random, has_best: tl.constexpr, has_random: tl.constexpr):
    """Which columns of a row of scores are kept: the `keep` largest, and `random` more by the hash of the group."""
    inside = column < columns
    chosen = column < 0
    if has_best:
        bits = (score + 0.0).to(tl.uint32, bitcast=True)  # −0 is +0
        ordered = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)
        chosen = _largest(ordered, inside, columns, keep)
    if has_random:
        golden = tl.full((), 0x9E3779B9, tl.uint32)
        h = _mix(tl.load(seed).to(tl.uint32))
        h = _mix(tl.load(seed + 1).to(tl.uint32) + golden * h)
        h = _mix(group.to(tl.uint32) + golden * h)
        h = _mix(column.to(tl.uint32) + golden * h)
        free = inside & ~chosen
        chosen |= _largest(h ^ 0xFFFFFFFF, free, columns - keep, random)
    return chosen


@triton.jit
def put(indices, column, chosen):
    """Store the chosen columns, ascending."""
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(indices + place, column, mask=chosen)


@triton.jit
def _kernel(
    scores,
    seed,
    indices,
    columns,
    keep,
    random,
    groups,
    padded: tl.constexpr,
    has_best: tl.constexpr,
    has_random: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, padded)
    score = tl.zeros((padded,), tl.float32)
    if has_best:
        score = tl.load(scores + row.to(tl.int64) * columns + column, mask=column < columns, other=0.0)
    chosen = choose(score, column, seed, row % groups, columns, keep, random, has_best, has_random)
    put(indices + row.to(tl.int64) * (keep + random), column, chosen)
