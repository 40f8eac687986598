"""Which implementation of an operator runs, and why it is not the other one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from chipmunk.ops import launch

IMPLEMENTATIONS = ("auto", "reference", "triton")

_fallbacks: ContextVar[Counter[str] | None] = ContextVar("chipmunk_fallbacks", default=None)

_dense_only: ContextVar[bool] = ContextVar("chipmunk_dense_only", default=False)

override: dict[str, dict[str, int]] = {}
"""Launch parameters that a benchmark puts here; operator → parameters. Nothing else should."""

_repeated: dict[object, launch.Repeated] = {}
"""What calls in Triton launched, by operator and the form of its arguments."""

Result = TypeVar("Result")


@contextmanager
def dense_results_only() -> Iterator[None]:
    """While this is open, attention computes its dense output alone: column sums and differences hold anything.

    For a first step whose caches the next step makes anew: it runs the graph of a full step without paying for it.
    """
    token = _dense_only.set(True)
    try:
        yield
    finally:
        _dense_only.reset(token)


def is_dense_only() -> bool:
    """Whether nobody wants column sums and differences now."""
    return _dense_only.get()


@contextmanager
def record_fallbacks(counter: Counter[str]) -> Iterator[None]:
    """While this is open, each time `auto` passes Triton over on a GPU, "operator: reason" is counted in `counter`."""
    token = _fallbacks.set(counter)
    try:
        yield
    finally:
        _fallbacks.reset(token)


@cache
def _triton_module(operator: str) -> ModuleType | str:
    """The module with the operator's Triton implementation, or why there is none."""
    name = f"chipmunk.ops.{operator}.triton"
    try:
        return import_module(name)
    except ImportError as error:
        return "not written yet" if error.name == name else f"Triton cannot be imported ({error})"


def call(
    operator: str, implementation: str, reference: Callable[..., Result], expect: Callable[..., None], *args: Any
) -> Result:
    """Run `operator` on `args` by the chosen implementation; the device of the first, a tensor, decides.

    expect: raises ValueError for arguments that the operator's contract does not allow.
    Raises ValueError for an unknown implementation too, NotImplementedError where Triton was asked for and cannot run.
    """
    in_triton = implementation == "triton" or (implementation == "auto" and args[0].device.type == "cuda")
    form = None
    if in_triton and not override:
        form = (operator, *launch.form(args))
        repeated = _repeated.get(form)
        if repeated is not None:  # a call of this form was allowed, and ran in Triton
            again: Result = repeated(args)
            return again
    expect(*args)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")
    if not in_triton:
        return reference(*args)
    reason = why_not_triton(operator, *args)
    if reason is None:
        with launch.recording() as recorded:
            result: Result = getattr(_triton_module(operator), operator)(*args)
        repeated = recorded.repeated(args, result)
        if form is not None and repeated is not None:
            _repeated[form] = repeated
        return result
    if implementation == "triton":
        raise NotImplementedError(
            f"chipmunk::{operator} has no Triton implementation for this call: {reason}. "
            "Set `implementation: auto` to let it run in PyTorch."
        )
    counter = _fallbacks.get()
    if counter is not None:
        counter[f"{operator}: {reason}"] += 1
    return reference(*args)


def why_not_triton(operator: str, *args: Any) -> str | None:
    """Why Triton cannot run `operator` on `args`; None where it can."""
    module = _triton_module(operator)
    reason: str | None = module if isinstance(module, str) else module.unsupported(*args)
    return reason


def prepare(operator: str, implementation: str, *args: Any) -> None:
    """Compile what `call` with these arguments, which may hold no data, is going to run. To be called from fakes."""
    if implementation == "reference" or args[0].device.type != "cuda":
        return
    if not all(type(size) is int for arg in args if isinstance(arg, Tensor) for size in arg.shape):
        return  # a graph for any size: asking for one would tie it to that
    module = _triton_module(operator)
    if not isinstance(module, str) and module.unsupported(*args) is None:
        launch.compile_ahead(getattr(module, operator), args[0].device, *args)


def groups_of(rows: int, group: int) -> int:
    """How many groups of `group` consecutive rows, the last one partial, `rows` rows make."""
    return (rows + group - 1) // group


def check(condition: bool, operator: str, message: str) -> None:
    """Raise ValueError for an input that the operator's contract does not allow."""
    if not condition:
        raise ValueError(f"chipmunk::{operator}: {message}")
