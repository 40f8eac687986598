"""Scores, selection and the refreshed means in one Triton kernel, a program a group of rows.

A row of scores stays in registers from the means it is made of to the choice; `select_columns` says how that is found.
"""

# The kernels are in Triton's language, which has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk.ops import tuning
from chipmunk.ops.launch import launch
from chipmunk.ops.select_columns.triton import LONGEST, choose, put, warps

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int) -> str | None:
    """Why this call cannot run in Triton; None where it can."""
    if new.dtype not in _DTYPES:
        return f"means in {new.dtype}"
    if neurons > LONGEST:
        return f"more than {LONGEST} neurons"
    if not means.is_contiguous():
        return "cached means that are not contiguous"
    if new.numel() == 0:
        return "an empty input"
    if new.device.type == "cuda":
        return None if tuning.capability(new.device) >= (8, 0) else "a GPU older than compute capability 8.0"
    return tuning.device_reason(new)


def select_neurons(new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int) -> Tensor:
    """See `chipmunk.ops.select_neurons`."""
    batch, groups, parts, rows = new.shape
    indices = torch.empty(batch, groups, keep + random, dtype=torch.int32, device=new.device)
    padded = triton.next_power_of_2(neurons)
    launch(
        _kernel,
        (batch * groups,),
        new.contiguous(),
        means,
        seed.contiguous(),
        indices,
        neurons,
        keep,
        random,
        groups,
        parts=parts,
        rows=rows // neurons,
        padded=padded,
        has_best=keep > 0,
        has_random=random > 0,
        num_warps=warps(padded, batch * groups),
    )
    return indices


@triton.jit
def _kernel(
    new,
    means,
    seed,
    indices,
    neurons,
    keep,
    random,
    groups,
    parts: tl.constexpr,
    rows: tl.constexpr,
    padded: tl.constexpr,
    has_best: tl.constexpr,
    has_random: tl.constexpr,
):
    list_number = tl.program_id(0)
    neuron = tl.arange(0, padded)
    inside = neuron < neurons
    first = list_number.to(tl.int64) * (parts * rows) * neurons
    score = tl.zeros((padded,), tl.float32)
    for row in tl.static_range(rows):
        of_row = tl.zeros((padded,), tl.float32)
        for part in tl.static_range(parts):
            at = first + (part * rows + row) * neurons + neuron
            changed = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
            of_row += tl.abs(changed - tl.load(means + at, mask=inside, other=0.0).to(tl.float32))
        score += of_row
    chosen = choose(score, neuron, seed, list_number % groups, neurons, keep, random, has_best, has_random)
    put(indices + list_number.to(tl.int64) * (keep + random), neuron, chosen)
    for index in tl.static_range(parts * rows):
        at = first + index * neurons + neuron
        tl.store(means + at, tl.load(new + at, mask=chosen, other=0.0), mask=chosen)
