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

from chipmunk.ops import first_linear, tuning
from chipmunk.ops.balance import piece, pieces, place, split_columns, store_part, sum_of_parts
from chipmunk.ops.first_linear import exchange, gathered_product

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
    return first_linear.unsupported(x, gate)


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
    biases = () if gate_bias is None or value_bias is None else (gate_bias, value_bias)
    return first_linear.run(_kernel, _finish_kernel, x, (gate, value), biases, indices, act_cache, group, parameters)


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
    exchange(new, row, column, neuron, limit, kept, cache, delta, stride_cn, stride_cf)


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
        acc = gathered_product(x_at, w_at, acc, inner, first, last, width, stride_xc, stride_wc, whole_steps, depth)

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
            store_part(sums, acc, tile, whole, left, part)


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
