"""What drawing one image came to: each call of the model, with its step and the place in the loop that made it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCall:
    """One call of the model, in the order in which they were made."""

    step: int
    slot: str
    """The line of the loop that made it, as text."""
    output: Tensor


@dataclass
class Drawn:
    """What one image came to."""

    calls: list[ModelCall] = field(default_factory=list)
    latents: Tensor | None = None


def unwrapped(function: Callable[..., Any]) -> Any:
    """The function inside decorators such as `torch.no_grad()`."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__func__", function)


@contextmanager
def record(model: nn.Module, loop: CodeType, drawn: Drawn) -> Iterator[None]:
    """While this is open, note each call of `model`, with the step and the line of `loop` that it comes from.

    A step ends where a line makes a call that stands above, or is, one that has made a call in it already. A new
    activation of the loop starts again at step 0.
    """
    activation: FrameType | None = None
    step, line = -1, 0

    def after(model: nn.Module, args: Any, output: Any) -> None:
        nonlocal activation, step, line
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not loop:
            frame = frame.f_back
        if frame is not activation:
            activation, step, line = frame, -1, 1 << 30
        here = 0 if frame is None else frame.f_lineno
        step += here <= line
        line = here
        result = output[0] if isinstance(output, tuple) else output
        drawn.calls.append(ModelCall(step, str(here), result.detach().clone()))

    handle = model.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
