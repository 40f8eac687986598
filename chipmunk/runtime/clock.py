"""The step clock: a sampling loop's iterable becomes a generation, which owns the caches and dies with the loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from operator import length_hint
from typing import TYPE_CHECKING, Any, TypeVar

from chipmunk.runtime.layer_state import LayerState
from chipmunk.runtime.step_caching import StepCache
from chipmunk.runtime.token_order import TokenOrder
from chipmunk.runtime.weights_seen import WeightsSeen

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

Item = TypeVar("Item")

_running: ContextVar[dict[Session, tuple[Generation, int]]] = ContextVar("chipmunk_running")
"""The generation whose loop this thread (or task) advanced last, by session, and the step that it advanced to."""

_EXAMPLES: tuple[Iterable[object], ...] = ([], (), range(0), range(1 << 70), {}, set(), reversed([]), reversed({}))
_EXACT_ITERATORS = tuple(type(iter(example)) for example in _EXAMPLES)
"""Iterators of Python whose length hint is what they have left."""


class CallSlot:
    """What one place that calls the model remembers during one generation."""

    def __init__(
        self,
        layers: list[LayerState | None],
        signature: tuple[object, ...],
        inference: bool,
        weights: WeightsSeen,
    ) -> None:
        self.layers = layers
        """By layer index; None where a layer always runs dense."""
        self.signature = signature
        """Shape, dtype and device of every tensor the model is given."""
        self.inference = inference
        """Whether the caches were made in inference mode: they cannot be updated outside it."""
        self.weights = weights
        """Those that the last call left: the caches are not for others."""
        self.order: TokenOrder | None = None
        self.steps: StepCache | None = None
        """Where steps may be skipped: what the computed ones left."""
        self.last_step = -1
        self.skipped = False
        """Whether no block ran in the last call."""

    def forget(self) -> None:
        for layer in self.layers:
            if layer is not None:
                layer.forget()
        if self.steps is not None:
            self.steps.forget()
        self.order = None


class Generation:
    """One run of a sampling loop: its position, its call slots and their caches."""

    def __init__(self, session: Session, at_most: int | None) -> None:
        self._session = weakref.ref(session)
        self.at_most = at_most
        """The number of steps, where it is known."""
        self.step = -1
        self.slots: dict[str, CallSlot] = {}
        self.dense_reason: str | None = None
        """Why all further calls run dense: the caches did not fit into memory."""
        self.closed = False
        self._outer = current_generation(session)

    def advance(self) -> None:
        """A step begins; model calls of this thread belong to this generation from now on."""
        self.step += 1
        self._become_current(self)

    def close(self) -> None:
        """Free all caches; the loop around this one, if it is alive, goes on."""
        session = self._session()
        is_current = session is not None and current_generation(session) is self
        self.closed = True
        self.drop_caches()
        if is_current:
            outer = self._outer
            while outer is not None and outer.closed:
                outer = outer._outer
            self._become_current(outer)
        self._outer = None

    def drop_caches(self) -> None:
        for slot in self.slots.values():
            slot.forget()
        self.slots.clear()

    def _become_current(self, generation: Generation | None) -> None:
        running = dict(_running.get({}))
        session = self._session()
        if session is not None:
            running.pop(session, None)
            if generation is not None:
                running[session] = generation, generation.step
        _running.set(running)


def current_generation(session: Session) -> Generation | None:
    """The generation that a model call made here and now belongs to.

    None where another thread has since ended the loop or gone on with it: the call may be another picture's.
    """
    generation, step = _running.get({}).get(session, (None, -1))
    return None if generation is None or generation.closed or generation.step != step else generation


def run_steps(session: Session, iterable: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of `iterable`, one step of a generation each; caches are freed however the loop ends."""
    generation = session.begin(steps_at_most(iterable))
    try:
        for item in iterable:
            generation.advance()
            yield item
    finally:
        generation.close()


def steps_at_most(iterable: object) -> int | None:
    """How many items there can be, where that is known without taking any: None otherwise.

    Looks into `zip`, `enumerate`, `reversed` and Python's own iterators; asks everything else for its `len`.
    """
    if type(iterable) is zip:
        state: tuple[Any, ...] = tuple(iterable.__reduce__())
        known = [count for count in map(steps_at_most, state[1]) if count is not None]
        return min(known, default=None)
    if type(iterable) is enumerate:
        return steps_at_most(iterable.__reduce__()[1][0])
    if type(iterable) in _EXACT_ITERATORS:
        return length_hint(iterable)
    try:
        return len(iterable)  # type: ignore[arg-type]
    except Exception:  # user code: a loader without a length, a tqdm over a generator
        return None
