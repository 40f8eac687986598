"""Launching the Triton kernels, repeating what was launched, and compiling kernels ahead of their first launch.

A launch through Triton binds, checks and hashes some thirty arguments anew, and before it an operator checks its own
and works out grids and strides: 80 µs of the processor for kernels that may run no longer. All of it follows
from the form of the arguments. So what a call launched is remembered by their `form`, and the next call of this form
launches the same on its own tensors (`Repeated`).

While `torch.compile` traces a block, it asks every operator for the shape of its result. At that moment shapes, dtypes
and strides are known, so the kernels that the operator is going to launch are compiled then, in the compiler's worker
processes, and not one after the other when the block first runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("chipmunk")

_ahead: ContextVar[torch.device | None] = ContextVar("chipmunk_ahead", default=None)
_asked: set[object] = set()
"""What was compiled ahead: kernel, dtypes of its tensors, its numbers."""
_pending: dict[Any, list[Future[None]]] = {}


class Recording:
    """What a call of an operator allocates and launches."""

    def __init__(self) -> None:
        self.allocated: list[Tensor] = []
        self.launched: list[tuple[Callable[..., None], tuple[Any, ...], tuple[object, ...]]] = []
        """How a compiled kernel is launched, its arguments, its constants."""
        self.is_repeatable = True

    def repeated(self, args: tuple[Any, ...], result: object) -> Repeated | None:
        """What repeats the call with these arguments that had this result; None where that cannot be known."""
        places: dict[int, int] = {}
        for place, tensor in enumerate((*args, *self.allocated)):
            if isinstance(tensor, Tensor) and places.setdefault(id(tensor), place) != place:
                return None  # one tensor in two places: which of them a kernel was given is not known
        given = [arg for _, tensors, _ in self.launched for arg in tensors if isinstance(arg, Tensor)]
        known = all(id(tensor) in places for tensor in (*given, *([] if result is None else [result])))
        if not known or not self.launched or not self.is_repeatable:
            return None
        launches = []
        for run, arguments, constants in self.launched:
            chosen = [places[id(arg)] for arg in arguments if isinstance(arg, Tensor)]
            launches.append((run, chosen, arguments[len(chosen) :] + constants))
        return Repeated(self.allocated, launches, None if result is None else places[id(result)])


class Repeated:
    """A call of an operator carried out once more, with other tensors of the same form."""

    def __init__(
        self,
        allocated: list[Tensor],
        launches: list[tuple[Callable[..., None], list[int], tuple[object, ...]]],
        result: int | None,
    ) -> None:
        """launches: of each, how the kernel is launched, its tensors by place (arguments, then allocated), the rest."""
        self._allocated = [(each.shape, each.stride(), each.dtype, each.device) for each in allocated]
        self._launches = launches
        self._result = result

    def __call__(self, args: tuple[Any, ...]) -> Any:
        """Allocate, launch, return what the operator returns."""
        fresh = [torch.empty_strided(*size, dtype=dtype, device=device) for *size, dtype, device in self._allocated]
        tensors = (*args, *fresh)
        for run, places, rest in self._launches:
            run(*[tensors[place] for place in places], *rest)
        return None if self._result is None else tensors[self._result]


_recording: ContextVar[Recording | None] = ContextVar("chipmunk_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """While this is open, `launch` and `empty` note what they do."""
    recorded = Recording()
    token = _recording.set(recorded)
    try:
        yield recorded
    finally:
        _recording.reset(token)


def do_not_repeat() -> None:
    """Say that the next call of this form may do something else: launch parameters are being tried out, say."""
    recorded = _recording.get()
    if recorded is not None:
        recorded.is_repeatable = False


def empty(size: tuple[int, ...], like: Tensor, *, dtype: torch.dtype | None = None, heads_last: bool = False) -> Tensor:
    """A tensor without values on the device of `like`, and in its dtype if none is named, for kernels to write to.

    heads_last: (B, H, N, D) that lies in memory as (B, N, H, D).
    """
    dtype = dtype or like.dtype
    if heads_last:
        _, heads, rows, width = size
        new = torch.empty_strided(
            size, (rows * heads * width, width, heads * width, 1), dtype=dtype, device=like.device
        )
    else:
        new = torch.empty(size, dtype=dtype, device=like.device)
    recorded = _recording.get()
    if recorded is not None:
        recorded.allocated.append(new)
    return new


def form(args: tuple[Any, ...]) -> tuple[object, ...]:
    """What launches depend on: of tensors, all but their values and where they lie."""
    return tuple(
        (each.shape, each.stride(), each.dtype, each.device, each.data_ptr() % 16) if isinstance(each, Tensor) else each
        for each in args
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or its compilation alone within `compiling_ahead`.

    args: the kernel's arguments up to its constants, in order, tensors first. options: constants and launch options.
    """
    device = _ahead.get()
    if device is not None:
        _compile_ahead(device, kernel, args, options)
        return
    if _pending:  # it may be in the making: twice would take longer
        for future in _pending.pop(kernel, ()):
            future.exception()
    compiled = kernel[grid](*args, **options)
    recorded = _recording.get()
    if recorded is None:
        return
    if compiled is None:  # Triton's interpreter compiles nothing
        recorded.is_repeatable = False
        return
    constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
    recorded.launched.append((compiled[(*grid, 1, 1)[:3]], args, constants))


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


@cache
def workers() -> Any:
    """PyTorch's own pool of processes that compile kernels, started now if it was not; None where there is none."""
    try:
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

        _set_triton_ptxas_path()  # theirs: what another assembler made is no hit in Triton's cache
        # starts it, and looks from now on whether it is ready
        AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]
        return AsyncCompile.process_pool()
    except Exception as error:  # one thread only, or another PyTorch
        _log.debug("no processes to compile in: %s", error)
        return None


def _compile_ahead(device: torch.device, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    plain = [each.dtype if isinstance(each, Tensor) else each for each in args]
    key = (device, kernel, *plain, *options.items())
    pool = workers()
    if key in _asked or pool is None:
        return
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from triton.runtime import driver

    _asked.add(key)
    # where the compiler, and so every launch after its first graph, keeps kernels
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
    environment = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    target = driver.active.get_current_target()
    job = (kernel.fn.__module__, kernel.fn.__name__, target, plain, options, environment)
    _pending.setdefault(kernel, []).append(pool.submit(compile_to_disk, *job))


def compile_to_disk(
    module: str, name: str, target: Any, args: list[Any], options: dict[str, Any], environment: dict[str, str]
) -> None:
    """In a worker, which has no GPU: compile a kernel and the code that launches it into Triton's cache on disk.

    target: Triton's description of the GPU. args: as for a launch, with dtypes in place of tensors.
    """
    os.environ.update(environment)
    from triton.runtime import driver

    driver.set_active(_Absent(target))
    compiled = getattr(import_module(module), name).warmup(*args, grid=(1,), **options)
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(compiled.src, compiled.metadata)


class _Absent:
    """A driver for a GPU that is not there, to compile for it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
