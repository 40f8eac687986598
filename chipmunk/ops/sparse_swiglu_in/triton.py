"""Gate and value gathered by neuron, biases, SwiGLU, difference to the cache and cache update, in one Triton kernel.

A tile is `rows` rows of one group × `neurons` of its kept neurons, and computes twice as many columns: first the gates,
then the values, in one product, so that the activations are read once for both. Tiles are numbered neuron block first,
then group, as kept neurons ascend: the programs that run at one time gather from the same part of the weights.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import balance, tuning
from chipmunk.ops.balance import piece, pieces, place, split_columns, sum_of_parts
from chipmunk.ops.dispatch import groups_of
from chipmunk.ops.launch import launch

# `split`: into how many blocks of columns the epilogue cuts a tile's gates and its values (1 or 2).
_CANDIDATES = [
    ({"rows": 128, "neurons": 128, "depth": 64, "warps": 8, "stages": 3, "split": 2}, 160 << 10),
    ({"rows": 128, "neurons": 64, "depth": 64, "warps": 8, "stages": 3, "split": 1}, 98 << 10),
    ({"rows": 128, "neurons": 64, "depth": 32, "warps": 8, "stages": 4, "split": 1}, 66 << 10),
    ({"rows": 64, "neurons": 32, "depth": 32, "warps": 4, "stages": 3, "split": 1}, 26 << 10),
]


def unsupported(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    for weight in (gate, value, gate_bias, value_bias):
        if weight is not None and weight.dtype != x.dtype:
            return f"x in {x.dtype}, weight in {weight.dtype}"
    if gate.stride() != value.stride() or (gate_bias is not None and gate_bias.stride() != _stride_of(value_bias)):
        return "gate and value lie in memory in different ways"
    if x.numel() == 0:
        return "an empty input"
    if (
        max(x.shape[1] * x.stride(1), *(size * step for size, step in zip(gate.shape, gate.stride(), strict=True)))
        >= 2**31
    ):
        return "offsets past 32 bits"
    return tuning.device_reason(x)


def _stride_of(bias: Tensor | None) -> tuple[int, ...]:
    return () if bias is None else bias.stride()


def sparse_swiglu_in(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
) -> Tensor:
    """See `chipmunk.ops.sparse_swiglu_in`. Fastest with x, gate, value contiguous in C; act_cache with any strides."""
    run = partial(_run, x, gate, value, gate_bias, value_bias, indices, group=group)
    parameters = tuning.parameters(
        "sparse_swiglu_in",
        "",
        x.device,
        _CANDIDATES,
        lambda p: run(act_cache=torch.empty_like(act_cache), parameters=p),
    )
    return run(act_cache=act_cache, parameters=parameters)


def _run(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
    parameters: tuning.Parameters,
) -> Tensor:
    batch, tokens, width = x.shape
    kept = indices.shape[-1]
    indices = indices.contiguous()
    delta = torch.empty(batch, tokens, kept, dtype=x.dtype, device=x.device)
    rows, neurons, depth = parameters["rows"], parameters["neurons"], parameters["depth"]
    while rows > 16 and group % rows:
        rows //= 2
    groups, per_group = groups_of(tokens, group), groups_of(group, rows)
    row_tiles, column_tiles = batch * groups * per_group, triton.cdiv(kept, neurons)
    programs = tuning.multiprocessors(x.device) * parameters.get("per_sm", 1)
    steps = triton.cdiv(width, depth)
    share = balance.share(row_tiles * column_tiles, steps, programs, bool(parameters.get("balanced", 1)))
    sums = share.workspace(rows * 2 * neurons, x.device)
    where = (tokens, width, kept, groups, row_tiles, column_tiles, parameters.get("band", 0) or row_tiles)
    cut = (share.whole, share.left, share.parts)
    has_bias = gate_bias is not None and value_bias is not None
    biases = (gate_bias, value_bias) if has_bias else (x, x)
    tensors = (*biases, indices, act_cache, delta, sums)
    strides = (1 if gate_bias is None else gate_bias.stride(0), *act_cache.stride())
    shape = {"group": group, "per_group": per_group, "rows": rows, "neurons": neurons, "split": parameters["split"]}
    launch(
        _kernel,
        (share.programs,),
        x,
        gate,
        value,
        *tensors,
        *where,
        *cut,
        share.run,
        *x.stride(),
        *gate.stride(),
        *strides,
        **shape,
        has_bias=has_bias,
        whole_steps=width % depth == 0,
        depth=depth,
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
    )
    if share.left:
        launch(
            _finish_kernel,
            (share.left, parameters["split"]),
            *tensors,
            *where,
            *cut,
            *strides,
            **shape,
            has_bias=has_bias,
            num_warps=8,
        )
    return delta


@triton.jit
def _finish(
    gated,
    values,
    first_row,
    limit,
    first_column,
    kept,
    gate_bias,
    value_bias,
    chosen,
    cache,
    delta,
    stride_bias,
    stride_cn,
    stride_cf,
    rows: tl.constexpr,
    columns: tl.constexpr,
    has_bias: tl.constexpr,
):
    """Biases, SwiGLU, difference and both stores for `columns` neurons of a tile."""
    row = first_row + tl.arange(0, rows)
    column = first_column + tl.arange(0, columns)
    neuron = tl.load(chosen + column, mask=column < kept, other=0)
    if has_bias:
        gated += tl.load(gate_bias + neuron * stride_bias)[None, :].to(tl.float32)
        values += tl.load(value_bias + neuron * stride_bias)[None, :].to(tl.float32)
    new = gated / (1.0 + tl.exp2(-1.4426950408889634 * gated)) * values
    mask = (row < limit)[:, None] & (column < kept)[None, :]
    place = cache + (row[:, None] * stride_cn + neuron[None, :] * stride_cf)
    old = tl.load(place, mask=mask, other=0.0)
    new = new.to(old.dtype)
    tl.store(place, new, mask=mask)
    out = delta + (row[:, None] * kept + column[None, :])
    tl.store(out, (new.to(tl.float32) - old.to(tl.float32)).to(delta.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    x,
    gate,
    value,
    gate_bias,
    value_bias,
    indices,
    cache,
    delta,
    sums,
    tokens,
    width,
    kept,
    groups,
    row_tiles,
    column_tiles,
    band,
    whole,
    left,
    parts,
    run,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_wf,
    stride_wc,
    stride_bias,
    stride_cb,
    stride_cn,
    stride_cf,
    group: tl.constexpr,
    per_group: tl.constexpr,
    rows: tl.constexpr,
    neurons: tl.constexpr,
    split: tl.constexpr,
    has_bias: tl.constexpr,
    whole_steps: tl.constexpr,
    depth: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(width, depth)
    for number in range(pieces(program, programs, whole, left, parts)):
        tile, first, last, part = piece(number, program, programs, steps, whole, left, run)
        batch, list_number, first_row, limit, first_column = place(
            tile, tokens, groups, row_tiles, column_tiles, band, group, per_group, rows, neurons
        )
        chosen = indices + list_number * kept
        row = tl.minimum(first_row + tl.arange(0, rows), tokens - 1)  # rows past the end are computed, never stored
        both = tl.arange(0, 2 * neurons)  # the gates of the tile's neurons, then their values
        column = first_column + both % neurons
        neuron = tl.load(chosen + column, mask=column < kept, other=0)
        weight = tl.where(both < neurons, gate + neuron * stride_wf, value + neuron * stride_wf)
        inner = tl.arange(0, depth)
        x_at = x + batch * stride_xb + (row[:, None] * stride_xn + inner[None, :] * stride_xc)
        w_at = weight[:, None] + inner[None, :] * stride_wc
        x_at += first * depth * stride_xc
        w_at += first * depth * stride_wc
        acc = tl.zeros((rows, 2 * neurons), dtype=tl.float32)
        for step in range(first, last):
            if whole_steps:
                left_side = tl.load(x_at)
                right_side = tl.load(w_at)
            else:
                inside = (inner < width - step * depth)[None, :]
                left_side = tl.load(x_at, mask=inside, other=0.0)
                right_side = tl.load(w_at, mask=inside, other=0.0)
            acc = tl.dot(left_side, right_side.T, acc)
            x_at += depth * stride_xc
            w_at += depth * stride_wc

        if part < 0:
            cached = cache + batch * stride_cb
            out = delta + batch * tokens * kept
            block: tl.constexpr = neurons // split
            blocks = split_columns(acc, 2 * split)
            for index in tl.static_range(split):
                _finish(blocks[index], blocks[split + index], first_row, limit, first_column + index * block, kept,
                        gate_bias, value_bias, chosen, cached, out,
                        stride_bias, stride_cn, stride_cf, rows, block, has_bias)  # fmt: skip
        else:
            at = tl.arange(0, rows)[:, None] * (2 * neurons) + tl.arange(0, 2 * neurons)[None, :]
            tl.store(sums + (part * left + tile - whole).to(tl.int64) * (rows * 2 * neurons) + at, acc)


@triton.jit
def _finish_kernel(
    gate_bias,
    value_bias,
    indices,
    cache,
    delta,
    sums,
    tokens,
    width,
    kept,
    groups,
    row_tiles,
    column_tiles,
    band,
    whole,
    left,
    parts,
    stride_bias,
    stride_cb,
    stride_cn,
    stride_cf,
    group: tl.constexpr,
    per_group: tl.constexpr,
    rows: tl.constexpr,
    neurons: tl.constexpr,
    split: tl.constexpr,
    has_bias: tl.constexpr,
):
    tile = tl.program_id(0)
    block: tl.constexpr = neurons // split
    batch, list_number, first_row, limit, first_column = place(
        whole + tile, tokens, groups, row_tiles, column_tiles, band, group, per_group, rows, neurons
    )
    start = tl.program_id(1) * block
    gated = sum_of_parts(sums, tile, left, parts, rows, 2 * neurons, start, block)
    values = sum_of_parts(sums, tile, left, parts, rows, 2 * neurons, neurons + start, block)
    _finish(gated, values, first_row, limit, first_column + start, kept,
            gate_bias, value_bias, indices + list_number * kept,
            cache + batch * stride_cb, delta + batch * tokens * kept,
            stride_bias, stride_cn, stride_cf, rows, block, has_bias)  # fmt: skip
