"""Launching the Triton kernels, and compiling them ahead of their first launch.

A launch through Triton binds, checks and hashes some thirty arguments anew. What a kernel was compiled to depends on
few things, so it is remembered by these, and launched directly the next time.

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
_compiled: dict[object, tuple[Callable[..., None], tuple[object, ...]]] = {}
"""How to launch what a kernel was compiled to, and its constants."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, or its compilation alone within `compiling_ahead`.

    args: the kernel's arguments up to its constants, in order, a tensor first. options: constants and launch options.
    """
    device = _ahead.get()
    if device is not None:
        _compile_ahead(device, kernel, args, options)
        return
    # Triton compiles for dtypes, the alignment of pointers, and what some integers are; the rest of the key costs less
    # than finding out which.
    key = (
        kernel,
        grid,
        args[0].device if isinstance(args[0], Tensor) else None,
        *((each.dtype, each.data_ptr() % 16) if isinstance(each, Tensor) else each for each in args),
        *options.items(),
    )
    known = _compiled.get(key)
    if known is not None:
        run, constants = known
        run(*args, *constants)
        return
    if _pending:  # it may be in the making: twice would take longer
        for future in _pending.pop(kernel, ()):
            future.exception()
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = (compiled[(*grid, 1, 1)[:3]], constants)


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
