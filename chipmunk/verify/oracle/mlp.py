"""Sparse MLP of one layer: which neurons each group of rows computes anew, and what the others keep from the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chipmunk.config import Mlp
from chipmunk.verify.oracle.decisions import EVER_FURTHER, Decisions, groups_of

RENEW_ALWAYS_BEFORE = 10
"""A sparse step with a lower count of its own selects its neurons anew, whatever `block_mask_cache` says."""


@dataclass(frozen=True)
class DenseMlp:
    """An MLP in one call, as the model computed it."""

    x: Tensor
    """What enters it, (B, N, C)."""
    activation: Tensor
    """Of all neurons, (B, N, F)."""
    weight_in: Tensor
    """Of fc1, (F, C), with a gate (2F, C)."""
    bias_in: Tensor | None
    """Of as many rows."""
    weight_out: Tensor
    """Of fc2, (C, F)."""
    output: Tensor
    """(B, N, C); in a single block the MLP's part of it, without bias."""


@dataclass
class MlpCache:
    """What one layer's MLP remembers in one call slot of one generation."""

    count: int = 0
    overdue: bool = False
    """Whether a full step was skipped since the last call."""
    neurons: list[list[list[int]]] | None = None
    """Chosen neurons by batch element and row group, ascending; None if none were chosen since the last full step."""
    activation: Tensor | None = None
    """(B, N, F)"""
    output: Tensor | None = None
    """(B, N, C)"""
    means: list[list[list[Tensor]]] = field(default_factory=list)
    """fc1 of the mean input, float64 (F,), with a gate (2F,), by batch element, row group and part of the group."""

    def skip(self, config: Mlp) -> None:
        """Count a step that was skipped; what it would have chosen is chosen at the next call."""
        self.overdue |= step_is_full(config, self.count)
        if _chooses_anew(config, self.count):
            self.neurons = None
        self.count += 1


def mlp(decisions: Decisions, cache: MlpCache, layer: int, dense: DenseMlp) -> Tensor | None:
    """Output (B, N, C) of a sparse step of an MLP; None for any other step, whose output is the dense one."""
    config = decisions.config.mlp
    x, activation = dense.x, dense.activation
    batch, tokens, _ = x.shape
    neurons = activation.shape[-1]
    groups = groups_of(tokens, config.bm)
    keep, random = neurons_kept(config, neurons)
    count = cache.count
    cache.count += 1
    everything = keep + random == neurons and config.top_keys < 1
    if decisions.stays_dense(layer, config.is_enabled, config.first_n_dense_layers, everything, groups):
        decisions.calls[layer, "mlp", "dense"] += 1
        return None

    def means(b: int, rows: range) -> list[Tensor]:
        parts = [x[b, rows.start + part.start : rows.start + part.stop] for part in groups_of(len(rows), config.mbm)]
        bias = 0.0 if dense.bias_in is None else dense.bias_in.double()
        return [part.double().mean(dim=0) @ dense.weight_in.double().T + bias for part in parts]

    is_full, cache.overdue = step_is_full(config, count) or cache.overdue, False
    if is_full:
        decisions.calls[layer, "mlp", "full"] += 1
        cache.neurons = None
        cache.activation = activation.clone()
        cache.output = dense.output.clone()
        cache.means = [[means(b, rows) for rows in groups] for b in range(batch)]
        return None

    assert cache.activation is not None
    assert cache.output is not None
    decisions.calls[layer, "mlp", "sparse"] += 1
    if _chooses_anew(config, count) or cache.neurons is None:
        cache.neurons = [[] for _ in range(batch)]
        for b in range(batch):
            for g, rows in enumerate(groups):
                now, before = means(b, rows), cache.means[b][g]
                score = torch.stack([abs(n - o) for n, o in zip(now, before, strict=True)]).sum(dim=0)
                # A neuron with a gate has two rows, `neurons` apart.
                score = score.reshape(-1, neurons).sum(dim=0)
                largest = max(float(mean.abs().max()) for mean in (*now, *before))
                chosen = decisions.choose(score.tolist(), keep, random, count, layer, g, values=largest)
                for n, o in zip(now, before, strict=True):
                    for first in range(0, len(n), neurons):
                        refreshed = [first + neuron for neuron in chosen]
                        o[refreshed] = n[refreshed]
                cache.neurons[b].append(chosen)
    for b in range(batch):
        for g, rows in enumerate(groups):
            chosen = cache.neurons[b][g]
            span = slice(rows.start, rows.stop)
            new, old = activation[b, span][:, chosen], cache.activation[b, span][:, chosen]
            cache.output[b, span] += (new - old) @ dense.weight_out[:, chosen].T
            cache.activation[b, span, chosen] = new
    return cache.output.clone()


def step_is_full(config: Mlp, count: int) -> bool:
    if config.full_step_every is None:
        return count in EVER_FURTHER
    return count % config.full_step_every == 0


def _chooses_anew(config: Mlp, count: int) -> bool:
    return count < RENEW_ALWAYS_BEFORE or count % config.block_mask_cache == 0


def neurons_kept(config: Mlp, neurons: int) -> tuple[int, int]:
    """How many of `neurons` are kept for their score, and how many at random."""
    if config.top_keys >= 1:
        return neurons, 0
    multiple = config.counts_multiple_of
    total = math.ceil((config.top_keys + config.random_keys) * neurons / multiple) * multiple
    total = min(max(total, 1), neurons)
    random = min(math.floor(config.random_keys * neurons), total - 1)
    return total - random, random
