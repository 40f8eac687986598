"""Column-sparse attention in one kernel: an online softmax over gathered keys, the addend joined at the end.

A program owns `rows` query rows of one group of one head and walks the group's list, `keys` at a time; the indices of
the next tile are loaded one step ahead of its keys. What `keys` does not divide is a narrower tile, the only one with a
mask; it comes first, for behind the loop it would make ptxas serialize the loop's products. On Hopper, `hopper.py` has
the same in Gluon for the group sizes that 64 divides.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.dispatch import groups_of
from chipmunk.ops.launch import empty, launch

_CANDIDATES = [
    ({"rows": 128, "keys": 64, "warps": 8, "stages": 2}, 100 << 10),
    ({"rows": 128, "keys": 128, "warps": 8, "stages": 2}, 164 << 10),
    ({"rows": 128, "keys": 64, "warps": 4, "stages": 2}, 100 << 10),
    ({"rows": 128, "keys": 32, "warps": 4, "stages": 2}, 66 << 10),
    ({"rows": 64, "keys": 32, "warps": 4, "stages": 2}, 50 << 10),
]


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, addend: Tensor | None, group: int, scale: float, subtract: bool
) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head dimension {q.shape[-1]} (64 and 128 only)"
    if group % 16:
        return f"query groups of {group} rows (multiples of 16 only)"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "q, k or v not contiguous in the head dimension"
    if max(q.shape[2] * t.stride(2) for t in (q, k, v)) >= 2**31:
        return "offsets past 32 bits"
    if q.shape[0] * q.shape[1] > 65535:
        return "more than 65535 heads in the batch"
    return tuning.device_reason(q)


def column_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, addend: Tensor | None, group: int, scale: float, subtract: bool
) -> Tensor:
    """See `chipmunk.ops.column_sparse_attention`."""
    run = partial(_run, q, k, v, indices, addend, group, scale, subtract)
    width = q.shape[-1]
    shape_class = f"{width}"
    if tuning.gluon(q.device) and group % 64 == 0 and width in (64, 128):
        shape_class += f" gluon {_consumers(group)}"
    return run(tuning.parameters("column_sparse_attention", shape_class, q.device, _CANDIDATES, run))


def _consumers(group: int) -> int:
    """How many blocks of 64 rows share the gathered keys on Hopper."""
    return 2 if group % 128 == 0 else 3 if group % 192 == 0 else 1


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    addend: Tensor | None,
    group: int,
    scale: float,
    subtract: bool,
    parameters: tuning.Parameters,
) -> Tensor:
    batch, heads, tokens, width = q.shape
    kept = indices.shape[-1]
    indices = indices.contiguous()
    out = empty((batch, heads, tokens, width), q, heads_last=True)
    added = out if addend is None else addend
    groups, keys = groups_of(tokens, group), parameters["keys"]
    tensors = (q, k, v, indices, added, out)
    scale *= 1.4426950408889634  # for powers of two
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *added.stride(), *out.stride()[:3])
    constants = {
        "sign": 0 if addend is None else (-1 if subtract else 1),
        "negate": addend is None and subtract,
        "keys": keys,
        "width": width,
    }
    if parameters.get("gluon"):
        from chipmunk.ops.column_sparse_attention.hopper import attention_kernel

        consumers = _consumers(group)
        parts = group // (64 * consumers)
        work = groups * parts * batch * heads
        registers = {1: (224, 56), 2: (224, 56), 3: (152, 56)}[consumers]
        launch(
            attention_kernel,
            (min(work, tuning.multiprocessors(q.device) * (2 if consumers == 1 else 1)),),
            *tensors,
            heads,
            tokens,
            groups,
            kept,
            groups * parts,
            work,
            scale,
            *strides,
            **constants,
            parts=parts,
            consumers=consumers,
            stages=parameters["stages"],
            consumer_registers=registers[0],
            producer_registers=registers[1],
            num_warps=4,
        )
        return out
    rows = parameters["rows"]
    while group % rows:
        rows //= 2
    parts = group // rows
    full, rest = divmod(kept, keys)
    launch(
        _kernel,
        (groups * parts, batch * heads),
        *tensors,
        heads,
        tokens,
        groups,
        kept,
        full,
        scale,
        *strides,
        **constants,
        parts=parts,
        rows=rows,
        rest=max(16, triton.next_power_of_2(rest)) if rest else 0,
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
        **({"maxnreg": parameters["registers"]} if parameters.get("registers") else {}),
    )
    return out


@triton.jit
def _attend(scores, v, acc, largest, total, scale):
    """One step of the online softmax: scores (rows, keys) against values (keys, width)."""
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_largest, total


@triton.jit
def _kernel(
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
    full,
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
    parts: tl.constexpr,
    sign: tl.constexpr,
    negate: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    rest: tl.constexpr,
    width: tl.constexpr,
):
    group = tl.program_id(0) // parts
    head = tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    chosen = indices + (head.to(tl.int64) * groups + group) * kept
    head = (head % heads).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    row_inside = (row < tokens)[:, None]
    channel = tl.arange(0, width)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh

    queries = tl.load(q + (row[:, None] * stride_qn + channel[None, :]), mask=row_inside, other=0.0)
    largest = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, width), tl.float32)
    if rest:
        last = full * keys + tl.arange(0, rest)
        inside = last < kept
        last_key = tl.load(chosen + last, mask=inside, other=0)[:, None]
        last_scores = tl.dot(queries, tl.load(k + (last_key * stride_kn + channel[None, :])).T)
        last_values = tl.load(v + (last_key * stride_vn + channel[None, :]))
        last_scores = tl.where(inside[None, :], last_scores, float("-inf"))
        acc, largest, total = _attend(last_scores, last_values, acc, largest, total, scale)

    lane = tl.arange(0, keys)
    key = tl.load(chosen + lane, mask=lane < kept, other=0)
    for step in range(full):
        key_rows = tl.load(k + (key[:, None] * stride_kn + channel[None, :]))
        values = tl.load(v + (key[:, None] * stride_vn + channel[None, :]))
        key = tl.load(chosen + (step + 1) * keys + lane, mask=lane < kept - (step + 1) * keys, other=0)
        acc, largest, total = _attend(tl.dot(queries, key_rows.T), values, acc, largest, total, scale)

    acc = acc / total[:, None]
    if negate:
        acc = -acc
    if sign != 0:
        addend += batch * stride_ab + head * stride_ah
        place = addend + (row.to(tl.int64)[:, None] * stride_an + channel[None, :] * stride_ad)
        added = tl.load(place, mask=row_inside, other=0.0).to(tl.float32)
        acc = added + acc if sign > 0 else added - acc
    out += batch * stride_ob + head * stride_oh
    place = out + (row.to(tl.int64)[:, None] * stride_on + channel[None, :])
    tl.store(place, acc.to(out.dtype.element_ty), mask=row_inside)
