"""Steps counted by the scheduler of the diffusers pipeline that makes the call.

The scheduler knows its position without asking the GPU, and exactly: the timestep that the transformer is given is
rounded to its dtype, and in bfloat16 the first steps of a long schedule are one number. Calls that no pipeline makes,
or one whose scheduler does not move, are placed by their timestep after all.
"""

from __future__ import annotations

import sys
import threading
import weakref
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from chipmunk.runtime.clock import Generation
from chipmunk.runtime.timestep_clock import IDLE_SECONDS, TimestepClock, shapes_of

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

_PIPELINES = {"DiffusionPipeline", "ModularPipeline"}
_MOST_SLOTS = 8
"""More prompts than that in one image are not told apart: the pipeline makes its inputs anew in every step."""
_DEEPEST_CALL = 60
"""Frames between a pipeline and its transformer's forward, with every wrapper there is."""


class _Caller:
    """A call slot: the calls of a generation with the same text."""

    def __init__(self, name: str, tag: str, shapes: tuple[object, ...], given: tuple[Tensor, ...]) -> None:
        self.name, self.tag, self.shapes, self.given = name, tag, shapes, given
        self.last_step = -1


class _Run:
    """One image of one pipeline."""

    def __init__(self, scheduler: Any, generation: Generation, timesteps: Tensor, position: int) -> None:
        self.scheduler = weakref.ref(scheduler)
        self.generation = generation
        self.timesteps = timesteps
        self.position = position
        self.callers: list[_Caller] = []
        self.stands_still = False
        """Whether the loop calls the transformer again and again at one position of its scheduler."""


class SchedulerClock:
    """Places each call in a generation, at a step and in a slot; the session's lock is held."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._by_timestep = TimestepClock(session)
        self._runs: dict[int, _Run] = {}
        """By scheduler (`id`): pipelines that share the transformer may take turns."""
        self._calling: _Run | None = None
        self._timer: threading.Timer | None = None
        self._calls = 0
        """How many there were: the timer asks whether any came since it was set."""

    def place(self, name: str, bound: BoundArguments) -> tuple[Generation, str] | str:
        """The generation and slot of a call tagged `name`, or why it has none."""
        session = self._session()
        assert session is not None
        self._calling = None
        self._calls += 1
        found = _position(bound.args[0])
        if found is None:
            return self._by_timestep.place(name, bound)
        scheduler, timesteps, position = found
        run = self._runs.get(id(scheduler))
        if run is None or run.scheduler() is not scheduler or run.timesteps is not timesteps or position < run.position:
            self._drop(run)
            generation = session.begin(len(timesteps) - position)
            generation.step = 0
            run = self._runs[id(scheduler)] = _Run(scheduler, generation, timesteps, position)
        elif position > run.position:
            run.position, run.stands_still = position, False
            run.generation.step += 1
        if run.stands_still:
            return self._by_timestep.place(name, bound)
        self._calling = run
        caller = self._caller(session, run, name, bound)
        if caller is None:
            return "its text inputs are made anew in every step"
        if caller.last_step == run.generation.step:
            run.stands_still = True
            run.generation.drop_caches()
            run.callers.clear()
            self._calling = None
            return self._by_timestep.place(name, bound)
        caller.last_step = run.generation.step
        return run.generation, caller.name

    def _caller(self, session: Session, run: _Run, tag: str, bound: BoundArguments) -> _Caller | None:
        spec, shapes = session.spec, shapes_of(bound)
        given = tuple(
            value
            for name, value in bound.arguments.items()
            if isinstance(value, Tensor) and value.dim() >= 2 and name not in (spec.image, spec.ids)
        )
        for caller in run.callers:
            same = len(caller.given) == len(given) and all(a is b for a, b in zip(caller.given, given, strict=True))
            if same and caller.tag == tag and caller.shapes == shapes:
                return caller
        if len(run.callers) >= _MOST_SLOTS:
            return None
        if run.generation.step > 0 and any(c.last_step < run.generation.step - 1 for c in run.callers):
            session.recorder.restarts["an input besides the image changed"] += 1
        number = len(run.callers) + 1
        caller = _Caller(tag if number == 1 else f"{tag} {number}", tag, shapes, given)
        run.callers.append(caller)
        return caller

    def returned(self, name: str) -> None:
        """A call from the slot `name` has returned: free its caches if it was the last one, or else after a while."""
        run = self._calling
        if run is None:
            self._by_timestep.returned(name)
            return
        if run.position >= len(run.timesteps) - 1:
            slot = run.generation.slots.pop(name, None)
            if slot is not None:
                slot.forget()
            if all(caller.last_step == run.generation.step for caller in run.callers):
                self._drop(run)
                return
        if self._timer is None:
            self._wait()

    def failed(self) -> None:
        """A call has raised an exception: its image is given up."""
        if self._calling is None:
            self._by_timestep.failed()
        else:
            self._drop(self._calling)

    def free(self) -> None:
        """Free all caches."""
        for run in list(self._runs.values()):
            self._drop(run)
        self._by_timestep.free()

    def _drop(self, run: _Run | None) -> None:
        if run is not None:
            run.generation.drop_caches()
            run.callers.clear()
            if self._runs.get(id(run.scheduler())) is run or run.scheduler() is None:
                self._runs = {key: other for key, other in self._runs.items() if other is not run}

    # An image that was given up keeps its caches until the next one, or until nothing has happened for a while.

    def _wait(self) -> None:
        self._timer = threading.Timer(IDLE_SECONDS, _free_if_idle, (self._session, self._calls))
        self._timer.daemon = True
        self._timer.start()

    def woken(self, calls: int | None = None) -> None:
        """Free everything if there was no call since there were so many; otherwise wait on."""
        if calls is None:
            self._by_timestep.woken()
            return
        self._timer = None
        if calls == self._calls:
            self.free()
        elif self._runs:
            self._wait()


def _free_if_idle(reference: weakref.ref[Session], calls: int) -> None:
    session = reference()
    if session is not None and isinstance(session.clock, SchedulerClock):
        with session.lock:
            session.clock.woken(calls)


def _position(model: nn.Module) -> tuple[Any, Tensor, int] | None:
    """The scheduler of the pipeline whose loop makes this call, its timesteps, and which of them this is."""
    scheduler = _calling_scheduler(model)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or not hasattr(scheduler, "step_index"):
        return None
    position = scheduler.step_index
    if position is None:
        position = getattr(scheduler, "begin_index", None) or 0
    if getattr(scheduler, "num_inference_steps", None) is None or not 0 <= position < len(timesteps):
        return None
    return scheduler, timesteps, int(position)


def _calling_scheduler(model: nn.Module) -> Any:
    """The scheduler of the nearest pipeline on the stack that holds `model`: as `self`, or handed to a modular block.

    No pipeline is registered anywhere, so those that were made later, or share the transformer, are found as well.
    """
    frame = sys._getframe(2)
    for _ in range(_DEEPEST_CALL):
        code, outer = frame.f_code, frame.f_back
        if code.co_argcount:
            values = frame.f_locals
            for name in code.co_varnames[: min(code.co_argcount, 2)]:
                pipeline = values.get(name)
                if any(base.__name__ in _PIPELINES for base in type(pipeline).__mro__) and _holds(pipeline, model):
                    return getattr(pipeline, "scheduler", None)
        if outer is None:
            return None
        frame = outer
    return None


def _holds(pipeline: Any, model: nn.Module) -> bool:
    held = getattr(pipeline, "transformer", None)
    for name in ("_orig_mod", "module"):
        held = getattr(held, name, held)
    return held is model
