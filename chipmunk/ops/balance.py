"""How the gathered matrix products share their work between the multiprocessors.

A grid of whole tiles leaves most multiprocessors idle in its last round: 408 tiles on 132 of them take 4 rounds for 3.1
rounds of work. So the tiles that are left over after the full rounds are cut along their steps in equal parts, one for
each program; the parts' float32 sums go to a workspace, and a second, small kernel adds them up, in order, and finishes
the tiles. Results do not depend on timing.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.dispatch import groups_of
from chipmunk.ops.launch import empty

_FEWEST_STEPS = 6  # of a part: fewer do not pay for the sums' way through memory
_ONE_BAND, _BAND = 64 << 20, 40 << 20  # bytes, by a Hopper's 50 MiB of L2: docs/kernels.md has the times


@dataclass(frozen=True)
class Share:
    """How tiles of `steps` steps are shared by `programs` programs."""

    programs: int
    whole: int  # tiles 0 … whole − 1 are computed whole
    left: int  # tiles that are cut, the last ones
    parts: int  # into how many parts each
    run: int  # steps of a part, at most

    def workspace(self, tile_size: int, like: Tensor) -> Tensor:
        """The parts' sums: part, tile, element; float32, on the device of `like`."""
        return empty((max(self.left * self.parts * tile_size, 1),), like, dtype=torch.float32)


def share(tiles: int, steps: int, programs: int, balanced: bool = True) -> Share:
    """Deal out `tiles` tiles of `steps` steps; whole tiles only where cutting would not help, or without `balanced`."""
    left = tiles % programs
    parts = min(programs // left, steps // _FEWEST_STEPS) if left else 0
    if parts < 2 or not balanced:
        return Share(min(programs, tiles), tiles, 0, 0, steps)
    run = -(-steps // parts)
    return Share(programs, tiles - left, left, -(-steps // run), run)


@dataclass(frozen=True)
class Tiles:
    """How a product (B, N, columns) is laid out: what `place` is told, and who computes what."""

    rows: int  # of a tile: a group is a whole number of tiles, or a tile is of 16 rows
    groups: int  # of a batch element
    per_group: int  # tiles above one another
    row_tiles: int
    column_tiles: int
    band: int  # row tiles that go together
    share: Share


def tiles(x: Tensor, group: int, columns: int, tile_columns: int, steps: int, parameters: tuning.Parameters) -> Tiles:
    """Lay out a product of x (B, N, …), whose rows have `columns` results each, in tiles of `tile_columns`."""
    rows = parameters["rows"]
    while rows > 16 and group % rows:
        rows //= 2
    groups, per_group = groups_of(x.shape[1], group), groups_of(group, rows)
    row_tiles, column_tiles = x.shape[0] * groups * per_group, triton.cdiv(columns, tile_columns)
    programs = tuning.multiprocessors(x.device) * parameters.get("per_sm", 1)
    shared = share(row_tiles * column_tiles, steps, programs, bool(parameters.get("balanced", 1)))
    high = parameters.get("band") or band(row_tiles, rows * x.shape[2] * x.element_size())
    return Tiles(rows, groups, per_group, row_tiles, column_tiles, high, shared)


def band(row_tiles: int, size: int) -> int:
    """How many row tiles, of `size` bytes each of the left operand, go together: all, or as many as L2 keeps.

    Every column tile reads the rows of its band again, and every band reads the weight again.
    """
    bands = 1 if row_tiles * size <= _ONE_BAND else -(-row_tiles * size // _BAND)
    return -(-row_tiles // bands)


@triton.jit
def piece(number, program, programs, steps, whole, left, run):
    """Piece `number` of a program: its tile, its steps [first, last), and which part of the tile it is (−1: all)."""
    tile = program + number * programs
    cut = tile >= whole
    part = tl.where(cut, program // tl.maximum(left, 1), -1)
    first = tl.where(cut, part * run, 0)
    last = tl.where(cut, tl.minimum(first + run, steps), steps)
    return tl.where(cut, whole + program % tl.maximum(left, 1), tile), first, last, part


@triton.jit
def pieces(program, programs, whole, left, parts):
    """How many pieces a program has: whole tiles, then perhaps a part of one."""
    return (whole - program + programs - 1) // programs + tl.where(program < left * parts, 1, 0)


@triton.jit
def place(
    tile,
    tokens,
    groups,
    row_tiles,
    column_tiles,
    band,
    group: tl.constexpr,
    per_group: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """A tile's batch element, the number of its group's list, its first row, the end of its rows, its first column.

    Tiles come in bands of `band` row tiles; within a band the row tile runs first, then the column tile.
    """
    in_band = tile % (band * column_tiles)
    first = tile // (band * column_tiles) * band
    high = tl.minimum(row_tiles - first, band)
    row_tile, column_tile = first + in_band % high, in_band // high
    list_number = row_tile // per_group
    in_batch = list_number % groups
    first_row = in_batch * group + (row_tile % per_group) * rows
    limit = tl.minimum(tokens, (in_batch + 1) * group)
    return (list_number // groups).to(tl.int64), list_number.to(tl.int64), first_row, limit, column_tile * columns


@triton.jit
def split_columns(acc, split: tl.constexpr):
    """`acc` (rows, columns) as `split` (1, 2 or 4) blocks of columns, so that an epilogue needs few registers."""
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1]
    if split == 1:
        blocks = (acc,)
    else:
        low, high = acc.reshape(rows, 2, columns // 2).permute(0, 2, 1).split()
        if split == 2:
            blocks = (low, high)  # type: ignore[assignment]
        else:
            first, second = low.reshape(rows, 2, columns // 4).permute(0, 2, 1).split()
            third, fourth = high.reshape(rows, 2, columns // 4).permute(0, 2, 1).split()
            blocks = (first, second, third, fourth)  # type: ignore[assignment]
    return blocks


@triton.jit
def store_part(sums, acc, tile, whole, left, part):
    """Leave part `part` of tile `tile`, which is cut, to `sum_of_parts`. acc: (rows, columns) float32."""
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1]
    at = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(sums + (part * left + tile - whole).to(tl.int64) * (rows * columns) + at, acc)


@triton.jit
def sum_of_parts(sums, tile, left, parts, rows: tl.constexpr, columns: tl.constexpr, start, width: tl.constexpr):
    """Columns start … start + width − 1 of the `tile`-th cut tile, its parts added in order: (rows, width) float32."""
    spot = tl.arange(0, rows)[:, None] * columns + (start + tl.arange(0, width))[None, :]
    total = tl.zeros((rows, width), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * left + tile).to(tl.int64) * (rows * columns) + spot)
    return total
