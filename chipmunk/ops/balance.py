"""How the gathered matrix products share their work: every program gets the same number of steps, to within one.

A grid of whole tiles leaves multiprocessors idle in its last round (408 tiles on 132 of them take 4 rounds for 3.1
rounds of work). So all but the last one to two rounds are whole tiles, and the steps of the tiles that remain are
dealt out in equal runs ("stream-K"). A program whose run covers part of a tile stores float32 partial sums; the program
that arrives last at a tile adds the parts in the order of the runs, whoever it is: results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEWEST_STEPS = 4  # of a run, so that the pipeline gets going


@dataclass(frozen=True)
class Share:
    """How `tiles` tiles of `steps` steps are shared by `programs` programs."""

    programs: int
    whole: int  # tiles 0 … whole − 1 are computed whole, in rounds of one tile a program
    run: int  # steps that each program takes of the rest, laid end to end

    def workspace(self, tiles: int, tile_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Partial sums, two slots a program (where its run begins, where it ends), and arrivals, zero, one a tile."""
        if self.run == 0:
            nothing = torch.empty(1, dtype=torch.float32, device=device)
            return nothing, nothing.view(torch.int32)
        partial = torch.empty(self.programs * 2 * tile_size, dtype=torch.float32, device=device)
        return partial, torch.zeros(tiles - self.whole, dtype=torch.int32, device=device)


def share(tiles: int, steps: int, programs: int, balanced: bool = True) -> Share:
    """Deal out `tiles` × `steps` steps. With `balanced` False, or where it would not help, in whole tiles only."""
    rounds, rest = divmod(tiles, programs)
    if rest == 0 or not balanced:
        return Share(min(programs, tiles), tiles, 0)
    whole = max(rounds - 1, 0) * programs
    remaining = (tiles - whole) * steps
    run = max(-(-remaining // programs), min(_FEWEST_STEPS, steps))
    return Share(programs if whole else -(-remaining // run), whole, run)


@triton.jit
def pieces(program, programs, tiles, steps, whole, run):
    """How many pieces of work a program has: whole tiles first, then the tiles that its run touches."""
    begin = program * run
    end = tl.minimum(begin + run, (tiles - whole) * steps)
    touched = tl.where(end > begin, (end + steps - 1) // steps - begin // steps, 0)
    mine = (whole - program + programs - 1) // programs
    return mine, mine + touched


@triton.jit
def piece(number, mine, program, programs, tiles, steps, whole, run):
    """Piece `number`: its tile and its range of steps [first, last)."""
    begin = program * run
    end = tl.minimum(begin + run, (tiles - whole) * steps)
    shared = begin // steps + number - mine
    is_whole = number < mine
    tile = tl.where(is_whole, program + number * programs, whole + shared)
    first = tl.where(is_whole, 0, tl.maximum(begin - shared * steps, 0))
    last = tl.where(is_whole, steps, tl.minimum(end - shared * steps, steps))
    return tile, first, last


@triton.jit
def slot(tile, contributor, steps, whole, run):
    """Where program `contributor` puts its part of a shared tile."""
    return 2 * contributor + tl.where((contributor * run) // steps == tile - whole, 0, 1)


@triton.jit
def contributors(tile, steps, whole, run):
    """The programs with a part of a shared tile: the first, and the one after the last."""
    start = (tile - whole) * steps
    return start // run, (start + steps - 1) // run + 1


@triton.jit
def arrive(arrivals, tile, whole, expected):
    """After this program's part of the tile is stored: True for the program that stored the last one."""
    tl.debug_barrier()  # every thread's part is written before one thread says so
    before = tl.atomic_add(arrivals + (tile - whole), 1, sem="acq_rel", scope="gpu")
    return before == expected - 1


@triton.jit
def split_columns(acc, split: tl.constexpr):
    """`acc` (rows, columns) as a tuple of `split` (1, 2 or 4) blocks of columns: an epilogue then needs few registers."""
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1]
    if split == 1:
        blocks = (acc,)
    else:
        low, high = acc.reshape(rows, 2, columns // 2).permute(0, 2, 1).split()
        if split == 2:
            blocks = (low, high)
        else:
            first, second = low.reshape(rows, 2, columns // 4).permute(0, 2, 1).split()
            third, fourth = high.reshape(rows, 2, columns // 4).permute(0, 2, 1).split()
            blocks = (first, second, third, fourth)
    return blocks
