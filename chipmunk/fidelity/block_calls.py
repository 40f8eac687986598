"""When blocks run: called by the model as modules are, or by a method of theirs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def block_calls(
    blocks: Sequence[nn.Module], before: Callable[[int], object], after: Callable[[int], object] = lambda _: None
) -> Iterator[None]:
    """While this is open, `before` and `after` are told the index of each block that runs.

    What a block calls of its own is part of the call. Blocks without a `forward` are run by methods, of whatever name;
    so every method stands in the block's `__dict__` until this is closed, beside hooks for calls of the block itself.
    """
    depth = [0] * len(blocks)

    def enter(index: int) -> None:
        depth[index] += 1
        if depth[index] == 1:
            before(index)

    def leave(index: int) -> None:
        depth[index] -= 1
        if depth[index] == 0:
            after(index)

    def told(method: Callable[..., Any], index: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            enter(index)
            try:
                return method(*args, **kwargs)
            finally:
                leave(index)

        return call

    handles = []
    placed: list[tuple[nn.Module, str]] = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, index=index: enter(index)))
            handles.append(block.register_forward_hook(lambda *_, index=index: leave(index), always_call=True))
            for name in _own_methods(type(block)):
                if name not in block.__dict__:
                    block.__dict__[name] = told(getattr(block, name), index)
                    placed.append((block, name))
        yield
    finally:
        for block, name in placed:
            block.__dict__.pop(name, None)
        for handle in handles:
            handle.remove()


def _own_methods(kind: type[nn.Module]) -> list[str]:
    """Methods that are no module's in general, other than `forward`, which hooks go around."""
    found = inspect.getmembers(kind, inspect.isfunction)
    return [name for name, _ in found if not hasattr(nn.Module, name)]
