"""Selection in one Triton kernel, a program a row: no sort, no host synchronisation.

The k-th largest score is searched for among the scores' bits, mapped so that unsigned integers order as floats do. A
count over the row says on which side of a guess it lies; guesses interpolate between the counts, one in eight halves,
and one in eight moves the bounds to values that occur. Ties go to the lower column: which ones is found by a search
among their columns. The row stays in registers meanwhile, in two pieces, since a power of two that holds all of it may
be twice as long. What is chosen is then known from a score and its column alone: a last walk over the row stores it, in
ascending order, the place of each from a running count.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.dispatch import override
from chipmunk.ops.launch import empty, launch

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
    indices = empty((*scores.shape[:-1], keep + random), scores, dtype=torch.int32)
    head, tail, threads = pieces(columns, rows)
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
        head=head,
        tail=tail,
        tile=4 * threads,
        has_best=keep > 0,
        has_random=random > 0,
        num_warps=threads // 32,
    )
    return indices


def pieces(columns: int, rows: int) -> tuple[int, int, int]:
    """Lengths of the two powers of two that hold a row of `columns`, and how many threads share it, one of `rows`."""
    padded = triton.next_power_of_2(columns)
    wanted = override.get("select_columns", {}).get("warps", 0)
    few = rows < 256  # not enough to fill a GPU: more threads for each then
    threads = 32 * (wanted or min(max(padded // (1024 if few else 2048), 4), 16 if few else 8))
    head = max(padded // 2, 16)
    return head, max(triton.next_power_of_2(max(columns - head, 1)), min(head, 4 * threads)), threads


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _sum(head, tail):
    """Sum over both pieces."""
    length: tl.constexpr = tail.shape[0]
    return tl.sum(tl.sum(head.reshape(head.shape[0] // length, length), 0) + tail, 0)


@triton.jit
def _least(head, tail, bound):
    """The smallest value from `bound` on."""
    largest = 0xFFFFFFFF
    head = tl.min(tl.where(head >= bound, head, largest), 0)
    return tl.minimum(head, tl.min(tl.where(tail >= bound, tail, largest), 0)).to(tl.int64)


@triton.jit
def _greatest(head, tail, bound):
    """The largest value up to `bound`."""
    head = tl.max(tl.where(head <= bound, head, 0), 0)
    return tl.maximum(head, tl.max(tl.where(tail <= bound, tail, 0), 0)).to(tl.int64)


@triton.jit
def _search(head, tail, count, wanted):
    """Where the `wanted` largest of `count` unsigned integers begin; the pieces hold 0 where they hold none.

    Returns the smallest value from which on no more than necessary lie, how many lie there, and how many lie above it
    where these are too many: then the value occurs more than once.
    """
    low = _least(head, tail, 1)
    high = _greatest(head, tail, 0xFFFFFFFF) + 1
    reach_low = count  # at least `wanted` values reach low,
    reach_high = 0  # fewer reach high
    turn = 0
    while (high - low > 1) & (reach_low != wanted):
        if turn % 8 == 7:
            low = _least(head, tail, low.to(tl.uint32))
            high = _greatest(head, tail, (high - 1).to(tl.uint32)) + 1
        else:
            share = (reach_low - wanted + 0.5) / (reach_low - reach_high).to(tl.float32)
            share = tl.where(turn % 8 == 3, 0.5, share)  # so that no distribution takes long
            middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            guess = middle.to(tl.uint32)
            reach = _sum((head >= guess).to(tl.int32), (tail >= guess).to(tl.int32))
            enough = reach >= wanted
            low = tl.where(enough, middle, low)
            reach_low = tl.where(enough, reach, reach_low)
            high = tl.where(enough, high, middle)
            reach_high = tl.where(enough, reach_high, reach)
        turn += 1
    return low.to(tl.uint32), reach_low, reach_high


@triton.jit
def _bounds(head, tail, head_column, tail_column, count, wanted):
    """Value and column from which on the `wanted` largest lie; ties to the lower column."""
    value, reach, above = _search(head, tail, count, wanted)
    column = tl.full((), 0, tl.uint32)
    if reach != wanted:
        head = tl.where(head == value, _from_the_end(head_column), 0)
        tail = tl.where(tail == value, _from_the_end(tail_column), 0)
        column, _, _ = _search(head, tail, reach - above, wanted - above)
    return value, column


@triton.jit
def _from_the_end(column):
    return 0x7FFFFFFF - column.to(tl.uint32)


@triton.jit
def _reaches(value, column, least_value, least_column):
    return (value > least_value) | ((value == least_value) & (_from_the_end(column) >= least_column))


@triton.jit
def _ordered(score):
    """Unsigned integers from 1 on that are ordered as the scores are."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)  # −0 is +0
    return tl.maximum(bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000), 1)


