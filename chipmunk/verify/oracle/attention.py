"""Sparse attention of one layer: which keys each group of queries keeps, and what the others add from the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk.config import Attention
from chipmunk.verify.oracle.decisions import EVER_FURTHER, Decisions, groups_of


@dataclass(frozen=True)
class DenseAttention:
    """The joint attention of a layer in one call, as the model computed it; tensors are (B, H, N, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    output: Tensor


@dataclass
class AttentionCache:
    """What one layer's attention remembers in one call slot of one generation."""

    count: int = 0
    overdue: bool = False
    """Whether a full step was skipped since the last call."""
    keys: list[list[list[list[int]]]] | None = None
    """Chosen keys by batch element, head and query group, ascending."""
    difference: Tensor | None = None
    """dense − sparse of the last full step, (B, H, N, D)."""

    def skip(self, config: Attention) -> None:
        """Count a step that was skipped."""
        self.overdue |= step_is_full(config, self.count)
        self.count += 1


def attention(decisions: Decisions, cache: AttentionCache, layer: int, dense: DenseAttention) -> Tensor:
    """Output (B, H, N, D) of the layer's joint attention; what is chosen on a full step goes into `cache`."""
    config = decisions.config.attn
    query, key, value, scale = dense.query, dense.key, dense.value, dense.scale
    batch, heads, tokens, _ = query.shape
    groups = groups_of(tokens, config.mbm)
    keep, random = keys_kept(config, tokens)
    count = cache.count
    cache.count += 1
    everything = keep + random == tokens and config.top_keys < 1
    if decisions.stays_dense(layer, config.is_enabled, config.first_n_dense_layers, everything, groups):
        decisions.calls[layer, "attention", "dense"] += 1
        return dense.output

    def sparse(b: int, h: int, rows: range, chosen: list[int]) -> Tensor:
        scores = query[b, h, rows.start : rows.stop] @ key[b, h, chosen].T * scale
        return torch.softmax(scores, dim=-1) @ value[b, h, chosen]

    is_full, cache.overdue = step_is_full(config, count) or cache.overdue, False
    if not is_full:
        assert cache.keys is not None
        assert cache.difference is not None
        decisions.calls[layer, "attention", "sparse"] += 1
        output = cache.difference.clone()
        for b in range(batch):
            for h in range(heads):
                for g, rows in enumerate(groups):
                    output[b, h, rows.start : rows.stop] += sparse(b, h, rows, cache.keys[b][h][g])
        return output

    decisions.calls[layer, "attention", "full"] += 1
    if step_is_full(config, count + 1):
        return dense.output
    if cache.keys is None or config.recompute_mask:
        cache.keys = [[[] for _ in range(heads)] for _ in range(batch)]
        for b in range(batch):
            for h in range(heads):
                for g, rows in enumerate(groups):
                    scores = query[b, h, rows.start : rows.stop].double() @ key[b, h].double().T * scale
                    column_sums = torch.softmax(scores, dim=-1).sum(dim=0).tolist()
                    group = h * len(groups) + g
                    cache.keys[b][h].append(decisions.choose(column_sums, keep, random, count, layer, group))
    cache.difference = dense.output.clone()
    for b in range(batch):
        for h in range(heads):
            for g, rows in enumerate(groups):
                cache.difference[b, h, rows.start : rows.stop] -= sparse(b, h, rows, cache.keys[b][h][g])
    return dense.output


def step_is_full(config: Attention, count: int) -> bool:
    if config.full_step_schedule is not None:
        return count == 0 or count in config.full_step_schedule
    if config.full_step_every is None:
        return count in EVER_FURTHER
    return count in (0, 1) or count % config.full_step_every == 0


def keys_kept(config: Attention, tokens: int) -> tuple[int, int]:
    """How many of `tokens` keys are kept for their column sum, and how many at random."""
    if config.top_keys >= 1:
        return tokens, 0
    multiple = config.counts_multiple_of
    keep = math.floor(config.top_keys * tokens / multiple + 0.5) * multiple
    keep = min(max(keep, min(multiple, tokens)), tokens)
    random = math.floor(config.random_keys * tokens + 0.5)
    return keep, min(random, tokens - keep)
