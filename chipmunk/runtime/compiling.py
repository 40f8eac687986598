"""Compiling the blocks of a model in place, where that is wanted and nobody has done it yet."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from chipmunk.ops import launch
from chipmunk.runtime.kernel_choices import rows_in_registers

BACKEND = "inductor"
_RECOMPILE_LIMIT = 64
"""Graphs of one block class: four kinds of step for each of sixteen image sizes."""


def methods_of(block: nn.Module) -> tuple[str, ...]:
    """Names of what a model calls of a block whose class has no `forward`: methods whose names begin with that."""
    kind: Any = type(block)
    return _methods(kind) if kind.forward is nn.Module.forward else ()


@cache
def _methods(kind: Any) -> tuple[str, ...]:
    return tuple(name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.startswith("forward_"))


class BlockCompiler:
    """Compiles blocks with `nn.Module.compile`, which keeps classes, names and pickles; `undo` takes it back.

    A block that has no `forward` is run by a method of it, which is compiled in its place (`methods_in_place`).
    """

    def __init__(self, wanted: Literal["auto"] | bool) -> None:
        self.wanted = wanted
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._methods: dict[nn.Module, dict[str, Callable[..., Any]]] = {}
        """By block, its methods, compiled."""

    @property
    def has_compiled(self) -> bool:
        return len(self._compiled) > 0 or bool(self._methods)

    def prepare(self) -> None:
        """Load the compiler and start its worker processes now, so that the first image does not wait for them."""
        if self.wanted is not False and torch.cuda.is_available() and _is_worth_it(torch.device("cuda")):
            import_module("torch._inductor.compile_fx")
            launch.workers()

    def compile(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Compile the blocks, if the configuration and the device ask for it and the user has compiled none of them.

        Where the user has compiled the model as a whole, its graph ends at the forward that runs sparse: the blocks
        would run uncompiled.
        """
        if self.wanted is False or (self.wanted == "auto" and not _is_worth_it(device)):
            return
        if any(_is_compiled(module) for module in blocks if module not in self._compiled):
            return  # the user compiles, and knows how
        # One static graph for each size: dynamic shapes would be slower at all of them.
        for block in blocks:
            names = methods_of(block)
            if names and block not in self._methods:
                self._methods[block] = {
                    name: torch.compile(getattr(block, name), backend=BACKEND, dynamic=False) for name in names
                }
            if names or block in self._compiled or block._forward_hooks or "forward" in block.__dict__:
                continue
            block.compile(backend=BACKEND, dynamic=False)
            self._compiled.add(block)
        if len(self._methods) > len(blocks):  # what was compiled keeps its block alive: not those of long ago
            self._methods = {block: self._methods[block] for block in blocks if block in self._methods}

    @contextmanager
    def methods_in_place(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """While this is open, blocks have compiled methods in place of their own.

        No longer than a call takes, so that copies and pickles of the model have none.
        """
        placed: list[tuple[nn.Module, str]] = []
        try:
            for block in blocks if self._methods else ():
                for name, compiled in self._methods.get(block, {}).items():
                    if name not in block.__dict__:
                        block.__dict__[name] = compiled
                        placed.append((block, name))
            yield
        finally:
            for block, name in placed:
                block.__dict__.pop(name, None)

    def undo(self) -> None:
        for block in list(self._compiled):
            block._compiled_call_impl = None
        self._compiled.clear()
        self._methods.clear()

    def gives_up(self, error: BaseException) -> bool:
        """Whether `error` says that the compiler, which nobody asked for, does not work; if so, go on without it."""
        if self.wanted != "auto" or not self.has_compiled:
            return False
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return False
        self.undo()
        self.wanted = False
        return True

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What the compiler is to know while the model runs.

        Room for the graphs of all kinds of step at several image sizes, in blocks compiled here or by the user; and
        that users who did not compile anything may add hooks at any time.
        """
        if "torch._dynamo" not in sys.modules:
            yield
            return
        dynamo = torch._dynamo.config
        name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        changes: dict[str, int | bool] = {name: max(getattr(dynamo, name), _RECOMPILE_LIMIT)}
        if self.has_compiled:
            changes["skip_nnmodule_hook_guards"] = False
        with dynamo.patch(changes), rows_in_registers() if self.has_compiled else nullcontext():
            yield


def _is_compiled(module: nn.Module) -> bool:
    if any(name in module.__dict__ for name in methods_of(module)):
        return True  # another method in place of its own: the user's
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _is_worth_it(device: torch.device) -> bool:
    """Whether compiled blocks are faster on `device`, and the compiler has what it needs there."""
    if device.type != "cuda":
        return False
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return False
    return bool(has_triton())
