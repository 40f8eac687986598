"""Launching the Triton kernels, and compiling them ahead of their first launch.

While `torch.compile` traces a block, it asks every operator for the shape of its result. At that moment shapes, dtypes
and strides are known, so the kernels that the operator is going to launch are compiled then, in threads beside the
compiler's own work, and not one after the other when the block first runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

_THREADS = 8
_ahead: ContextVar[torch.device | None] = ContextVar("chipmunk_ahead", default=None)
_asked: set[object] = set()
"""What was compiled ahead: kernel, dtypes of its tensors, its numbers."""
_pending: dict[Any, list[Future[None]]] = {}

_log = logging.getLogger("chipmunk")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or its compilation alone within `compiling_ahead`."""
    device = _ahead.get()
    if device is not None:
        _compile(device, kernel, args, options)
        return
    if _pending:  # it may be in the making: twice would take longer
        for future in _pending.pop(kernel, ()):
            future.result()
    kernel[grid](*args, **options)


def is_ahead() -> bool:
    """Whether kernels are being compiled ahead: tensors hold no numbers then."""
    return _ahead.get() is not None


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """While this is open, `launch` only compiles, for `device`, in the background; it takes tensors without data."""
    token = _ahead.set(device)
    try:
        yield
    finally:
        _ahead.reset(token)


def compile_ahead(operator: Callable[..., object], device: torch.device, *args: Any) -> None:
    """Compile what `operator(*args)` launches. What cannot be compiled now is compiled at its first launch."""
    try:
        with compiling_ahead(device):
            operator(*args)
    except Exception as error:  # the first launch meets it again, and raises it where it belongs
        _log.debug("%s was not compiled ahead: %s", operator, error)


def _compile(device: torch.device, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    plain = [each.dtype if isinstance(each, Tensor) else each for each in args]
    key = (device, kernel, *plain, *sorted(options.items()))
    if key in _asked:
        return
    _asked.add(key)

    def compile_kernel() -> None:
        try:
            if device.type == "cuda" and torch.cuda.is_available():
                torch.cuda.set_device(device)
            kernel.warmup(*plain, grid=(1,), **options)
        except Exception as error:
            _log.debug("%s was not compiled ahead: %s", kernel, error)

    _pending.setdefault(kernel, []).append(_threads().submit(compile_kernel))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="chipmunk-compile")
