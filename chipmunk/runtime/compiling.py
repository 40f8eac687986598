"""Compiling the blocks of a model in place, where that is wanted and nobody has done it yet."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Literal

import torch
from torch import nn

from chipmunk.ops import launch
from chipmunk.runtime.kernel_choices import rows_in_registers

BACKEND = "inductor"
_RECOMPILE_LIMIT = 64
"""Graphs of one block class: four kinds of step for each of sixteen image sizes."""


class BlockCompiler:
    """Compiles blocks with `nn.Module.compile`, which keeps classes, names and pickles; `undo` takes it back."""

    def __init__(self, wanted: Literal["auto"] | bool) -> None:
        self.wanted = wanted
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def has_compiled(self) -> bool:
        return len(self._compiled) > 0

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
        for block in blocks:
            if block not in self._compiled and not block._forward_hooks and "forward" not in block.__dict__:
                # One static graph for each size: dynamic shapes would be slower at all of them.
                block.compile(backend=BACKEND, dynamic=False)
                self._compiled.add(block)

    def undo(self) -> None:
        for block in list(self._compiled):
            block._compiled_call_impl = None
        self._compiled.clear()

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
