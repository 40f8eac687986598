"""What the kernels of an MLP's first linear share: the product of gathered neurons, and the exchange with the cache.

With a gate each neuron has two rows, one in each of two weights, and a tile has as many columns of products more.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import balance, tuning
from chipmunk.ops.launch import empty, launch


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why x (B, N, C) and weight (F, C) cannot be multiplied in Triton; None where they can."""
    if x.numel() == 0:
        return "an empty input"
    sizes = (size * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    if max(x.shape[1] * x.stride(1), *sizes) >= 2**31:
        return "offsets past 32 bits"
    return tuning.device_reason(x)


def run(
    kernel: Any,
    finish_kernel: Any,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    indices: Tensor,
    act_cache: Tensor,
    group: int,
    parameters: tuning.Parameters,
    **constants: bool,
) -> Tensor:
    """Launch an operator's two kernels: on whole tiles, and on those that were cut. Returns delta (B, N, K).

    x: (B, N, C). weights: (F, C) each, and biases: (F,) each, of equal strides; no biases where the linear has none.
    indices: (B, G, K) int32. act_cache: (B, N, F), updated. constants: of the operator's own epilogue.
    """
    batch, tokens, width = x.shape
    kept, depth, split = indices.shape[-1], parameters["depth"], parameters["split"]
    delta = empty((batch, tokens, kept), x)
    tiles = balance.tiles(x, group, kept, parameters["neurons"], triton.cdiv(width, depth), parameters)
    sums = tiles.share.workspace(tiles.rows * len(weights) * parameters["neurons"], x)
    where = (tokens, width, kept, tiles.groups, tiles.row_tiles, tiles.column_tiles, tiles.band)
    cut = (tiles.share.whole, tiles.share.left, tiles.share.parts)
    tensors = (*(biases or len(weights) * (x,)), indices.contiguous(), act_cache, delta, sums)
    strides = (biases[0].stride(0) if biases else 1, *act_cache.stride())
    shape = {"group": group, "per_group": tiles.per_group, "rows": tiles.rows, "neurons": parameters["neurons"]}
    both = {**shape, "split": split, "has_bias": bool(biases), **constants}
    launch(
        kernel,
        (tiles.share.programs,),
        x,
        *weights,
        *tensors,
        *where,
        *cut,
        tiles.share.run,
        *x.stride(),
        *weights[0].stride(),
        *strides,
        **both,
        whole_steps=width % depth == 0,
        depth=depth,
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
    )
    if tiles.share.left:
        grid = (tiles.share.left, split)
        launch(finish_kernel, grid, *tensors, *where, *cut, *strides, **both, num_warps=8)
    return delta


@triton.jit
def gathered_product(
    x_at, w_at, acc, inner, first, last, width, stride_xc, stride_wc, whole_steps: tl.constexpr, depth: tl.constexpr
):
    """acc + steps first … last − 1 of x · weightᵀ, (rows, columns) float32.

    x_at (rows, depth), w_at (columns, depth): where step `first` of either begins; a weight's rows may lie anywhere.
    inner: 0 … depth − 1.
    """
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
    return acc


@triton.jit
def exchange(new, row, column, neuron, limit, kept, cache, delta, stride_cn, stride_cf):
    """Put new activations (rows, columns) float32 into the cache, and what they change into delta.

    Rows end before `limit`, columns before `kept`. The difference is of the rounded activations, as the cache holds
    them.
    """
    mask = (row < limit)[:, None] & (column < kept)[None, :]
    place = cache + (row[:, None] * stride_cn + neuron[None, :] * stride_cf)
    old = tl.load(place, mask=mask, other=0.0)
    new = new.to(old.dtype)
    tl.store(place, new, mask=mask)
    out = delta + (row[:, None] * kept + column[None, :])
    tl.store(out, (new.to(tl.float32) - old.to(tl.float32)).to(delta.dtype.element_ty), mask=mask)