@triton.jit
def _drawn(seed, group, column):
    """Unsigned integers from 1 on that are the larger the earlier a column is drawn."""
    golden = tl.full((), 0x9E3779B9, tl.uint32)
    h = _mix(tl.load(seed).to(tl.uint32))
    h = _mix(tl.load(seed + 1).to(tl.uint32) + golden * h)
    h = _mix(group.to(tl.uint32) + golden * h)
    return tl.maximum(_mix(column.to(tl.uint32) + golden * h) ^ 0xFFFFFFFF, 1)


@triton.jit
def choose(
    head,
    tail,
    head_column,
    tail_column,
    seed,
    group,
    columns,
    keep,
    random,
    has_best: tl.constexpr,
    has_random: tl.constexpr,
):
    """What decides for each column of a row of scores, in two pieces, whether it is kept: the `keep` largest scores,
    and `random` more by the hash of the group. `is_chosen` takes it."""
    value = tl.full((), 0xFFFFFFFF, tl.uint32)
    last = tl.full((), 0xFFFFFFFF, tl.uint32)
    hashed = value
    last_hashed = last
    head_inside = head_column < columns
    tail_inside = tail_column < columns
    if has_best:
        head = tl.where(head_inside, _ordered(head), 0)
        tail = tl.where(tail_inside, _ordered(tail), 0)
        value, last = _bounds(head, tail, head_column, tail_column, columns, keep)
        head_inside = head_inside & (_reaches(head, head_column, value, last) == 0)
        tail_inside = tail_inside & (_reaches(tail, tail_column, value, last) == 0)
    if has_random:
        head = tl.where(head_inside, _drawn(seed, group, head_column), 0)
        tail = tl.where(tail_inside, _drawn(seed, group, tail_column), 0)
        hashed, last_hashed = _bounds(head, tail, head_column, tail_column, columns - keep, random)
    return value, last, hashed, last_hashed


@triton.jit
def is_chosen(score, column, seed, group, bounds, has_best: tl.constexpr, has_random: tl.constexpr):
    """Whether `choose`, which said `bounds`, keeps a column with this score."""
    value, last, hashed, last_hashed = bounds
    chosen = column < 0
    if has_best:
        chosen |= _reaches(_ordered(score), column, value, last)
    if has_random:
        chosen |= _reaches(_drawn(seed, group, column), column, hashed, last_hashed)
    return chosen


@triton.jit
def put(indices, stored, column, chosen):
    """Store the chosen columns, ascending, after `stored` ones; returns how many there are now."""
    chosen = chosen.to(tl.int32)
    place = stored + tl.cumsum(chosen, 0) - 1
    tl.store(indices + place, column, mask=chosen != 0)
    return stored + tl.sum(chosen, 0)


@triton.jit
def _kernel(
    scores,
    seed,
    indices,
    columns,
    keep,
    random,
    groups,
    head: tl.constexpr,
    tail: tl.constexpr,
    tile: tl.constexpr,
    has_best: tl.constexpr,
    has_random: tl.constexpr,
):
    row = tl.program_id(0)
    group = row % groups
    scores += row.to(tl.int64) * columns
    indices += row.to(tl.int64) * (keep + random)
    head_column = tl.arange(0, head)
    tail_column = head + tl.arange(0, tail)
    head_score = tl.zeros((head,), tl.float32)
    tail_score = tl.zeros((tail,), tl.float32)
    if has_best:
        head_score = tl.load(scores + head_column, mask=head_column < columns, other=0.0)
        tail_score = tl.load(scores + tail_column, mask=tail_column < columns, other=0.0)
    bounds = choose(
        head_score, tail_score, head_column, tail_column, seed, group, columns, keep, random, has_best, has_random
    )
    stored = 0
    for first in range(0, columns, tile):
        column = first + tl.arange(0, tile)
        inside = column < columns
        score = tl.zeros((tile,), tl.float32)
        if has_best:
            score = tl.load(scores + column, mask=inside, other=0.0)
        chosen = inside & is_chosen(score, column, seed, group, bounds, has_best, has_random)
        stored = put(indices, stored, column, chosen)
