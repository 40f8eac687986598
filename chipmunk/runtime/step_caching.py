"""Steps on which no block runs: which ones, and what stands in for the hidden state that the blocks would have given.

Hidden state: the image tokens after the last block, (B, L, C), on their way to the final layer. Residual: the hidden
state minus the image tokens before the first block. One `StepCache` belongs to a call slot of a generation, one
`StepCall` to a call of the model; the two functions at the end are what patched code calls. docs/architecture.md states
the rules exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chipmunk.config import StepCaching

ATTRIBUTE = "_chipmunk_step"
"""Where a model finds its `StepCall` while it runs: in its `__dict__`, so never in the state_dict."""

UPSTREAM_STEPS = 50
UPSTREAM_SCHEDULE = (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43)
"""The steps that the original Chipmunk skips, of 50."""

NO_PLACE = "the model's forward has no place for it"

Blocks = TypeVar("Blocks")


def scaled(schedule: Sequence[int], written_for: int, steps: int | None) -> frozenset[int]:
    """The steps to skip in a loop of `steps`, by a schedule for a loop of `written_for`; None: as it is written.

    Keeps the density of the schedule all along the loop, in whole numbers: step i is skipped where the number of steps
    skipped before the end of step i, rounded half up, is greater than the number before its beginning.
    """
    if steps is None or steps == written_for:
        return frozenset(schedule)
    listed = {step for step in schedule if step < written_for}

    def skipped_before(step: int) -> int:
        whole, part = divmod(step * written_for, steps)
        skipped = steps * sum(other < whole for other in listed) + part * (whole in listed)
        return (2 * skipped + written_for) // (2 * written_for)

    return frozenset(step for step in range(steps) if skipped_before(step + 1) > skipped_before(step))


class StepCache:
    """What one call slot remembers of the steps that it computed, and from it which steps to skip."""

    def __init__(self, rules: StepCaching, written_for: int | None, steps: int | None) -> None:
        """rules: `step_caching` of the configuration. written_for: `steps` of it. steps: the loop's, None: unknown."""
        self.rules = rules
        self.steps = steps
        self.is_static = rules.is_static
        self.keeps_hidden = self.is_static and rules.extrapolation is None
        """Whether the hidden state itself is used again; else the residual is, on the step's own input."""
        self.order = 0 if self.keeps_hidden else 1 if rules.extrapolation is None else rules.extrapolation
        self.schedule: frozenset[int] = frozenset()
        if self.is_static:
            schedule = UPSTREAM_SCHEDULE if rules.skip_step_schedule is None else rules.skip_step_schedule
            self.schedule = scaled(schedule, written_for or UPSTREAM_STEPS, steps)
        self.past: list[tuple[int, Tensor]] = []
        """Step and what is kept of it, of the last `order + 1` computed steps, the newest first."""
        self.skipped: list[int] = []
        """The steps skipped so far."""
        self._run = 0
        """How many of them since the last computed step."""
        self._spent = 0.0
        """The errors expected of these, added up."""
        self._measured: tuple[Tensor | float, tuple[int, ...]] | None = None
        """Relative error of what the steps before the last computed one predicted for it, and which steps they were."""

    def skips(self, step: int) -> bool:
        """Whether no block is to run on `step`. May read one number from the device."""
        rules = self.rules
        if not self.past or (self.steps is not None and step >= self.steps - 1):
            return False
        if self.is_static:
            return step in self.schedule
        if step < rules.first_steps or self._run >= rules.max_consecutive or len(self.past) <= self.order:
            return False
        if self.steps is not None and step >= self.steps - rules.last_steps:
            return False
        if rules.keep is not None:
            return not self._is_kept(step, rules.keep)
        return self._spent + self.expected_error(step) < rules.threshold

    def _is_kept(self, step: int, keep: float) -> bool:
        """Whether `step` is computed where a fraction `keep` of all is, spread evenly between the protected ones."""
        rules, steps = self.rules, self.steps
        if steps is not None:
            between = steps - rules.first_steps - rules.last_steps
            # the first of the last steps closes the last gap
            computed = int(keep * steps + 0.5) - rules.first_steps - rules.last_steps
            keep = (max(computed, 0) + 1) / (between + 1)
        place = step - rules.first_steps
        return int(keep * (place + 1)) > int(keep * place)

    def expected_error(self, step: int) -> float:
        """The error to expect of a prediction for `step`, relative to the hidden state; infinite if nothing is known.

        From the error measured at the last computed step: an extrapolation of order p through steps t₀ … tₚ is off by
        r⁽ᵖ⁺¹⁾ / (p + 1)! · ∏ (t − tᵢ), with a derivative that is taken to be the same here as there.
        """
        if self._measured is None:
            return float("inf")
        error, nodes = float(self._measured[0]), self._measured[1]
        self._measured = error, nodes  # read from the device once
        measured_at = self.past[0][0]
        growth = prod(step - node for node, _ in self.past) / prod(measured_at - node for node in nodes)
        return error * growth

    def predict(self, step: int, before: Tensor) -> Tensor:
        """The hidden state of `step`, whose image tokens enter the blocks as `before` (B, L, C). A new tensor."""
        if self.keeps_hidden:
            return self.past[0][1].clone()
        wide = torch.promote_types(before.dtype, torch.float32)
        hidden = before.to(wide)
        nodes = [node for node, _ in self.past]
        for node, residual in self.past:
            # Lagrange's polynomial through the last residuals
            weight = prod((step - other) / (node - other) for other in nodes if other != node)
            hidden = hidden.add(residual, alpha=weight)
        return hidden.to(before.dtype)

    def skip(self, step: int, before: Tensor) -> Tensor:
        """`predict`, for a step on which no block ran."""
        if not self.is_static and self.rules.keep is None:
            self._spent += self.expected_error(step)
        self._run += 1
        self.skipped.append(step)
        return self.predict(step, before)

    def keep(self, step: int, before: Tensor | None, hidden: Tensor) -> None:
        """Remember a computed step: the hidden state, and for a residual what entered the blocks."""
        if self.keeps_hidden:
            self.past = [(step, hidden.clone())]
        else:
            assert before is not None
            if not self.is_static and self.rules.keep is None and len(self.past) > self.order:
                wide = torch.promote_types(hidden.dtype, torch.float32)
                off = (self.predict(step, before).to(wide) - hidden.to(wide)).abs().mean()
                self._measured = off / hidden.to(wide).abs().mean(), tuple(node for node, _ in self.past)
            self.past = [(step, hidden - before), *self.past[: self.order]]
        self._run, self._spent = 0, 0.0

    def caches(self) -> list[Tensor]:
        """All tensors that are held now."""
        return [kept for _, kept in self.past]

    def forget(self) -> None:
        """Free what is remembered."""
        self.past.clear()
        self._measured = None


