"""Selection of columns in plain PyTorch. The hash's 32-bit arithmetic is done in int64, masked after each product."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(value: Tensor) -> Tensor:
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def _chain(inner: Tensor, value: Tensor) -> Tensor:
    """`mix(value + 0x9e3779b9 · inner)` on unsigned 32 bits."""
    return _mix((value + _GOLDEN * inner) & _MASK)


def column_hashes(seed: Tensor, groups: int, columns: int) -> Tensor:
    """`hash(step, layer, group, column)` of docs/architecture.md: (groups, columns) int64 in [0, 2³²)."""
    step, layer = seed[0] & _MASK, seed[1] & _MASK
    by_layer = _chain(_mix(step), layer)
    by_group = _chain(by_layer, torch.arange(groups, device=seed.device))
    return _chain(by_group[:, None], torch.arange(columns, device=seed.device))


def select_columns(scores: Tensor, seed: Tensor, keep: int, random: int) -> Tensor:
    """See `chipmunk.ops.select_columns`."""
    *leading, columns = scores.shape
    flat = scores.reshape(leading[0], -1, columns)
    chosen = flat.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    if random:
        hashes = column_hashes(seed, flat.shape[1], columns).expand(flat.shape)
        free_hashes = hashes.scatter(-1, chosen, _MASK + 1)  # past every hash: never chosen twice
        lucky = free_hashes.sort(dim=-1, stable=True).indices[..., :random]
        chosen = torch.cat((chosen, lucky), dim=-1)
    return chosen.sort(dim=-1).values.to(torch.int32).reshape(*leading, keep + random)
