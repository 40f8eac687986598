"""The oracle on a whole model: which call is which, whose caches it uses, and what each place of the model is given."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.config import Config
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.verify.oracle.attention import AttentionCache, DenseAttention, attention
from chipmunk.verify.oracle.decisions import Decisions
from chipmunk.verify.oracle.hooks import Hooks
from chipmunk.verify.oracle.mlp import DenseMlp, MlpCache, mlp
from chipmunk.verify.oracle.step_caching import StepOfModel, Steps
from chipmunk.verify.oracle.token_order import others_by_token, restored, token_order


@dataclass
class Slot:
    """The caches of one place that calls the model, by layer index."""

    attention: dict[int, AttentionCache] = field(default_factory=dict)
    mlp: dict[int, MlpCache] = field(default_factory=dict)
    steps: Steps | None = None
    model_calls: int = 0
    last_step: int = -1
    """Of the loop, where its steps are told."""


class Oracle:
    """Runs `model` sparsely while the `with` block lasts.

    `model` is an instance of the class that `facts` describe, unpatched. Gradients must be off. `steps` is the number
    of steps of the sampling loop where the loop knows it, for the rule about `min_steps`.

    The caller says which call is which: either `auto_step()`, where each model call is a step of a single slot, or
    `begin_step(index)` and `slot(name)` before each call, or `follow([(index, name), …])` for all calls of a generation
    in advance. A step before the last one begins a new generation, and so does the call after `end_generation()`. All
    but a slot's first call in a step are left as they are.
    """

    def __init__(self, model: nn.Module, facts: ModelFacts, config: Config, steps: int | None = None) -> None:
        self.model = model
        self.facts = facts
        self.config = config
        self.skipped: list[tuple[int, str]] = []
        """Step and slot of the model calls that step caching skipped."""
        self._decisions = Decisions(config, steps)
        self._double_layers = len(attrgetter(facts.double)(model))
        self._layers = self._double_layers + len(attrgetter(facts.single)(model))
        self._slots: dict[str, Slot] = {}
        self._name = ""
        self._upcoming: Iterator[tuple[int, str]] | None = None
        self._last_step = -1
        self._current: Slot | None = None
        """Whose caches this call uses; None where its layers are left as they are."""
        self._order: list[int] | None = None
        self._step: StepOfModel | None = None
        """What step caching knows of this call; None where it is off."""
        self._own_features: dict[int, Tensor] = {}
        self._hooks = ExitStack()

    @property
    def calls(self) -> Counter[tuple[int, str, str]]:
        """How often each layer's "attention" and "mlp" ran "dense", "full" and "sparse", and attention "masked"."""
        return self._decisions.calls

    @property
    def smallest_margin(self) -> float:
        """The closest decision of all selections, relative to the largest score. Where it is near the rounding error,
        another correct implementation may choose otherwise."""
        return self._decisions.smallest_margin

    def __enter__(self) -> Oracle:
        self._hooks.enter_context(Hooks(self.model, self.facts, self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self.end_generation()

    # What the caller tells.

    def auto_step(self) -> None:
        """From now on each model call is a step of its own, in one slot, until `end_generation`."""
        self._name = ""
        self._upcoming = None

    def begin_step(self, index: int) -> None:
        """The next model calls belong to step `index`, 0-based; a step before the last one begins a new generation."""
        if index < self._last_step:
            self.end_generation()
        self._last_step = index
        self._name = ""

    def slot(self, name: str) -> None:
        """The next model calls come from the place `name` of the loop."""
        self._name = name

    def follow(self, calls: Iterable[tuple[int, str]]) -> None:
        """Step and slot of each of the next model calls."""
        self._upcoming = iter(calls)

    def begin_generation(self, steps: int | None) -> None:
        """The next model calls belong to a new loop, of so many steps where it knows them."""
        self.end_generation()
        self._decisions.steps = steps

    def end_generation(self) -> None:
        """Forget all caches and counts."""
        self._slots.clear()
        self._last_step = -1

    # What the hooks tell.

    @property
    def corrects(self) -> bool:
        return self._current is not None

    def before_model(self, arguments: inspect.BoundArguments) -> None:
        """Find the call's slot, and bring the image tokens among `arguments` into order."""
        self._current = self._order = self._step = None
        config = self.config
        if not config.attn.is_enabled and not config.mlp.is_enabled and not config.step_caching.is_enabled:
            return
        if torch.is_grad_enabled():
            raise RuntimeError("the oracle runs under torch.no_grad() or torch.inference_mode()")
        if self._upcoming is not None:
            step, name = next(self._upcoming)
            if step != self._last_step:
                self.begin_step(step)
            self.slot(name)
        given, facts = arguments.arguments, self.facts
        image = given[facts.image]
        slot = self._slots.setdefault(self._name, Slot())
        if 0 <= self._last_step == slot.last_step:
            return  # a second call from this place in one step: not a step of its own, and so left as it is
        slot.last_step = self._last_step
        self._current = slot
        self._begin_step_of(self._current, image.shape[1] if image.ndim == 3 else None)

        if facts.ids is None or not config.patchify.is_enabled:
            return
        ids = given[facts.ids]
        first_ids = ids if ids.ndim == 2 else ids[0]
        others = [x for x in others_by_token(arguments, facts) if id(x) not in self._own_features]
        if torch.equal(ids, first_ids.expand_as(ids)) and not others:
            self._order = token_order(first_ids, config.patchify)
        if self._order is not None:
            given[facts.image] = image[:, self._order]
            given[facts.ids] = ids[self._order] if ids.ndim == 2 else ids[:, self._order]

    def _begin_step_of(self, slot: Slot, image_tokens: int | None) -> None:
        """Decide whether this call of the model is skipped; its blocks are then computed without being counted."""
        index = self._last_step if self._last_step >= 0 else slot.model_calls
        slot.model_calls += 1
        if not self.config.step_caching.is_enabled or not self.facts.step_caching or self._decisions.too_few_steps:
            return
        if slot.steps is None:
            slot.steps = Steps(self.config, self._decisions.steps)
        self._step = StepOfModel(slot.steps, index, image_tokens, self._double_layers, self._layers)
        self._decisions.smallest_margin = min(self.smallest_margin, slot.steps.smallest_margin)
        if not self._step.is_skipped:
            return
        self.skipped.append((index, self._name))
        self._current = None
        for of_attention in slot.attention.values():
            of_attention.skip(self.config.attn)
        for of_mlp in slot.mlp.values():
            of_mlp.skip(self.config.mlp)

    def after_model(self, arguments: inspect.BoundArguments, output: Any) -> Any:
        order, self._current, self._order = self._order, None, None
        if order is None:
            return output
        # What the model keeps in its arguments is in this order, and may stay.
        self._own_features |= {id(tensor): tensor for tensor in others_by_token(arguments, self.facts)}
        return restored(order, output)

    def before_block(self, layer: int, streams: Sequence[Tensor]) -> None:
        if self._step is not None:
            self._step.enter(layer, streams)

    def after_block(self, layer: int, output: Any) -> Any:
        return None if self._step is None else self._step.leave(layer, output)

    def masked(self, layer: int) -> None:
        self._decisions.calls[layer, "attention", "masked"] += 1

    def attention(self, layer: int, dense: DenseAttention) -> Tensor:
        assert self._current is not None
        facts = self.facts.double_block if layer < self._double_layers else self.facts.single_block
        if not facts.attention:
            return dense.output
        cache = self._current.attention.setdefault(layer, AttentionCache())
        return attention(self._decisions, cache, layer, dense)

    def mlp(self, layer: int, dense: DenseMlp) -> Tensor | None:
        assert self._current is not None
        cache = self._current.mlp.setdefault(layer, MlpCache())
        return mlp(self._decisions, cache, layer, dense)
