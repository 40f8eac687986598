"""Registering the operators with PyTorch, so that compiled code can call them.

Not with `torch.library.custom_op`: its layers of Python cost 5 µs more a call, and a block makes four of them a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("chipmunk", "FRAGMENT")  # type: ignore[no-untyped-call]

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.ops.chipmunk.<name>`, which the decorated name becomes.

    schema: in PyTorch's notation, `(Tensor x, Tensor(a!) cache) -> Tensor`; what is mutated carries a `!`. No
    result may share memory with an argument. There is no gradient.
    """

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return getattr(torch.ops.chipmunk, name).default

    return register


def fake(name: str) -> Callable[[Function], Function]:
    """Register what the operator returns for tensors without data, as a decorator."""

    def register(function: Function) -> Function:
        torch.library.register_fake(f"chipmunk::{name}", function, lib=_LIBRARY)
        return function

    return register
