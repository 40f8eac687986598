"""Dense attention by the fastest library kernel that returns the log-sum-exp, then the column sums in Triton.

The column sums need one more product of queries and keys, but no online softmax: with the log-sum-exp known, each
probability is one exponential. Scores are computed transposed, keys × queries, so that the sum over a group's rows runs
within a thread. A program owns `queries` query rows (whole groups, or a part of one) and walks a part of the keys;
several programs share a multiprocessor: one's exponentials run beside another's products. A product reads both of its
operands from shared memory, which is the limit: with the copies into it, 256 queries need a quarter less than 128.
Blocks of queries left over after the full rounds of programs are cut along the keys until they fill a round: that costs
only a further load of the queries. Every row is looked at: sums over some of the rows keep too little of the mass
(docs/kernels.md).
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.dispatch import groups_of
from chipmunk.ops.launch import is_ahead, launch

_CANDIDATES = [
    ({"queries": 256, "tile": 64, "warps": 4, "stages": 3, "splits": 2, "programs": 2}, 113 << 10),
    ({"queries": 128, "tile": 128, "warps": 8, "stages": 3, "splits": 2, "programs": 1}, 132 << 10),
    ({"queries": 128, "tile": 64, "warps": 4, "stages": 3, "splits": 2, "programs": 2}, 82 << 10),
    ({"queries": 64, "tile": 64, "warps": 4, "stages": 2, "splits": 2, "programs": 2}, 50 << 10),
]
_FEWEST_TILES = 3  # of keys in a part: fewer do not pay for loading the queries


def unsupported(q: Tensor, k: Tensor, v: Tensor, group: int, scale: float) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"head dimension {q.shape[-1]} (64 and 128 only)"
    if group % 16:
        return f"query groups of {group} rows (multiples of 16 only)"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "q, k or v not contiguous in the head dimension"
    if max(q.shape[2] * t.stride(2) for t in (q, k)) >= 2**31:
        return "offsets past 32 bits"
    if q.shape[0] * q.shape[1] > 65535:
        return "more than 65535 heads in the batch"
    return tuning.device_reason(q)


def attention_with_column_sums(q: Tensor, k: Tensor, v: Tensor, group: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `chipmunk.ops.attention_with_column_sums`."""
    out, lse = dense_attention(q, k, v, scale)
    run = partial(column_sums, q, k, lse, group, scale)
    return out, run(tuning.parameters("attention_with_column_sums", str(q.shape[-1]), q.device, _CANDIDATES, run))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention and its natural log-sum-exp (B, H, N) float32: cuDNN's, or else FlashAttention's."""
    batch, heads, tokens, width = q.shape
    if is_ahead():  # the library needs no compilation
        return torch.empty_like(q), torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if q.device.type != "cuda":  # Triton's interpreter: no library kernel returns the log-sum-exp there
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        out = torch.softmax(scores, -1) @ v.float()
        lse = torch.logsumexp(scores, -1)
    else:
        out, lse = _library(q, k, v, scale)
        lse = lse.reshape(-1)[: batch * heads * tokens].view(batch, heads, tokens) if lse.numel() else lse
    wanted = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    if out.stride() == wanted.stride() and out.dtype == q.dtype:
        return out, lse
    return wanted.copy_(out), lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # out, log-sum-exp; attn_bias None, compute_log_sumexp True, dropout 0, not causal, no debug mask
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    return found[0], found[1]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return found[0], found[1]


_without_cudnn: set[torch.device] = set()


def _library(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention by the first of cuDNN and FlashAttention that runs on this device."""
    if q.device not in _without_cudnn and torch.backends.cudnn.is_available():
        try:
            return _cudnn(q, k, v, scale)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _without_cudnn.add(q.device)  # this build of cuDNN has no attention for this GPU
    return _flash(q, k, v, scale)


