"""Which statements have run when another one runs, told by the branches around both."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Protocol, TypeVar

import libcst as cst

_Chain = Sequence[tuple[object, str]]
"""Compound statements, outermost first, each with the branch that is gone into."""


class _Placed(Protocol):
    """A statement, of LibCST's tree or of the one by `ast`."""

    @property
    def index(self) -> int: ...
    @property
    def chain(self) -> tuple[tuple[object, str], ...]: ...


class _Bound(Protocol):
    """A name that gets a value."""

    @property
    def step(self) -> _Placed: ...
    @property
    def augmented(self) -> bool: ...


B = TypeVar("B", bound=_Bound)


def reaching(bindings: Sequence[B], step: _Placed) -> list[B]:
    """Of the assignments to a name, those whose value it may have where `step` uses it, the latest first."""
    found: list[B] = []
    for binding in reversed(bindings):
        if binding.step.index >= step.index or exclusive(binding.step.chain, step.chain):
            continue
        found.append(binding)
        if not binding.augmented and is_definite(found, step):
            break
    return found


def is_definite(found: Sequence[_Bound], step: _Placed) -> bool:
    """Whether one of the assignments happens whenever `step` is reached; or one in each branch of an `if`."""
    chains = {binding.step.chain for binding in found if not binding.augmented}
    if any(step.chain[: len(chain)] == chain for chain in chains):
        return True
    for chain in sorted(chains, key=len, reverse=True):
        while chain and isinstance(chain[-1][0], (cst.If, ast.If)):
            *around, (node, branch) = chain
            other = (*around, (node, "orelse" if branch == "body" else "body"))
            if other not in chains:
                break
            chain = tuple(around)
            chains.add(chain)
            if step.chain[: len(chain)] == chain:
                return True
    return False


def exclusive(first: _Chain, second: _Chain) -> bool:
    """Whether two places stand in different branches of the same statement, so that only one of them runs."""
    for (node, branch), (other, other_branch) in zip(first, second, strict=False):
        if node is not other:
            return False
        if branch != other_branch:
            return isinstance(node, (cst.If, cst.Match, ast.If, ast.Match))
    return False
