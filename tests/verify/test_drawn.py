"""Which step of a sampling loop a call of the model belongs to, and which place in the loop made it."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from chipmunk.verify.drawn import Drawn, loop_at, record

X = torch.zeros(1)


def plain(model: nn.Module, steps: int) -> None:
    for step in range(steps):
        model(X)
        if step >= 2:
            model(X)


def iterates(model: nn.Module, steps: int) -> None:
    for step in range(steps):
        for _ in range(1 + step % 3):
            model(X)


def iterates_after_a_call(model: nn.Module, steps: int) -> None:
    for _, _ in enumerate(
        [
            None
            for _ in range(steps)
        ]
    ):  # fmt: skip
        model(X)
        rounds = 0
        while rounds < 2:
            rounds += 1
            model(X)


def leaves_steps_out(model: nn.Module, steps: int) -> None:
    for step in range(steps):
        if step % 2:
            continue
        for _ in range(2):
            model(X)


def through_a_helper(model: nn.Module, steps: int) -> None:
    def again() -> None:
        for _ in range(2):
            model(X)

    for _ in range(steps):
        for _ in range(1):
            again()


def two_pictures(model: nn.Module, steps: int) -> None:
    for _ in range(2):
        for _ in range(steps):
            for _ in range(2):
                model(X)


STEPS: list[tuple[Callable[..., None], int, list[int]]] = [
    (plain, 4, [0, 1, 2, 2, 3, 3]),
    (iterates, 4, [0, 1, 1, 2, 2, 2, 3]),
    (iterates_after_a_call, 2, [0, 0, 0, 1, 1, 1]),
    (leaves_steps_out, 5, [0, 0, 2, 2, 4, 4]),
    (through_a_helper, 2, [0, 0, 1, 1]),
    (two_pictures, 2, [0, 0, 1, 1, 0, 0, 1, 1]),
]


def loop_of(function: Callable[..., Any]) -> ast.For | None:
    """The sampling loop of one of these functions: the `for` that goes through `steps`."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.For) and "steps" in ast.unparse(n.iter)]
    return loop_at(inspect.getsource(sys.modules[__name__]), first + found[0].lineno - 1)


@pytest.mark.parametrize(("function", "steps", "expected"), STEPS, ids=[each[0].__name__ for each in STEPS])
def test_steps_are_rounds_of_the_sampling_loop(function: Callable[..., None], steps: int, expected: list[int]) -> None:
    drawn, model, tracing = Drawn(), nn.Identity(), sys.gettrace()
    with record(model, function.__code__, drawn, loop_of(function)):
        function(model, steps)
    assert [call.step for call in drawn.calls] == expected
    assert sys.gettrace() is tracing


def test_without_the_loop_a_line_that_calls_again_begins_a_step() -> None:
    drawn, model = Drawn(), nn.Identity()
    with record(model, plain.__code__, drawn):
        plain(model, 4)
    assert [call.step for call in drawn.calls] == [0, 1, 2, 2, 3, 3]
    assert len({call.slot for call in drawn.calls}) == 2


def test_a_line_that_begins_no_loop_has_none() -> None:
    assert loop_at("for a in b:\n    c(a)\n", 2) is None
    assert loop_at("for a in b: c(a)\n", 1) is None, "a body on the loop's own line cannot be told from it"
    assert isinstance(loop_at("for a in b:\n    c(a)\n", 1), ast.For)
