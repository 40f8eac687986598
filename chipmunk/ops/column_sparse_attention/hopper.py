"""Column-sparse attention for Hopper (compute capability 9.0), in Gluon, where the order of the steps is ours.

In Triton's own loop the tensor cores wait for each softmax. Here a step starts the scores of tile j and then the values
product of tile j − 1, and computes the softmax of tile j while that product runs; gathers of later tiles (cp.async) are
in flight all the time. The tile that is not full comes first, so that only the prologue masks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _copy(tile, base, key, stride, channel):
    """Start gathering rows `key` of (N, width) into shared memory."""
    async_copy.async_copy_global_to_shared(tile, base + (key[:, None] * stride + channel[None, :]))


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
    rows: gl.constexpr,
    keys: gl.constexpr,
    width: gl.constexpr,
    stages: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype.element_ty
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [num_warps, 1], [1, 0])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, keys, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, width, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)

    group = gl.program_id(0) // parts
    head = gl.program_id(1)
    batch = (head // heads).to(gl.int64)
    chosen = indices + (head.to(gl.int64) * groups + group) * kept
    head = (head % heads).to(gl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    channel = gl.arange(0, width, layout=gl.SliceLayout(0, copied))
    lane = gl.arange(0, keys, layout=gl.SliceLayout(1, copied))
    tiles = (kept + keys - 1) // keys
    narrow = kept - (tiles - 1) * keys  # keys in the first tile; tile t > 0 starts at narrow + (t − 1) · keys

    q_tile = gl.allocate_shared_memory(dtype, [rows, width], shared)
    k_tiles = gl.allocate_shared_memory(dtype, [stages, keys, width], shared)
    v_tiles = gl.allocate_shared_memory(dtype, [stages, keys, width], shared)

    row = gl.program_id(0) * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, copied))
    at = q + (gl.minimum(row, tokens - 1)[:, None] * stride_qn + channel[None, :])
    async_copy.async_copy_global_to_shared(q_tile, at)
    key = gl.load(chosen + lane, mask=lane < narrow, other=0)
    value_key = key
    for tile in gl.static_range(stages - 1):  # group i: the keys of tile i, the values of tile i − 1
        if tile < tiles:
            _copy(k_tiles.index(tile), k, key, stride_kn, channel)
        if tile > 0:  # noqa: SIM102  known when compiled; the inner one when run
            if tile <= tiles:
                _copy(v_tiles.index(tile - 1), v, value_key, stride_vn, channel)
        async_copy.commit_group()
        value_key = key
        key = gl.load(chosen + narrow + tile * keys + lane, mask=lane < kept - narrow - tile * keys, other=0)

    # tile 0: scores and softmax only
    async_copy.wait_group(stages - 2)
    fence_async_shared()
    zero = gl.zeros([rows, keys], gl.float32, score_layout)
    token = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    if stages - 1 < tiles:
        _copy(k_tiles.index(stages - 1), k, key, stride_kn, channel)
    if stages - 2 < tiles:
        _copy(v_tiles.index(stages - 2), v, value_key, stride_vn, channel)
    async_copy.commit_group()
    value_key = key
    key = gl.load(
        chosen + narrow + (stages - 1) * keys + lane, mask=lane < kept - narrow - (stages - 1) * keys, other=0
    )
    scores = warpgroup_mma_wait(0, deps=(token,))
    inside = gl.arange(0, keys, layout=gl.SliceLayout(0, score_layout)) < narrow
    scores = gl.where(inside[None, :], scores, float("-inf"))
    largest = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - largest[:, None])
    total = gl.sum(weights, 1)
    weights_16 = gl.convert_layout(weights.to(dtype), weight_layout)
    acc = gl.zeros([rows, width], gl.float32, out_layout)

    k_slot = 1 % stages
    v_slot = 0
    fill_k = 0  # the slot that tile + stages − 1 goes to
    for tile in range(1, tiles):
        async_copy.wait_group(stages - 2)
        fence_async_shared()
        token = warpgroup_mma(q_tile, k_tiles.index(k_slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        acc_token = warpgroup_mma(weights_16, v_tiles.index(v_slot), acc, is_async=True)
        if tile + stages - 1 < tiles:
            _copy(k_tiles.index(fill_k), k, key, stride_kn, channel)
        if tile + stages - 2 < tiles:
            _copy(v_tiles.index(gl.where(fill_k == 0, stages - 1, fill_k - 1)), v, value_key, stride_vn, channel)
        async_copy.commit_group()
        value_key = key
        ahead = narrow + (tile + stages - 1) * keys
        key = gl.load(chosen + ahead + lane, mask=lane < kept - ahead, other=0)

        scores = warpgroup_mma_wait(1, deps=(token,))
        new_largest = gl.maximum(largest, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - new_largest[:, None])
        shrink = gl.exp2(largest - new_largest)
        total = total * shrink + gl.sum(weights, 1)
        largest = new_largest
        acc = warpgroup_mma_wait(0, deps=(acc_token,))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
        weights_16 = gl.convert_layout(weights.to(dtype), weight_layout)
        v_slot = k_slot
        fill_k = k_slot
        k_slot = gl.where(k_slot == stages - 1, 0, k_slot + 1)

    async_copy.wait_group(0)
    fence_async_shared()
    acc_token = warpgroup_mma(weights_16, v_tiles.index(v_slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))

    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
    if negate:
        acc = -acc
    row = gl.program_id(0) * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, out_layout))
    channel_out = gl.arange(0, width, layout=gl.SliceLayout(0, out_layout))
    row_inside = (row < tokens)[:, None]
    if sign != 0:
        addend += batch * stride_ab + head * stride_ah
        at = addend + (row.to(gl.int64)[:, None] * stride_an + channel_out[None, :] * stride_ad)
        added = gl.load(at, mask=row_inside, other=0.0).to(gl.float32)
        if sign > 0:
            acc = added + acc
        else:
            acc = added - acc
    out += batch * stride_ob + head * stride_oh
    at = out + (row.to(gl.int64)[:, None] * stride_on + channel_out[None, :])
    gl.store(at, acc.to(dtype), mask=row_inside)
