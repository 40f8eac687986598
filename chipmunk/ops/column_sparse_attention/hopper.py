"""Column-sparse attention for Hopper (compute capability 9.0), in Gluon, where warps can be given different jobs.

One warpgroup gathers keys and values into a ring of tiles in shared memory (cp.async, completing on barriers); one to
three others own 64 query rows each. These start the scores of tile j, then the values product of tile j − 1, and
compute the softmax of tile j while that product runs; since they do not wait for one another, one's softmax also runs
beside another's products. The grid is persistent: the gathers for the next rows start while the last ones are being
finished. The tile that is not full comes first, so that only the prologue masks.
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

from chipmunk.ops.hopper import next_slot, release, synchronize


@gluon.jit
def _list(indices, work, row_tiles, parts, groups, kept):
    """The head that a piece of work belongs to, and its list of keys."""
    head = work // row_tiles
    return head, indices + (head.to(gl.int64) * groups + (work % row_tiles) // parts) * kept


@gluon.jit
def _produce(
    tensors,
    sizes,
    strides,
    ring,
    parts: gl.constexpr,
    keys: gl.constexpr,
    width: gl.constexpr,
    stages: gl.constexpr,
):
    k, v, indices = tensors
    heads, groups, kept, row_tiles, work_count = sizes
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn = strides
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    channel = gl.arange(0, width, layout=gl.SliceLayout(0, copied))[None, :]
    lane = gl.arange(0, keys, layout=gl.SliceLayout(1, copied))
    tiles = (kept + keys - 1) // keys
    narrow = kept - (tiles - 1) * keys
    slot = 0
    phase = 1  # the tiles are empty at first
    for work in range(gl.program_id(0), work_count, gl.num_programs(0)):
        head, chosen = _list(indices, work, row_tiles, parts, groups, kept)
        key = gl.load(chosen + lane, mask=lane < narrow, other=0)
        batch = (head // heads).to(gl.int64)
        head = (head % heads).to(gl.int64)
        k_base = k + batch * stride_kb + head * stride_kh
        v_base = v + batch * stride_vb + head * stride_vh
        for tile in range(tiles):
            after = narrow + tile * keys
            next_key = gl.load(chosen + after + lane, mask=lane < kept - after, other=0)
            mbarrier.wait(k_empty.index(slot), phase)
            async_copy.async_copy_global_to_shared(k_tiles.index(slot), k_base + (key[:, None] * stride_kn + channel))
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
            mbarrier.wait(v_empty.index(slot), phase)
            async_copy.async_copy_global_to_shared(v_tiles.index(slot), v_base + (key[:, None] * stride_vn + channel))
            async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
            key = next_key
            slot, phase = next_slot(slot, phase, stages)


@gluon.jit
def _consume(
    tensors,
    sizes,
    strides,
    q_tile,
    ring,
    which: gl.constexpr,
    consumers: gl.constexpr,
    sign: gl.constexpr,
    negate: gl.constexpr,
    keys: gl.constexpr,
    width: gl.constexpr,
    stages: gl.constexpr,
):
    q, addend, out = tensors
    heads, tokens, kept, row_tiles, work_count, scale = sizes
    stride_qb, stride_qh, stride_qn, stride_ab, stride_ah, stride_an, stride_ad, stride_ob, stride_oh, stride_on = (
        strides
    )
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    dtype: gl.constexpr = q.dtype.element_ty
    rows: gl.constexpr = 64
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    tiles = (kept + keys - 1) // keys
    narrow = kept - (tiles - 1) * keys
    zero = gl.zeros([rows, keys], gl.float32, score_layout)
    inside = (gl.arange(0, keys, layout=gl.SliceLayout(0, score_layout)) < narrow)[None, :]
    slot = 0
    phase = 0
    for work in range(gl.program_id(0), work_count, gl.num_programs(0)):
        head = work // row_tiles
        first_row = ((work % row_tiles) * consumers + which) * rows
        batch = (head // heads).to(gl.int64)
        head = (head % heads).to(gl.int64)
        row = gl.minimum(first_row + gl.arange(0, rows, layout=gl.SliceLayout(1, loaded)), tokens - 1)
        channel = gl.arange(0, width, layout=gl.SliceLayout(0, loaded))
        at = q + (batch * stride_qb + head * stride_qh) + (row[:, None] * stride_qn + channel[None, :])
        q_tile.store(gl.load(at))
        fence_async_shared()
        synchronize()

        mbarrier.wait(k_full.index(slot), phase)
        fence_async_shared()
        token = warpgroup_mma(q_tile, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(token,))
        release(k_empty.index(slot))
        scores = gl.where(inside, scores, float("-inf"))
        largest = gl.max(scores, 1) * scale
        weights = gl.exp2(scores * scale - largest[:, None])
        total = gl.sum(weights, 1)
        weights_16 = gl.convert_layout(weights.to(dtype), weight_layout)
        acc = gl.zeros([rows, width], gl.float32, out_layout)
        v_slot = slot
        v_phase = phase
        slot, phase = next_slot(slot, phase, stages)
        for _ in range(1, tiles):
            mbarrier.wait(k_full.index(slot), phase)
            fence_async_shared()
            token = warpgroup_mma(q_tile, k_tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            fence_async_shared()
            acc_token = warpgroup_mma(weights_16, v_tiles.index(v_slot), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(token,))
            release(k_empty.index(slot))
            new_largest = gl.maximum(largest, gl.max(scores, 1) * scale)
            weights = gl.exp2(scores * scale - new_largest[:, None])
            shrink = gl.exp2(largest - new_largest)
            total = total * shrink + gl.sum(weights, 1)
            largest = new_largest
            acc = warpgroup_mma_wait(0, deps=(acc_token,))
            release(v_empty.index(v_slot))
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
            weights_16 = gl.convert_layout(weights.to(dtype), weight_layout)
            v_slot = slot
            v_phase = phase
            slot, phase = next_slot(slot, phase, stages)

        mbarrier.wait(v_full.index(v_slot), v_phase)
        fence_async_shared()
        acc_token = warpgroup_mma(weights_16, v_tiles.index(v_slot), acc, is_async=True)
        out_row = first_row + gl.arange(0, rows, layout=gl.SliceLayout(1, out_layout))
        out_channel = gl.arange(0, width, layout=gl.SliceLayout(0, out_layout))[None, :]
        row_inside = (out_row < tokens)[:, None]
        wide_row = out_row.to(gl.int64)[:, None]
        acc = warpgroup_mma_wait(0, deps=(acc_token,))
        release(v_empty.index(v_slot))
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
        if negate:
            acc = -acc
        if sign != 0:
            at = addend + (batch * stride_ab + head * stride_ah) + (wide_row * stride_an + out_channel * stride_ad)
            added = gl.load(at, mask=row_inside, other=0.0).to(gl.float32)
            if sign > 0:
                acc = added + acc
            else:
                acc = added - acc
        at = out + (batch * stride_ob + head * stride_oh) + (wide_row * stride_on + out_channel)
        gl.store(at, acc.to(dtype), mask=row_inside)


@gluon.jit
def attention_kernel(
    q,
    k,
    v,
    indices,
    addend,
    out,
    heads,
    tokens,
    groups,
    kept,
    row_tiles,
    work_count,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ab,
    stride_ah,
    stride_an,
    stride_ad,
    stride_ob,
    stride_oh,
    stride_on,
    parts: gl.constexpr,
    sign: gl.constexpr,
    negate: gl.constexpr,
    consumers: gl.constexpr,
    keys: gl.constexpr,
    width: gl.constexpr,
    stages: gl.constexpr,
    consumer_registers: gl.constexpr,
    producer_registers: gl.constexpr,
):
    """See `chipmunk.ops.column_sparse_attention`: 64 · `consumers` rows at a time; to be launched with num_warps=4."""
    dtype: gl.constexpr = q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tiles = gl.allocate_shared_memory(dtype, [consumers, 64, width], shared)
    k_tiles = gl.allocate_shared_memory(dtype, [stages, keys, width], shared)
    v_tiles = gl.allocate_shared_memory(dtype, [stages, keys, width], shared)
    k_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(k_full.index(stage), count=128)  # every thread of the producer
        mbarrier.init(v_full.index(stage), count=128)
        mbarrier.init(k_empty.index(stage), count=consumers)
        mbarrier.init(v_empty.index(stage), count=consumers)

    ring = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    kv = (k, v, indices)
    kv_sizes = (heads, groups, kept, row_tiles, work_count)
    kv_strides = (stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn)
    qo = (q, addend, out)
    qo_sizes = (heads, tokens, kept, row_tiles, work_count, scale)
    qo_strides = (
        stride_qb, stride_qh, stride_qn, stride_ab, stride_ah, stride_an, stride_ad, stride_ob, stride_oh, stride_on
    )  # fmt: skip
    # written out in the calls: a constant in a tuple that has a name becomes a run-time value
    q_0 = q_tiles.index(0)
    if consumers == 1:
        gl.warp_specialize(
            [
                (_consume, (qo, qo_sizes, qo_strides, q_0, ring, 0, consumers, sign, negate, keys, width, stages)),
                (_produce, (kv, kv_sizes, kv_strides, ring, parts, keys, width, stages)),
            ],
            [4],
            [producer_registers],
        )
    elif consumers == 2:
        q_1 = q_tiles.index(1)
        gl.warp_specialize(
            [
                (_consume, (qo, qo_sizes, qo_strides, q_0, ring, 0, consumers, sign, negate, keys, width, stages)),
                (_consume, (qo, qo_sizes, qo_strides, q_1, ring, 1, consumers, sign, negate, keys, width, stages)),
                (_produce, (kv, kv_sizes, kv_strides, ring, parts, keys, width, stages)),
            ],
            [4, 4],
            [consumer_registers, producer_registers],
        )
    else:
        q_1 = q_tiles.index(1)
        q_2 = q_tiles.index(2)
        gl.warp_specialize(
            [
                (_consume, (qo, qo_sizes, qo_strides, q_0, ring, 0, consumers, sign, negate, keys, width, stages)),
                (_consume, (qo, qo_sizes, qo_strides, q_1, ring, 1, consumers, sign, negate, keys, width, stages)),
                (_consume, (qo, qo_sizes, qo_strides, q_2, ring, 2, consumers, sign, negate, keys, width, stages)),
                (_produce, (kv, kv_sizes, kv_strides, ring, parts, keys, width, stages)),
            ],
            [4, 4, 4],
            [consumer_registers, consumer_registers, producer_registers],
        )
