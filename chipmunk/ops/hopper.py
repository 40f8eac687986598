"""What the kernels in Gluon share: the ring of tiles between warps with different jobs, and the parts of the work.

One warpgroup gathers tiles into a ring in shared memory (cp.async, completing on barriers), others multiply them. The
grid is persistent, so that the gathers for the next tile run beside the end of the last.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from chipmunk.ops import balance

synchronize = getattr(gl, "thread_barrier", None) or gl.barrier  # its name since Triton 3.7

# The same source, for the other compiler: how Gluon itself takes over functions of Triton's.
pieces = gluon.jit(balance.pieces.fn)
piece = gluon.jit(balance.piece.fn)


@gluon.jit
def next_slot(slot, phase, stages: gl.constexpr):
    """The next place in a ring, and the parity of its barrier."""
    wraps = slot == stages - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def release(barrier):
    """Tell the producer that all of this warpgroup has read a tile."""
    synchronize()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def place(tile, tokens, groups, row_tiles, group: gl.constexpr, columns: gl.constexpr):
    """As `balance.place`, for tiles of 128 rows in one band."""
    per_group: gl.constexpr = group // 128
    row_tile = tile % row_tiles
    list_number = row_tile // per_group
    in_batch = list_number % groups
    first_row = in_batch * group + (row_tile % per_group) * 128
    limit = gl.minimum(tokens, (in_batch + 1) * group)
    return (list_number // groups).to(gl.int64), list_number.to(gl.int64), first_row, limit, tile // row_tiles * columns
