"""What a layer decides, attention and MLP alike: whether it stays dense, and what is chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chipmunk.config import Config

EVER_FURTHER = tuple(2**power - 1 for power in range(31))
"""Full steps where `full_step_every` is null."""


@dataclass
class Decisions:
    """The decisions of one run, and the record of them."""

    config: Config
    steps: int | None
    """Of the sampling loop, where the loop knows it."""
    calls: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    """How often each layer's "attention" and "mlp" ran "dense", "full" and "sparse"."""
    smallest_margin: float = math.inf
    """The closest decision of all: the gap between the last score chosen and the first left out, relative to the
    largest score, or the largest of the values whose differences the scores are: these are what is rounded."""

    @property
    def too_few_steps(self) -> bool:
        """Whether the loop is known to be too short for anything to be left out."""
        return self.steps is not None and self.steps < self.config.min_steps

    def stays_dense(
        self, layer: int, enabled: bool, first_dense_layers: int, everything_kept: bool, groups: Sequence[range]
    ) -> bool:
        return not enabled or layer < first_dense_layers or everything_kept or len(groups) < 2 or self.too_few_steps

    def choose(
        self, scores: list[float], keep: int, random: int, step: int, layer: int, group: int, values: float = 0.0
    ) -> list[int]:
        """The `keep` best indices and `random` more by hash, ascending.

        values: the largest of those whose differences the scores are, if they are.
        """
        ranking = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        chosen, others = ranking[:keep], ranking[keep:]
        if chosen and others:
            largest = max(abs(scores[chosen[0]]), values, 1e-300)
            self.smallest_margin = min(self.smallest_margin, (scores[chosen[-1]] - scores[others[0]]) / largest)
        if random:
            others.sort(key=lambda index: (hash_of(step, layer, group, index), index))
        return sorted(chosen + others[:random])


def groups_of(tokens: int, size: int) -> list[range]:
    """Consecutive groups of `size` rows, the last one partial."""
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def hash_of(step: int, layer: int, group: int, index: int) -> int:
    """A number of 32 bits that only looks random."""
    golden, bits = 0x9E3779B9, 0xFFFFFFFF
    mixed = _mix(step)
    for number in (layer, group):
        mixed = _mix((number + golden * mixed) & bits)
    return _mix((index + golden * mixed) & bits)


def _mix(h: int) -> int:
    bits = 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x7FEB352D & bits
    h ^= h >> 15
    h = h * 0x846CA68B & bits
    return h ^ (h >> 16)
