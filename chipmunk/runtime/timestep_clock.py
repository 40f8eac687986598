"""Steps counted by the model's own timestep, for calls that no marked sampling loop makes.

A sampler in another package, a server or a loop that cannot be marked drives the model: all that is seen is one call
after the other. A step is a new timestep, a generation a run of timesteps in one direction, and a call slot all calls
whose inputs, the image and the timestep aside, are the same numbers. Whatever cannot be told apart runs dense.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from inspect import BoundArguments
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chipmunk.runtime.clock import Generation

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

IDLE_SECONDS = 60.0
"""A pause after which the image is taken for finished, or given up; four times the longest one seen, if longer."""

LIKENESS = 0.5
"""The cosine between an image and the same image one step later is at least this."""

NEXT_LIKENESS = 0.98
"""The cosine between an image and the same image one step later, at the same timestep, is at least this."""

_FORGOTTEN_AFTER = 2
"""Steps without a call after which a call slot is forgotten."""


@dataclass(eq=False)
class _Caller:
    """Calls that belong together: a call slot of a generation."""

    name: str
    tag: str
    shapes: tuple[object, ...]
    given: list[Tensor]
    """Copies of the inputs that every call of this slot shares."""
    image: Tensor
    """A copy of the last image tokens: the next ones are much the same."""
    last_step: int = -1
    calls: int = 0
    """At the last timestep."""
    mixed: bool = False
    """Whether calls at one timestep were the same but for the image, not long ago."""


class TimestepClock:
    """Places each call in a generation, at a step and in a slot. One image at a time; the session's lock is held."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._generation: Generation | None = None
        self._callers: list[_Caller] = []
        self._timesteps: list[float] = []
        """Those of this generation so far, in order."""
        self._before: list[float] = []
        """Those of the generation before."""
        self._is_usual = False
        """Whether they were those of the one before that, too: then this one will end with the same."""
        self._last: float | None = None
        """The schedule's last timestep, where the schedule is among the inputs."""
        self._rises: bool | None = None
        """The direction of this generation; None until it has two timesteps."""
        self._began_by_rising = False
        self._owner: tuple[int, int] = (0, 0)
        self._returned = 0.0
        """When the last call returned."""
        self._longest_pause = 0.0
        self._timer: threading.Timer | None = None

    def place(self, name: str, bound: BoundArguments) -> tuple[Generation, str] | str:
        """The generation and slot of a call tagged `name`, or why it has none.

        Reads the timestep on the host, and with it whether the inputs are those of a known slot: where they are on a
        GPU, one synchronisation a call.
        """
        session = self._session()
        assert session is not None
        assert session.spec.timesteps is not None
        timestep = bound.arguments.get(session.spec.timesteps)
        image = bound.arguments[session.spec.image].detach()
        given, shapes = list(_shared_inputs(session, bound)), shapes_of(bound)
        candidates = [c for c in self._callers if c.tag == name and c.shapes == shapes]
        read = _read(timestep, [_compared(c, given, image) for c in candidates])
        if isinstance(read, str):
            return read
        now, compared = read
        pairs = zip(candidates, compared, strict=True)
        caller, likeness, is_same = next(
            ((c, cosine, same) for c, (ours, cosine, same) in pairs if ours), (None, 1.0, 0.0)
        )
        is_other = caller is not None and not caller.mixed and likeness < LIKENESS
        is_next = caller is not None and not caller.mixed and likeness >= NEXT_LIKENESS and not is_same
        is_next = is_next and caller is not None and self._is_at(caller.last_step)
        if self._advance(session, now, bound, is_other, is_next):
            caller, candidates = None, []
        generation = self._generation
        assert generation is not None
        if caller is None:
            if generation.step > 0 and any(c.last_step < generation.step for c in candidates):
                session.recorder.restarts["an input besides the image changed"] += 1
            caller = _Caller(self._name(name), name, shapes, [x.clone() for x in given], image.clone())
            self._callers.append(caller)
        if caller.last_step == generation.step:
            caller.mixed = True
            self._forget(caller)
        elif caller.calls == 1:
            caller.mixed = False
        caller.calls = caller.calls + 1 if caller.last_step == generation.step else 1
        caller.last_step, caller.image = generation.step, image.clone()
        if caller.mixed:
            return "calls at one timestep that cannot be told apart"
        return generation, caller.name

    def _is_at(self, step: int) -> bool:
        return self._generation is not None and self._generation.step == step

    def _advance(self, session: Session, now: float, bound: BoundArguments, is_other: bool, is_next: bool) -> bool:
        """Move on to the timestep `now`; True if a new generation began.

        is_other: the image is not the last one's. is_next: it is, a little changed, so this is a step in any case: the
        timestep may have been rounded, or the solver comes back to it.
        """
        owner, pause = _owner(), time.monotonic() - self._returned
        alone = len(self._timesteps) == 1
        if self._generation is None or owner != self._owner or pause > self._patience():
            self._begin(session, now, bound)
        elif now != self._timesteps[-1] or is_next:
            rises = now > self._timesteps[-1] if now != self._timesteps[-1] else self._rises
            if is_other:
                self._begin(session, now, bound)
            elif self._rises is None and rises and not (alone and self._began_by_rising):
                # One timestep, then a higher one: a second image, unless the next one is higher again.
                self._begin(session, now, bound)
                self._began_by_rising = True
            elif self._rises is not None and rises != self._rises:
                self._begin(session, now, bound)
            else:
                self._rises = rises
                self._longest_pause = max(self._longest_pause, pause)
                self._generation.step += 1
                self._timesteps.append(now)
                for caller in list(self._callers):
                    if caller.last_step < self._generation.step - _FORGOTTEN_AFTER:
                        self._forget(caller)
                        self._callers.remove(caller)
                return False
        else:
            return False
        self._owner = owner
        return True

    def _begin(self, session: Session, now: float, bound: BoundArguments) -> None:
        self.free()
        schedule = _schedule(session, now, bound)
        self._last = None if schedule is None else schedule[-1]
        self._generation = session.begin(None if schedule is None else len(schedule))
        self._generation.step = 0
        self._timesteps = [now]
        self._rises, self._began_by_rising, self._longest_pause = None, False, 0.0

    def returned(self, name: str) -> None:
        """A call from the slot `name` has returned: free its caches if it was the last one, or else after a while."""
        self._returned = time.monotonic()
        if self._is_over():
            for caller in self._callers:
                if caller.name == name:
                    self._forget(caller)
        if self._timer is None and self._generation is not None:
            self._wait(self._patience())

    def failed(self) -> None:
        """A call has raised an exception: whatever comes next is another image, or the same one from the start."""
        self.free()

    def _is_over(self) -> bool:
        """Whether the schedule says that no step will follow, or else the generation before ended here."""
        if not self._timesteps:
            return False
        if self._last is not None:
            return _close(self._timesteps[-1], self._last)
        return len(self._timesteps) > 2 and self._is_usual and self._timesteps == self._before

    def free(self) -> None:
        """The image is done, or given up: free all caches."""
        if self._generation is not None:
            self._generation.drop_caches()
            self._generation, self._callers = None, []
            self._is_usual = self._before == self._timesteps
            self._before, self._timesteps = self._timesteps, []

    def _forget(self, caller: _Caller) -> None:
        assert self._generation is not None
        slot = self._generation.slots.pop(caller.name, None)
        if slot is not None:
            slot.forget()

    def _name(self, tag: str) -> str:
        taken = {caller.name for caller in self._callers}
        names = (tag if number == 1 else f"{tag} {number}" for number in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)

    def _patience(self) -> float:
        return max(IDLE_SECONDS, 4 * self._longest_pause)

    # A thread of its own wakes up once nothing has happened for a while. It keeps neither session nor model alive.

    def _wait(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, _free_if_idle, (self._session,))
        self._timer.daemon = True
        self._timer.start()

    def woken(self) -> None:
        """Free what has been idle for long enough; otherwise wait on."""
        self._timer = None
        left = self._patience() - (time.monotonic() - self._returned)
        if left <= 0:
            self.free()
        elif self._generation is not None:
            self._wait(left)


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-3 * abs(second)


