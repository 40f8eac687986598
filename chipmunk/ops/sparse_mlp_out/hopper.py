"""fc2 gathered by neuron for Hopper (compute capability 9.0), in Gluon, where warps can be given different jobs.

What limits a gathered product is how fast the gathered rows come out of the L2 cache, so a tile is as wide as the
registers allow, 128 rows × `blocks` · 128 channels: each row of the weight that is read serves 128 rows of the product,
and each row of delta `blocks` · 128 channels. One warpgroup fills a ring of tiles in shared memory (cp.async,
completing on barriers); two others own 64 rows each. The grid is persistent and shared as `balance.py` says.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from chipmunk.ops.hopper import next_slot, piece, pieces, place, release


@gluon.jit
def _produce(
    tensors,
    sizes,
    cut,
    strides,
    ring,
    group: gl.constexpr,
    blocks: gl.constexpr,
    stages: gl.constexpr,
):
    delta, weight, indices = tensors
    tokens, kept, groups, row_tiles = sizes
    whole, left, parts, run = cut
    stride_db, stride_dn, stride_wf = strides
    a_tiles, b_tiles, full, empty = ring
    rows: gl.constexpr = 64
    depth: gl.constexpr = 64
    a_copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b_copy: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    a_row = gl.arange(0, rows, layout=gl.SliceLayout(1, a_copy))
    a_column = gl.arange(0, depth, layout=gl.SliceLayout(0, a_copy))[None, :]
    lane = gl.arange(0, depth, layout=gl.SliceLayout(1, b_copy))
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, b_copy))[None, :]
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    steps = kept // depth
    slot = 0
    phase = 1  # the tiles are empty at first
    for number in range(pieces(program, programs, whole, left, parts)):
        tile, first, last, _ = piece(number, program, programs, steps, whole, left, run)
        batch, list_number, first_row, _, first_column = place(tile, tokens, groups, row_tiles, group, blocks * 128)
        chosen = indices + list_number * kept
        low = gl.minimum(first_row + a_row, tokens - 1)  # rows past the end are computed, never stored
        high = gl.minimum(first_row + rows + a_row, tokens - 1)
        a_base = delta + batch * stride_db + first * depth
        b_base = weight + first_column
        neuron = gl.load(chosen + first * depth + lane)
        for step in range(first, last):
            after = gl.minimum((step + 1) * depth, kept - depth)
            next_neuron = gl.load(chosen + after + lane)
            mbarrier.wait(empty.index(slot), phase)
            async_copy.async_copy_global_to_shared(
                a_tiles.index(slot * 2), a_base + (low[:, None] * stride_dn + a_column)
            )
            async_copy.async_copy_global_to_shared(
                a_tiles.index(slot * 2 + 1), a_base + (high[:, None] * stride_dn + a_column)
            )
            for block in gl.static_range(blocks):
                async_copy.async_copy_global_to_shared(
                    b_tiles.index(slot * blocks + block),
                    b_base + (neuron[:, None] * stride_wf + (channel + block * 128)),
                )
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            neuron = next_neuron
            a_base += depth
            slot, phase = next_slot(slot, phase, stages)


@gluon.jit
def _finish(acc, out, row, column, limit, stride_on, stride_oc):
    """Add 128 channels of 64 rows to the cached output."""
    at = out + (row.to(gl.int64)[:, None] * stride_on + column[None, :] * stride_oc)
    inside = (row < limit)[:, None]
    acc += gl.load(at, mask=inside, other=0.0).to(gl.float32)
    gl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _consume(
    tensors,
    sizes,
    cut,
    strides,
    ring,
    which: gl.constexpr,
    group: gl.constexpr,
    blocks: gl.constexpr,
    stages: gl.constexpr,
):
    out, sums = tensors
    tokens, kept, groups, row_tiles = sizes
    whole, left, parts, run = cut
    stride_ob, stride_on, stride_oc = strides
    a_tiles, b_tiles, full, empty = ring
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    steps = kept // 64
    slot = 0
    phase = 0
    for number in range(pieces(program, programs, whole, left, parts)):
        tile, first, last, part = piece(number, program, programs, steps, whole, left, run)
        acc_0 = gl.zeros([64, 128], gl.float32, layout)
        acc_1 = gl.zeros([64, 128], gl.float32, layout)
        acc_2 = acc_1
        if blocks == 3:
            acc_2 = gl.zeros([64, 128], gl.float32, layout)
        for _ in range(first, last):
            mbarrier.wait(full.index(slot), phase)
            fence_async_shared()
            a = a_tiles.index(slot * 2 + which)
            token_0 = warpgroup_mma(a, b_tiles.index(slot * blocks), acc_0, is_async=True)
            token_1 = warpgroup_mma(a, b_tiles.index(slot * blocks + 1), acc_1, is_async=True)
            if blocks == 3:
                token_2 = warpgroup_mma(a, b_tiles.index(slot * blocks + 2), acc_2, is_async=True)
                acc_0, acc_1, acc_2 = warpgroup_mma_wait(0, deps=(token_0, token_1, token_2))
            else:
                acc_0, acc_1 = warpgroup_mma_wait(0, deps=(token_0, token_1))
            release(empty.index(slot))
            slot, phase = next_slot(slot, phase, stages)

        batch, _, first_row, limit, first_column = place(tile, tokens, groups, row_tiles, group, blocks * 128)
        in_tile = which * 64 + gl.arange(0, 64, layout=row_layout)
        channel = gl.arange(0, 128, layout=column_layout)
        if part < 0:
            result = out + batch * stride_ob
            row = first_row + in_tile
            _finish(acc_0, result, row, first_column + channel, limit, stride_on, stride_oc)
            _finish(acc_1, result, row, first_column + 128 + channel, limit, stride_on, stride_oc)
            if blocks == 3:
                _finish(acc_2, result, row, first_column + 256 + channel, limit, stride_on, stride_oc)
        else:
            at = sums + (part * left + tile - whole).to(gl.int64) * (128 * 128 * blocks)
            spot = in_tile[:, None] * (128 * blocks) + channel[None, :]
            gl.store(at + spot, acc_0)
            gl.store(at + spot + 128, acc_1)
            if blocks == 3:
                gl.store(at + spot + 256, acc_2)


@gluon.jit
def product_kernel(
    delta,
    weight,
    indices,
    out,
    sums,
    tokens,
    kept,
    groups,
    row_tiles,
    whole,
    left,
    parts,
    run,
    stride_db,
    stride_dn,
    stride_wf,
    stride_ob,
    stride_on,
    stride_oc,
    group: gl.constexpr,
    blocks: gl.constexpr,
    stages: gl.constexpr,
    consumer_registers: gl.constexpr,
    producer_registers: gl.constexpr,
):
    """See `chipmunk.ops.sparse_mlp_out`; to be launched with num_warps=4."""
    dtype: gl.constexpr = delta.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    a_tiles = gl.allocate_shared_memory(dtype, [2 * stages, 64, 64], shared)
    b_tiles = gl.allocate_shared_memory(dtype, [blocks * stages, 64, 128], shared)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=128)  # every thread of the producer
        mbarrier.init(empty.index(stage), count=2)

    ring = (a_tiles, b_tiles, full, empty)
    sizes = (tokens, kept, groups, row_tiles)
    cut = (whole, left, parts, run)
    results = (out, sums)
    out_strides = (stride_ob, stride_on, stride_oc)
    inputs = (delta, weight, indices)
    in_strides = (stride_db, stride_dn, stride_wf)
    gl.warp_specialize(
        [
            (_consume, (results, sizes, cut, out_strides, ring, 0, group, blocks, stages)),
            (_consume, (results, sizes, cut, out_strides, ring, 1, group, blocks, stages)),
            (_produce, (inputs, sizes, cut, in_strides, ring, group, blocks, stages)),
        ],
        [4, 4],
        [consumer_registers, producer_registers],
    )
