"""Step caching, stated plainly: which steps are skipped, and what takes the place of the hidden state.

The model computes skipped steps too; then this is put into the place of the image tokens that leave the last block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from chipmunk.config import Config

ORIGINALS = {7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43}


@dataclass
class Steps:
    """The computed steps of one call slot of one generation, the newest last."""

    config: Config
    total: int | None
    """Steps of the loop, where it knows them."""
    computed: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    """(B, L, C) of each."""
    residuals: list[Tensor] = field(default_factory=list)
    """The same, minus what entered the blocks."""
    error: float = math.inf
    """Of what the steps before the last computed one predicted for it."""
    expected: float = 0.0
    """Errors of the steps skipped since then, added up."""
    smallest_margin: float = math.inf
    """How close the sum came to the threshold, relative to it."""

    @property
    def order(self) -> int:
        """Of the extrapolation; the original's way, −1, uses the hidden state again."""
        rules = self.config.step_caching
        if rules.extrapolation is not None:
            return rules.extrapolation
        return -1 if rules.is_static else 1

    def skips(self, step: int) -> bool:
        """Whether no block runs on `step`, 0-based; the steps before it have been told by `compute` and `skip`."""
        rules, total = self.config.step_caching, self.total
        if not self.computed or step == 0 or (total is not None and step == total - 1):
            return False
        if rules.is_static:
            return self._is_listed(step)
        since = step - self.computed[-1] - 1
        if step < rules.first_steps or (total is not None and step >= total - rules.last_steps):
            return False
        if since >= rules.max_consecutive or len(self.computed) < self.order + 1:
            return False
        if rules.keep is not None:
            fraction = rules.keep
            if total is not None:
                between = total - rules.first_steps - rules.last_steps
                computed = math.floor(fraction * total + 0.5) - rules.first_steps - rules.last_steps
                fraction = (max(computed, 0) + 1) / (between + 1)
            place = step - rules.first_steps
            return math.floor(fraction * (place + 1)) == math.floor(fraction * place)
        together = self.expected + self.expected_error(step)
        if math.isfinite(together) and rules.threshold > 0:
            self.smallest_margin = min(self.smallest_margin, abs(together - rules.threshold) / rules.threshold)
        return together < rules.threshold

    def _is_listed(self, step: int) -> bool:
        """Whether the schedule, stretched to the loop's length, has more steps before the end of this one than before
        its beginning."""
        rules, written_for = self.config.step_caching, self.config.steps or 50
        listed = ORIGINALS if rules.skip_step_schedule is None else set(rules.skip_step_schedule)
        if self.total is None or self.total == written_for:
            return step in listed

        def before(boundary: int) -> int:
            time = Fraction(boundary * written_for, self.total)
            passed = sum(min(max(time - other, Fraction(0)), Fraction(1)) for other in listed if other < written_for)
            return math.floor(passed * Fraction(self.total or 1, written_for) + Fraction(1, 2))

        return before(step + 1) > before(step)

    def expected_error(self, step: int) -> float:
        """The measured error times how much farther this step is from its nodes than that one was from its own."""
        if math.isinf(self.error):
            return math.inf
        count, last = self.order + 1, self.computed[-1]
        here = math.prod(step - node for node in self.computed[-count:])
        there = math.prod(last - node for node in self.computed[-count - 1 : -1])
        return self.error * here / there

    def predicted(self, step: int, before: Tensor) -> Tensor:
        """The hidden state of `step`, whose image tokens enter the blocks as `before` (B, L, C)."""
        if self.order < 0:
            return self.hidden[-1]
        nodes, values = self.computed[-self.order - 1 :], self.residuals[-self.order - 1 :]
        values = [value.double() for value in values]
        for width in range(1, len(nodes)):  # Neville's scheme
            values = [
                ((step - nodes[i + width]) * values[i] + (nodes[i] - step) * values[i + 1])
                / (nodes[i] - nodes[i + width])
                for i in range(len(values) - 1)
            ]
        return (before.double() + values[0]).to(before.dtype)

    def skip(self, step: int, before: Tensor) -> Tensor:
        """`predicted`, for a step that is skipped: its expected error counts."""
        if not self.config.step_caching.is_static:
            self.expected += self.expected_error(step)
        return self.predicted(step, before)

    def compute(self, step: int, before: Tensor, hidden: Tensor) -> None:
        """Take in a step on which the blocks ran; both tensors are (B, L, C)."""
        if self.order >= 0 and len(self.computed) > self.order:
            wrong = (self.predicted(step, before) - hidden).double().abs().mean()
            self.error = float(wrong / hidden.double().abs().mean())
        self.computed.append(step)
        self.hidden.append(hidden.clone())
        self.residuals.append(hidden - before)
        self.expected = 0.0


class StepOfModel:
    """One call of the model: which rows of its streams are the image, and what these become on a skipped step."""

    def __init__(self, steps: Steps, index: int, image_tokens: int | None, double_layers: int, layers: int) -> None:
        self.steps = steps
        self.index = index
        self.is_skipped = steps.skips(index)
        self._image_tokens = image_tokens or 0
        """0 until the blocks are entered, where the model cuts latents into tokens itself."""
        self._double_layers = double_layers
        self._layers = layers
        self._entering: Tensor | None = None
        self._leaving_double: Tensor | None = None
        self._text_first = True

    def enter(self, layer: int, streams: Sequence[Tensor]) -> None:
        """Know what enters the blocks, and on which side of the joint stream the image is."""
        if not self._image_tokens:  # verify's texts are shorter than its images
            self._image_tokens = max(stream.shape[1] for stream in streams)
        images = [stream for stream in streams if stream.shape[1] == self._image_tokens]
        if layer == 0:
            self._entering = images[0].clone()
        elif layer == self._double_layers and self._leaving_double is not None and not images:
            head = streams[0][:, : self._image_tokens]
            self._text_first = not torch.equal(head, self._leaving_double)

    def _is_image(self, part: Any) -> bool:
        return isinstance(part, Tensor) and part.ndim == 3 and part.shape[1] == self._image_tokens

    def leave(self, layer: int, output: Any) -> Any:
        """Of the last block, the output with the image tokens that step caching puts into their place; else None."""
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        index = next((i for i, part in enumerate(parts) if self._is_image(part)), 0)
        if layer == self._double_layers - 1:
            self._leaving_double = parts[index].clone()
        if layer != self._layers - 1:
            return None
        assert self._entering is not None
        tokens = parts[index].shape[1]
        rows = slice(tokens - self._image_tokens, None) if self._text_first else slice(self._image_tokens)
        if not self.is_skipped:
            self.steps.compute(self.index, self._entering, parts[index][:, rows])
            return None
        parts[index] = parts[index].clone()
        parts[index][:, rows] = self.steps.skip(self.index, self._entering)
        return type(output)(parts) if isinstance(output, (tuple, list)) else parts[0]
