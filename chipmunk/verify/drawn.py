"""What drawing one image came to: each call of the model, with its step and the place in the loop that made it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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


def loop_at(source: str | bytes, line: int) -> ast.For | None:
    """The `for` on this line of a file; None if there is none, or if its body begins on the loop's own lines."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For) and node.lineno == line]
    return found[0] if found and _has_lines(found[0]) else None


def counted_loops(source: str | bytes, function: str) -> list[ast.For]:
    """The loops of a patched file's function, `denoise` or `Sampler.run`, whose rounds Chipmunk counts as steps."""
    found: list[ast.AST] = [ast.parse(source)]
    for name in function.split("."):
        parts = [part for node in found for part in ast.iter_child_nodes(node)]
        found = [part for part in parts if getattr(part, "name", None) == name]
    loops = sorted((n for node in found for n in ast.walk(node) if isinstance(n, ast.For)), key=lambda n: n.lineno)
    calls = [[n for n in ast.walk(loop.iter) if isinstance(n, ast.Call)] for loop in loops]
    steps = [[call for call in each if getattr(call.func, "attr", None) == "steps"] for each in calls]
    return [loop for loop, wrapped in zip(loops, steps, strict=True) if wrapped and _has_lines(loop)]


def _has_lines(loop: ast.For) -> bool:
    return loop.body[0].lineno > (loop.iter.end_lineno or loop.lineno)


def iterates(loop: ast.For) -> bool:
    """Whether there are loops inside the loop: lines that run several times do not tell its rounds then."""
    return any(isinstance(node, (ast.For, ast.While)) for node in ast.walk(loop) if node is not loop)


class Rounds:
    """Counts the rounds of `head`, a loop of the function `loop`, by the lines that run, while the `with` block lasts.

    A round is a line of the body after one of the loop's head; the head reached from elsewhere begins at round 0.
    """

    def __init__(self, loop: CodeType, head: ast.For) -> None:
        self.loop = loop
        self.head = range(head.lineno, head.body[0].lineno)
        self.body = range(head.body[0].lineno, (head.body[-1].end_lineno or head.body[-1].lineno) + 1)
        self.round = -1
        self._line = 0
        """Of this function, the last one that ran."""

    def __enter__(self) -> Rounds:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, value: Any) -> Any:
        return self._line_runs if frame.f_code is self.loop else None

    def _line_runs(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "line":
            before, self._line = self._line, frame.f_lineno
            if self._line in self.head and before not in self.head and before not in self.body:
                self.round = -1
            self.round += self._line in self.body and before in self.head
        return self._line_runs


@contextmanager
def record(model: nn.Module, loop: CodeType, drawn: Drawn, head: ast.For | None = None) -> Iterator[None]:
    """While this is open, note each call of `model`, with the step and the line of the function `loop` it comes from.

    A step is a round of `head`, the function's sampling loop, where that has loops inside it. Else a step ends where a
    line makes a call that stands above, or is, one that has made a call in it already, and a new activation of the
    function starts again at step 0.
    """
    activation: FrameType | None = None
    step, line = -1, 0
    rounds = Rounds(loop, head) if head is not None and iterates(head) else None

    def after(model: nn.Module, args: Any, output: Any) -> None:
        nonlocal activation, step, line
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not loop:
            frame = frame.f_back
        if frame is not activation:
            activation, step, line = frame, -1, 1 << 30
        here = 0 if frame is None else frame.f_lineno
        step = step + (here <= line) if rounds is None else rounds.round
        line = here
        result = output[0] if isinstance(output, tuple) else output
        drawn.calls.append(ModelCall(step, str(here), result.detach().clone()))

    handle = model.register_forward_hook(after)
    try:
        with rounds or nullcontext():
            yield
    finally:
        handle.remove()