def _free_if_idle(reference: weakref.ref[Session]) -> None:
    session = reference()
    if session is not None and session.clock is not None:
        with session.lock:
            session.clock.woken()


def shapes_of(bound: BoundArguments) -> tuple[object, ...]:
    """Shape, dtype and device of every tensor that the model is given."""
    tensors = [value for value in bound.arguments.values() if isinstance(value, Tensor)]
    return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)


def _named(bound: BoundArguments) -> Iterator[tuple[str, Any]]:
    """Every argument by name, those of `**kwargs` among them."""
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is bound.signature.parameters[name].VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _shared_inputs(session: Session, bound: BoundArguments) -> Iterator[Tensor]:
    """Inputs that all calls of a slot share: text, pooled text and their like, (B, …, C). Lists hold residuals."""
    spec = session.spec
    for name, value in _named(bound):
        if isinstance(value, Tensor) and value.dim() >= 2 and name not in (spec.image, spec.ids, spec.timesteps):
            yield value.detach()


def _compared(caller: _Caller, given: list[Tensor], image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the inputs are the slot's, how much the image is like its last one, and whether it is that very one."""
    return _all_equal(caller.given, given), _cosine(caller.image, image), _all_equal([caller.image], [image])


def _all_equal(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """1 if the tensors, of equal shapes, hold the same numbers, else 0."""
    equal = torch.ones((), device="cpu")
    for a, b in zip(first, second, strict=True):
        equal = equal.to(a.device) * (a == b).all()
    return equal


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine between two images, the smallest in the batch; 1 where one of them is empty."""
    a, b = first.flatten(1).float(), second.flatten(1).float()
    squares = (a * a).sum(1) * (b * b).sum(1)
    return torch.where(squares > 0, (a * b).sum(1) / squares.sqrt(), torch.ones_like(squares)).min()


def _read(
    timestep: Any, compared: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[float, list[tuple[float, float, float]]] | str:
    """The timestep as a number, and the results of the comparisons, all in one read from the device."""
    if isinstance(timestep, int | float):
        timestep = torch.tensor([timestep], dtype=torch.float32, device="cpu")
    if not isinstance(timestep, Tensor) or timestep.numel() == 0 or timestep.is_complex():
        return "the timestep is no number"
    times = timestep.detach().float()
    device = compared[0][1].device if compared else times.device
    numbers = [times.min(), times.max(), *(number for pair in compared for number in pair)]
    low, high, *rest = torch.stack([number.to(device) for number in numbers]).tolist()
    if low != high:
        return "the timesteps differ within the batch"
    return low, list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))


def _schedule(session: Session, now: float, bound: BoundArguments) -> list[float] | None:
    """The timesteps from `now` to the last one, where an input lists them: a row of falling numbers, `now` among them.

    A 0 at the end is where the image is finished: the model is not called there.
    """
    spec = session.spec
    for name, value in _named(bound):
        if name in (spec.image, spec.ids, spec.timesteps):
            continue
        for entry in value.values() if isinstance(value, dict) else (value,):
            if isinstance(entry, Tensor) and entry.dim() == 1 and 2 <= entry.numel() <= 1000 and not entry.is_complex():
                times = [float(time) for time in entry.tolist()]
                falls = all(a > b for a, b in pairwise(times))
                close = [index for index, time in enumerate(times) if _close(time, now)]
                if falls and len(close) == 1 and times[close[0] :] != [0.0]:
                    return [time for time in times[close[0] :] if time != 0 or time == now]
    return None


def _owner() -> tuple[int, int]:
    """The thread, and the asyncio task if there is one, that makes the call."""
    task = None
    if "asyncio" in sys.modules:
        with suppress(RuntimeError):  # no event loop runs here
            task = sys.modules["asyncio"].current_task()
    return threading.get_ident(), id(task)
