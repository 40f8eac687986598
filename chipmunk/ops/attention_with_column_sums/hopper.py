"""Column sums for Hopper (compute capability 9.0), in Gluon: a tile's product runs beside the last one's exponentials.

Scores are computed transposed, keys × queries, in two accumulators by turns. Key tiles come through a ring in shared
memory (cp.async), `stages` deep.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _copy(tile, k, first_key, tokens, stride, channel, lane):
    """Start copying keys first_key … into shared memory; past the end, the last key again (never stored)."""
    key = gl.minimum(first_key + lane, tokens - 1)
    async_copy.async_copy_global_to_shared(tile, k + (key[:, None] * stride + channel[None, :]))


@gluon.jit
def sums_kernel(
    q,
    k,
    lse,
    sums,
    heads,
    tokens,
    groups,
    tiles_a_split,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    group: gl.constexpr,
    parts: gl.constexpr,
    queries: gl.constexpr,
    tile: gl.constexpr,
    width: gl.constexpr,
    stages: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype.element_ty
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [num_warps, 1], [1, 0])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, queries, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)

    group_index = gl.program_id(0)
    head = gl.program_id(2)
    lse += head.to(gl.int64) * tokens
    sums += (head.to(gl.int64) * groups + group_index) * tokens
    batch = (head // heads).to(gl.int64)
    head = (head % heads).to(gl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    channel = gl.arange(0, width, layout=gl.SliceLayout(0, copied))
    lane = gl.arange(0, tile, layout=gl.SliceLayout(1, copied))
    row_lane = gl.arange(0, queries, layout=gl.SliceLayout(1, copied))
    first_key = gl.program_id(1) * tiles_a_split * tile
    end_key = gl.minimum(first_key + tiles_a_split * tile, tokens)
    count = (end_key - first_key + tile - 1) // tile

    q_tile = gl.allocate_shared_memory(dtype, [queries, width], shared)
    k_tiles = gl.allocate_shared_memory(dtype, [stages, tile, width], shared)
    zero = gl.zeros([tile, queries], gl.float32, layout)
    for part in gl.static_range(parts):
        first_row = group_index * group + part * queries
        row = gl.minimum(first_row + row_lane, tokens - 1)
        gl.thread_barrier()  # the last part's tiles have been read
        async_copy.async_copy_global_to_shared(q_tile, q + (row[:, None] * stride_qn + channel[None, :]))
        for ahead in gl.static_range(stages - 1):
            if ahead < count:
                _copy(k_tiles.index(ahead), k, first_key + ahead * tile, tokens, stride_kn, channel, lane)
            async_copy.commit_group()
        column = first_row + gl.arange(0, queries, layout=gl.SliceLayout(0, layout))
        offset = gl.load(lse + column, mask=column < tokens, other=float("inf")) * 1.4426950408889634
        key = first_key + gl.arange(0, tile, layout=gl.SliceLayout(1, layout))

        async_copy.wait_group(stages - 2)
        fence_async_shared()
        token = warpgroup_mma(k_tiles.index(0), q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(token,))
        slot = 1 % stages
        fill = stages - 1
        for index in range(count):
            if index + stages - 1 < count:
                _copy(k_tiles.index(fill), k, first_key + (index + stages - 1) * tile, tokens, stride_kn, channel, lane)
            async_copy.commit_group()
            # group index + 1 holds the next tile; in the last round there is none, and an old one is multiplied in vain
            async_copy.wait_group(stages - 2)
            fence_async_shared()
            token = warpgroup_mma(k_tiles.index(slot), q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            total = gl.sum(gl.exp2(scores * scale - offset[None, :]), 1)
            if part > 0:
                total += gl.load(sums + key, mask=key < end_key, other=0.0)
            gl.store(sums + key, total, mask=key < end_key)
            key += tile
            fill = gl.where(fill == stages - 1, 0, fill + 1)
            slot = gl.where(slot == stages - 1, 0, slot + 1)
            scores = warpgroup_mma_wait(0, deps=(token,))
