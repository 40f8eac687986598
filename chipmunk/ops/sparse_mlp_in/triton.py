"""fc1 gathered by neuron, bias, activation, difference to the cache and cache update, in one Triton kernel.

A tile is `rows` rows of one group × `neurons` of its kept neurons. Tiles are numbered neuron block first, then group:
kept neurons ascend, so the programs that run at one time gather from the same part of the weight, which stays in L2.
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

_CANDIDATES = [
    ({"rows": 128, "neurons": 256, "depth": 64, "warps": 8, "stages": 3, "split": 4}, 160 << 10),
    ({"rows": 128, "neurons": 128, "depth": 64, "warps": 8, "stages": 3, "split": 2}, 98 << 10),
    ({"rows": 128, "neurons": 128, "depth": 32, "warps": 8, "stages": 4, "split": 2}, 66 << 10),
    ({"rows": 64, "neurons": 64, "depth": 32, "warps": 4, "stages": 3, "split": 1}, 26 << 10),
]


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, act_cache: Tensor, group: int, activation: str
) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"x in {x.dtype}, weight in {weight.dtype}"
    return first_linear.unsupported(x, weight)


def sparse_mlp_in(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, act_cache: Tensor, group: int, activation: str
) -> Tensor:
    """See `chipmunk.ops.sparse_mlp_in`. Fastest with x, weight contiguous in C; act_cache with any strides."""
    run = partial(_run, x, weight, bias, indices, group=group, activation=activation)
    parameters = tuning.parameters(
        "sparse_mlp_in", "", x.device, _CANDIDATES, lambda p: run(act_cache=torch.empty_like(act_cache), parameters=p)
    )
    return run(act_cache=act_cache, parameters=parameters)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
    activation: str,
    parameters: tuning.Parameters,
) -> Tensor:
    biases = () if bias is None else (bias,)
    tanh = activation == "gelu_tanh"
    return first_linear.run(
        _kernel, _finish_kernel, x, (weight,), biases, indices, act_cache, group, parameters, tanh=tanh
    )


@triton.jit
def _activation(h, tanh: tl.constexpr):
    if tanh:  # 0.5 h (1 + tanh u) = h · sigmoid(2u) with u = √(2/π) (h + 0.044715 h³)
        u = h * (1.5957691216057308 + 0.07135481282553501 * h * h)
        return h / (1.0 + tl.exp2(-1.4426950408889634 * u))
    return 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def _finish(
    acc,
    first_row,
    limit,
    first_column,
    kept,
    bias,
    chosen,
    cache,
    delta,
    stride_bias,
    stride_cn,
    stride_cf,
    rows: tl.constexpr,
    columns: tl.constexpr,
    has_bias: tl.constexpr,
    tanh: tl.constexpr,
):
    """Bias, activation, difference and both stores for `columns` neurons of a tile."""
    row = first_row + tl.arange(0, rows)
    column = first_column + tl.arange(0, columns)
    neuron = tl.load(chosen + column, mask=column < kept, other=0)
    if has_bias:
        acc += tl.load(bias + neuron * stride_bias)[None, :].to(tl.float32)
    new = _activation(acc, tanh)
    exchange(new, row, column, neuron, limit, kept, cache, delta, stride_cn, stride_cf)


@triton.jit
def _kernel(
    x,
    weight,
    bias,
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
    tanh: tl.constexpr,
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
        column = first_column + tl.arange(0, neurons)
        neuron = tl.load(chosen + column, mask=column < kept, other=0)
        inner = tl.arange(0, depth)
        x_at = x + batch * stride_xb + (row[:, None] * stride_xn + inner[None, :] * stride_xc)
        w_at = weight + (neuron[:, None] * stride_wf + inner[None, :] * stride_wc)
        x_at += first * depth * stride_xc
        w_at += first * depth * stride_wc
        acc = tl.zeros((rows, neurons), dtype=tl.float32)
        acc = gathered_product(x_at, w_at, acc, inner, first, last, width, stride_xc, stride_wc, whole_steps, depth)

        if part < 0:
            cached = cache + batch * stride_cb
            out = delta + batch * tokens * kept
            block: tl.constexpr = neurons // split
            blocks = split_columns(acc, split)
            for index in tl.static_range(split):
                _finish(blocks[index], first_row, limit, first_column + index * block, kept, bias, chosen, cached, out,
                        stride_bias, stride_cn, stride_cf, rows, block, has_bias, tanh)  # fmt: skip
        else:
            store_part(sums, acc, tile, whole, left, part)


@triton.jit
def _finish_kernel(
    bias,
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
    tanh: tl.constexpr,
):
    tile = tl.program_id(0)
    block: tl.constexpr = neurons // split
    batch, list_number, first_row, limit, first_column = place(
        whole + tile, tokens, groups, row_tiles, column_tiles, band, group, per_group, rows, neurons
    )
    start = tl.program_id(1) * block
    total = sum_of_parts(sums, tile, left, parts, rows, neurons, start, block)
    _finish(total, first_row, limit, first_column + start, kept, bias, indices + list_number * kept,
            cache + batch * stride_cb, delta + batch * tokens * kept,
            stride_bias, stride_cn, stride_cf, rows, block, has_bias, tanh)  # fmt: skip