def column_sums(q: Tensor, k: Tensor, lse: Tensor, group: int, scale: float, parameters: tuning.Parameters) -> Tensor:
    """Sums of exp(scale · q kᵀ − lse) over each group of rows: (B, H, ceil(N / group), N) float32."""
    batch, heads, tokens, width = q.shape
    groups = groups_of(tokens, group)
    sums = torch.empty(batch, heads, groups, tokens, dtype=torch.float32, device=q.device)
    tile, queries = parameters["tile"], parameters["queries"]
    while queries > group and queries % group:
        queries //= 2  # a block of whole groups,
    while queries < group and group % queries:
        queries //= 2  # or a part of one
    together, parts = max(queries // group, 1), max(group // queries, 1)
    blocks, tiles = triton.cdiv(tokens, together * group), triton.cdiv(tokens, tile)
    total = blocks * batch * heads
    slots = tuning.multiprocessors(q.device) * parameters["programs"]
    run, splits = _cut(tiles, min(parameters["splits"], tiles))
    whole = total * splits // slots * slots // splits  # blocks in full rounds of programs; the others are cut further
    cut_run, cut = _cut(tiles, max(min(slots // max(total - whole, 1), tiles // _FEWEST_TILES), 1))
    launch(
        _kernel,
        (whole * splits + (total - whole) * cut,),
        q,
        k,
        lse,
        sums,
        heads,
        tokens,
        groups,
        blocks,
        whole,
        splits,
        run,
        cut,
        cut_run,
        scale * 1.4426950408889634,  # for powers of two
        *q.stride()[:3],
        *k.stride()[:3],
        group=group,
        together=together,
        parts=parts,
        queries=queries,
        tile=tile,
        width=width,
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
    )
    return sums


def _cut(tiles: int, parts: int) -> tuple[int, int]:
    """The length of a part, and how many there are, when `tiles` are cut into `parts` equal parts at most."""
    run = triton.cdiv(tiles, parts)
    return run, triton.cdiv(tiles, run)


@triton.jit
def _store(p, sums, key, tokens, groups, together: tl.constexpr, add: tl.constexpr):
    """Sum probabilities (keys, queries) over each group's queries, and add them to those of the group's other parts."""
    keys: tl.constexpr = p.shape[0]
    inside = key < tokens
    if together == 1:
        total = tl.sum(p, 1)
        if add:
            total += tl.load(sums + key, mask=inside, other=0.0)
        tl.store(sums + key, total, mask=inside)
    else:
        member = tl.arange(0, together)
        total = tl.sum(p.reshape(keys, together, p.shape[1] // together), 2)
        tl.store(
            sums + (member[None, :] * tokens + key[:, None]), total, mask=inside[:, None] & (member < groups)[None, :]
        )


@triton.jit
def _kernel(
    q,
    k,
    lse,
    sums,
    heads,
    tokens,
    groups,
    blocks,
    whole,
    splits,
    run,
    cut,
    cut_run,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    group: tl.constexpr,
    together: tl.constexpr,
    parts: tl.constexpr,
    queries: tl.constexpr,
    tile: tl.constexpr,
    width: tl.constexpr,
):
    program = tl.program_id(0)
    rest = program - whole * splits
    block = tl.where(rest < 0, program // splits, whole + rest // cut)
    run = tl.where(rest < 0, run, cut_run)
    first_key = tl.where(rest < 0, program % splits, rest % cut) * run * tile
    end_key = tl.minimum(first_key + run * tile, tokens)
    head = block // blocks
    first_group = block % blocks * together
    lse += head.to(tl.int64) * tokens
    sums += (head.to(tl.int64) * groups + first_group) * tokens
    batch = (head // heads).to(tl.int64)
    head = (head % heads).to(tl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head * stride_kh
    channel = tl.arange(0, width)
    lane = tl.arange(0, tile)
    last_key = first_key + (end_key - first_key) // tile * tile  # where the tile that is not full begins
    for part in tl.static_range(parts):
        row = first_group * group + part * queries + tl.arange(0, queries)
        inside = row < tokens
        at = q + (row[:, None] * stride_qn + channel[None, :])
        rows = tl.load(at, mask=inside[:, None], other=0.0)
        offset = tl.load(lse + row, mask=inside, other=float("inf")) * 1.4426950408889634
        if last_key < end_key:  # before the loop: behind it, ptxas would serialize the loop's products
            last = tl.minimum(last_key + lane, tokens - 1)
            last_keys = tl.load(k + (last[:, None] * stride_kn + channel[None, :]))
            last_p = tl.exp2(tl.dot(last_keys, rows.T) * scale - offset[None, :])
            _store(last_p, sums, last_key + lane, tokens, groups - first_group, together, part > 0)
        k_at = k + ((first_key + lane)[:, None] * stride_kn + channel[None, :])
        for start in range(first_key, last_key, tile):
            p = tl.exp2(tl.dot(tl.load(k_at), rows.T) * scale - offset[None, :])
            _store(p, sums, start + lane, tokens, groups - first_group, together, part > 0)
            k_at += tile * stride_kn
