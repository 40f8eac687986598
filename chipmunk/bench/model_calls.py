"""What is noted about each call of the model while a picture is drawn: its time, and what Chipmunk did in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from chipmunk.bench.device import mark
from chipmunk.runtime.layer_state import DONE, LayerState
from chipmunk.runtime.session import Session


class Calls:
    """What is noted about each call of the model."""

    def __init__(self, session: Session | None, cuda: bool) -> None:
        self.session = session
        self.cuda = cuda
        self.marks: list[tuple[Any, Any]] = []
        self.kinds: list[str] = []
        self.kept: dict[str, float] = {}

    def before(self, *_: object) -> None:
        self.marks.append((self._now(), None))

    def after(self, *_: object) -> None:
        self.marks[-1] = (self.marks[-1][0], self._now())
        if self.session is None:
            self.kinds.append("dense")
            return
        if was_skipped(self.session):
            self.kinds.append("skipped")
            return
        state = state_of_last_call(self.session)
        self.kinds.append("dense/dense" if state is None else kind(state))
        if state is not None and "sparse" in self.kinds[-1] and len(self.kept) < 2:
            if state.keys is not None and state.difference is not None:
                self.kept["keys"] = state.keys.shape[-1] / state.difference.shape[2]
            if state.neurons is not None and state.activations is not None:
                self.kept["neurons"] = state.neurons.shape[-1] / state.activations.shape[-1]

    def milliseconds(self) -> list[float]:
        if self.cuda:
            return [float(start.elapsed_time(end)) for start, end in self.marks]
        return [1e3 * (end - start) for start, end in self.marks]

    def _now(self) -> Any:
        return mark() if self.cuda else time.perf_counter()


@contextmanager
def model_calls(model: nn.Module, session: Session | None, cuda: bool) -> Iterator[Calls]:
    """Note each call of the model between hooks."""
    calls = Calls(session, cuda)
    handles = [model.register_forward_pre_hook(calls.before), model.register_forward_hook(calls.after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def was_skipped(session: Session) -> bool:
    """Whether no block ran in the last call."""
    return any(
        slot.skipped and slot.last_step == generation.step
        for generation in session.generations
        for slot in generation.slots.values()
    )


def state_of_last_call(session: Session) -> LayerState | None:
    """The state of the last layer after a call; None where the whole call was dense."""
    for generation in session.generations:
        for slot in generation.slots.values():
            state: LayerState | None = slot.layers[-1]
            if state is not None and slot.last_step == generation.step:
                return state
    return None


def kind(state: LayerState) -> str:
    """What a layer's attention and MLP did in the last call, `full/sparse` say.

    What was planned and then did not pay, for so few tokens say, ran dense.
    """
    attention = state.attention if state.attention_done == DONE else "dense"
    mlp = state.mlp if state.mlp_done == DONE else "dense"
    return f"{attention}/{mlp}"