class StepCall:
    """One call of the model while it runs."""

    def __init__(self, cache: StepCache, step: int, skip: bool) -> None:
        self.cache = cache
        self.step = step
        self.skip = skip
        self.problem: str | None = NO_PLACE
        """Why the forward is no place for step caching; None once it has asked for the hidden state."""
        self._entered: torch.Size | None = None
        """Shape of the image tokens that entered the blocks."""
        self._before: Tensor | None = None
        self._loops = 0
        self._asked = False

    def blocks(self, blocks: Any, image: Tensor | None) -> Any:
        self._loops += 1
        if image is not None and self._entered is None:
            self._entered = image.shape
            if not self.skip and not self.cache.keeps_hidden:
                self._before = image.clone()  # the blocks may work in place
        return () if self.skip else blocks

    def hidden(self, image: Tensor) -> Tensor:
        if self._loops < 2 or self._asked:
            self.problem = "the forward does not run two loops over blocks and then ask for the hidden state, once"
            return image
        self._asked, self.problem = True, None
        before = self._before
        if self._entered != image.shape or (before is not None and before.dtype != image.dtype):
            self.problem = "the blocks change the shape or the dtype of the image tokens"
            return image
        if self.skip:
            return self.cache.skip(self.step, image)
        self.cache.keep(self.step, before, image)
        return image

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model carries no state."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def blocks(blocks: Blocks, model: nn.Module, image: Tensor | None = None) -> Blocks:
    """What a loop over `blocks` of `model` iterates: `blocks` itself, or nothing on a step that is skipped.

    image: the image tokens (B, L, C) that enter the blocks, where this is the model's first loop.
    """
    call = _call_of(model)
    return blocks if call is None else call.blocks(blocks, image)


def hidden(model: nn.Module, image: Tensor) -> Tensor:
    """The hidden state after the last block: `image` itself, (B, L, C), or what stands in for it on a skipped step."""
    call = _call_of(model)
    return image if call is None else call.hidden(image)


def _call_of(model: nn.Module) -> StepCall | None:
    # getattr, not __dict__: Dynamo guards on the absence of an attribute, but not on that of a key.
    call: StepCall | None = getattr(model, ATTRIBUTE, None)
    return call
