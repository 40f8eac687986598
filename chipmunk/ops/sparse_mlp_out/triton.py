"""fc2 gathered by neuron, added to the cached output, in one Triton kernel.

A tile is `rows` rows of one group × `columns` output channels; its steps go over the kept neurons, `depth` at a time,
whose indices are loaded one step ahead. Kept neurons ascend, so the programs that run at one time gather from the same
part of the weight, which stays in L2. The weight is fast when its transpose is contiguous (stride 1 along C). On
Hopper, `hopper.py` has the same in Gluon, for whole tiles.
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
from chipmunk.ops.balance import piece, pieces, place, split_columns, store_part, sum_of_parts
from chipmunk.ops.dispatch import groups_of
from chipmunk.ops.launch import launch

_CANDIDATES = [
    ({"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 3, "split": 4}, 160 << 10),
    ({"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3, "split": 2}, 98 << 10),
    ({"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 4, "split": 2}, 66 << 10),
    ({"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3, "split": 1}, 26 << 10),
]


def unsupported(delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if weight.dtype != delta.dtype:
        return f"delta in {delta.dtype}, weight in {weight.dtype}"
    if delta.numel() == 0:
        return "an empty input"
    if (
        max(
            delta.shape[1] * delta.stride(1), *(n * step for n, step in zip(weight.shape, weight.stride(), strict=True))
        )
        >= 2**31
    ):
        return "offsets past 32 bits"
    return tuning.device_reason(delta)


def sparse_mlp_out(delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int) -> None:
    """See `chipmunk.ops.sparse_mlp_out`."""
    run = partial(_run, delta, weight, indices, group=group)
    parameters = tuning.parameters(
        "sparse_mlp_out",
        "gluon" if _fits_hopper(delta, weight, group) else "",
        delta.device,
        _CANDIDATES,
        lambda p: run(out_cache=torch.empty_like(out_cache), parameters=p),
    )
    run(out_cache=out_cache, parameters=parameters)


def _fits_hopper(delta: Tensor, weight: Tensor, group: int) -> bool:
    """Whether `hopper.py` runs here, and takes these: whole tiles, rows that can be copied 16 bytes at a time."""
    return (
        tuning.gluon(delta.device)
        and group % 128 == 0
        and delta.shape[2] % 64 == 0
        and delta.stride() == (delta.shape[1] * delta.shape[2], delta.shape[2], 1)
        and weight.shape[0] % 384 == 0
        and weight.stride(0) == 1
        and weight.stride(1) % 16 == 0
        and tuning.aligned(delta, weight)
    )


def _run(
    delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int, parameters: tuning.Parameters
) -> None:
    if parameters.get("gluon"):
        _run_gluon(delta, weight, indices, out_cache, group, parameters)
        return
    tokens, kept = delta.shape[1:]
    width = weight.shape[0]
    columns, depth = parameters["columns"], parameters["depth"]
    tiles = balance.tiles(delta, group, width, columns, triton.cdiv(kept, depth), parameters)
    sums = tiles.share.workspace(tiles.rows * columns, delta)
    where = (tokens, width, tiles.groups, tiles.row_tiles, tiles.column_tiles, tiles.band)
    cut = (tiles.share.whole, tiles.share.left, tiles.share.parts)
    shape = {"group": group, "per_group": tiles.per_group, "rows": tiles.rows, "columns": columns}
    constants = {**shape, "split": parameters["split"]}
    launch(
        _kernel,
        (tiles.share.programs,),
        delta,
        weight,
        indices.contiguous(),
        out_cache,
        sums,
        *where,
        *cut,
        tiles.share.run,
        kept,
        *delta.stride(),
        *weight.stride(),
        *out_cache.stride(),
        **constants,
        whole_steps=kept % depth == 0,
        whole_columns=width % columns == 0,
        depth=depth,
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
    )
    if tiles.share.left:
        launch(
            _finish_kernel,
            (tiles.share.left, parameters["split"]),
            out_cache,
            sums,
            *where,
            *cut,
            *out_cache.stride(),
            **constants,
            num_warps=8,
        )


def _run_gluon(
    delta: Tensor, weight: Tensor, indices: Tensor, out_cache: Tensor, group: int, parameters: tuning.Parameters
) -> None:
    from chipmunk.ops.sparse_mlp_out.hopper import product_kernel

    batch, tokens, kept = delta.shape
    indices = indices.contiguous()
    blocks = parameters["blocks"]
    columns = blocks * 128
    groups, per_group = groups_of(tokens, group), group // 128
    row_tiles, column_tiles = batch * groups * per_group, weight.shape[0] // columns
    share = balance.share(row_tiles * column_tiles, kept // 64, tuning.multiprocessors(delta.device))
    sums = share.workspace(128 * columns, delta)
    cut = (share.whole, share.left, share.parts)
    launch(
        product_kernel,
        (share.programs,),
        delta,
        weight,
        indices,
        out_cache,
        sums,
        tokens,
        kept,
        groups,
        row_tiles,
        *cut,
        share.run,
        *delta.stride()[:2],
        weight.stride(1),
        *out_cache.stride(),
        group=group,
        blocks=blocks,
        stages=parameters["stages"],
        consumer_registers=224,
        producer_registers=56,
        num_warps=4,
    )
    if share.left:
        launch(
            _finish_kernel,
            (share.left, blocks),
            out_cache,
            sums,
            tokens,
            weight.shape[0],
            groups,
            row_tiles,
            column_tiles,
            row_tiles,
            *cut,
            *out_cache.stride(),
            group=group,
            per_group=per_group,
            rows=128,
            columns=columns,
            split=blocks,
            num_warps=8,
        )


@triton.jit
def _finish(
    acc, out, first_row, first_column, limit, width, stride_on, stride_oc, rows: tl.constexpr, columns: tl.constexpr
):
    """Add `columns` columns of a tile to the cached output."""
    row = first_row + tl.arange(0, rows)
    column = first_column + tl.arange(0, columns)
    mask = (row < limit)[:, None] & (column < width)[None, :]
    place = out + (row.to(tl.int64)[:, None] * stride_on + column[None, :] * stride_oc)
    acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    delta,
    weight,
    indices,
    out_cache,
    sums,
    tokens,
    width,
    groups,
    row_tiles,
    column_tiles,
    band,
    whole,
    left,
    parts,
    run,
    kept,
    stride_db,
    stride_dn,
    stride_dk,
    stride_wc,
    stride_wf,
    stride_ob,
    stride_on,
    stride_oc,
    group: tl.constexpr,
    per_group: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    split: tl.constexpr,
    whole_steps: tl.constexpr,
    whole_columns: tl.constexpr,
    depth: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(kept, depth)
    for number in range(pieces(program, programs, whole, left, parts)):
        tile, first, last, part = piece(number, program, programs, steps, whole, left, run)
        batch, list_number, first_row, limit, first_column = place(
            tile, tokens, groups, row_tiles, column_tiles, band, group, per_group, rows, columns
        )
        row = tl.minimum(first_row + tl.arange(0, rows), tokens - 1)  # rows past the end are computed, never stored
        column = first_column + tl.arange(0, columns)
        if not whole_columns:
            column = tl.minimum(column, width - 1)
        inner = tl.arange(0, depth)
        d_at = delta + batch * stride_db + (row[:, None] * stride_dn + inner[None, :] * stride_dk)
        d_at += first * depth * stride_dk
        w_at = weight + column[None, :] * stride_wc
        chosen = indices + list_number * kept + inner
        neuron = tl.load(chosen + first * depth, mask=inner < kept - first * depth, other=0)
        acc = tl.zeros((rows, columns), dtype=tl.float32)
        for step in range(first, last):
            if whole_steps:
                left_side = tl.load(d_at)
                right_side = tl.load(w_at + neuron[:, None] * stride_wf)
            else:
                inside = inner < kept - step * depth
                left_side = tl.load(d_at, mask=inside[None, :], other=0.0)
                right_side = tl.load(w_at + neuron[:, None] * stride_wf, mask=inside[:, None], other=0.0)
            neuron = tl.load(chosen + (step + 1) * depth, mask=inner < kept - (step + 1) * depth, other=0)
            acc = tl.dot(left_side, right_side, acc)
            d_at += depth * stride_dk

        if part < 0:
            out = out_cache + batch * stride_ob
            block: tl.constexpr = columns // split
            blocks = split_columns(acc, split)
            for index in tl.static_range(split):
                start = first_column + index * block
                _finish(blocks[index], out, first_row, start, limit, width, stride_on, stride_oc, rows, block)
        else:
            store_part(sums, acc, tile, whole, left, part)


@triton.jit
def _finish_kernel(
    out_cache,
    sums,
    tokens,
    width,
    groups,
    row_tiles,
    column_tiles,
    band,
    whole,
    left,
    parts,
    stride_ob,
    stride_on,
    stride_oc,
    group: tl.constexpr,
    per_group: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    split: tl.constexpr,
):
    tile = tl.program_id(0)
    block: tl.constexpr = columns // split
    batch, _, first_row, limit, first_column = place(
        whole + tile, tokens, groups, row_tiles, column_tiles, band, group, per_group, rows, columns
    )
    start = tl.program_id(1) * block
    total = sum_of_parts(sums, tile, left, parts, rows, columns, start, block)
    out = out_cache + batch * stride_ob
    _finish(total, out, first_row, first_column + start, limit, width, stride_on, stride_oc, rows, block)
