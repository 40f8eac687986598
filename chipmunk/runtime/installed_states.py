"""Where the code of blocks finds the states of their layers: put there for one call of the model, and taken away."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from torch import nn

from chipmunk.runtime.block_list import holders
from chipmunk.runtime.clock import CallSlot
from chipmunk.runtime.layer_state import ATTRIBUTE
from chipmunk.runtime.step_caching import ATTRIBUTE as STEP_ATTRIBUTE
from chipmunk.runtime.step_caching import StepCall

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session


@contextmanager
def states_installed(
    session: Session, blocks: Sequence[nn.Module], slot: CallSlot, step: StepCall | None
) -> Iterator[None]:
    """While this is open, each block finds the state of its layer, and the model that of its steps."""
    model = session.model()
    assert model is not None
    if step is not None:
        model.__dict__[STEP_ATTRIBUTE] = step
    try:
        with _installing:
            is_free = all(block.__dict__.get(ATTRIBUTE) is None for block in blocks)
            for module, state in holders(blocks, slot.layers) if is_free else ():
                state.thread = threading.get_ident()
                module.__dict__[ATTRIBUTE] = state
                session.installed.append(module)
        if not is_free and (step is None or not step.skip):
            session.recorder.dense_model_calls["another model's call runs these blocks"] += 1
        with nullcontext() if is_free else found_states_taken_away(blocks):
            yield
    finally:
        for block in session.installed:
            block.__dict__.pop(ATTRIBUTE, None)
        session.installed.clear()
        model.__dict__.pop(STEP_ATTRIBUTE, None)


_installing = threading.Lock()
"""Models in several threads may share blocks: the one whose call comes first runs sparse."""


@contextmanager
def found_states_taken_away(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While this is open, the blocks run as if Chipmunk were off, whatever call of this thread they are part of.

    Another thread's states are left to it: `state_of` does not give them to this one.
    """
    modules = [module for block in blocks for module in (block, *block.children())]
    found = [(module, module.__dict__.get(ATTRIBUTE)) for module in modules]
    own = [(module, state) for module, state in found if state and state.thread == threading.get_ident()]
    for module, _ in own:
        module.__dict__.pop(ATTRIBUTE, None)
    try:
        yield
    finally:
        for module, state in own:
            module.__dict__[ATTRIBUTE] = state


@contextmanager
def states_taken_away(session: Session, model: nn.Module) -> Iterator[None]:
    """While this is open, the blocks run as if Chipmunk were off."""
    step = model.__dict__.pop(STEP_ATTRIBUTE, None)
    states = [block.__dict__.pop(ATTRIBUTE, None) for block in session.installed]
    try:
        yield
    finally:
        for block, state in zip(session.installed, states, strict=True):
            block.__dict__[ATTRIBUTE] = state
        if step is not None:
            model.__dict__[STEP_ATTRIBUTE] = step
