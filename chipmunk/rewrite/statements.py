"""The statements of a function as `ast` tells them: the same, in the same order, as `flow.Scope` has of LibCST's tree.

`ast` parses a text in a fifth of LibCST's time, but keeps neither comments nor parentheses: enough to follow values,
not to change the text. A step of one is the step of the same index of the other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import libcst as cst

from chipmunk.rewrite import order
from chipmunk.rewrite.ast_nodes import dotted, elements, walk

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor)
_WITHS = (ast.With, ast.AsyncWith)
_TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))
_COMPOUND = (ast.If, ast.While, ast.Match, *LOOPS, *_WITHS, *_TRIES)

Loop = ast.For | ast.AsyncFor
Chain = tuple[tuple[ast.stmt, str], ...]
Path = tuple[int, ...]


class Indexed(Protocol):
    """A statement by its place among all of its function: of `ast`'s or of LibCST's."""

    @property
    def index(self) -> int: ...


@dataclass(frozen=True, eq=False, slots=True)
class Statement:
    """A simple statement, or the head of a compound one: a `flow.Step`."""

    index: int
    node: ast.stmt
    chain: Chain
    """The compound statements around it, outermost first, each with the branch it stands in."""
    parts: Sequence[ast.AST]
    """What it runs by itself: the heads of a compound statement."""
    line: ast.stmt
    """The first statement of its block on the same line."""

    @property
    def loops(self) -> list[Loop]:
        return [node for node, branch in self.chain if isinstance(node, LOOPS) and branch == "body"]

    @property
    def in_loop(self) -> bool:
        return any(isinstance(node, LOOPS) and branch == "body" for node, branch in self.chain)

    def excludes(self, later: Statement) -> bool:
        """Whether `later` cannot run once this has: they stand in different branches, or this one's branch returns."""
        if order.exclusive(self.chain, later.chain):
            return True
        return self.index < later.index and any(
            isinstance(node, ast.If)
            and self.chain[:depth] == later.chain[:depth]
            and (node, branch) not in later.chain
            and _leaves(node, branch, self.chain[depth + 1 :])
            for depth, (node, branch) in enumerate(self.chain)
        )


@dataclass(frozen=True, eq=False, slots=True)
class Assignment:
    """A name (`img`, `self.model`) that gets a value: a `flow.Binding`."""

    name: str
    value: ast.expr | None
    path: Path
    step: Statement
    augmented: bool = False


class Statements:
    """The statements of a function, or of a module outside its functions and classes."""

    def __init__(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Module) -> None:
        self._is_function = not isinstance(node, ast.Module)
        self.steps: list[Statement] = []
        self.bindings: dict[str, list[Assignment]] = {}
        self.calls: list[tuple[ast.Call, Statement]] = []
        """Every call, in the order of the text, with the statement it stands in."""
        self._read(node.body, ())

    def _read(self, body: Iterable[ast.stmt], chain: Chain) -> None:
        line: ast.stmt | None = None
        end = 0
        for node in body:
            if line is None or node.lineno > end:
                line = node
            end = node.end_lineno or node.lineno
            if isinstance(node, _FUNCTIONS):
                # A function inside a function runs with its names; those of a module are scopes of their own.
                if self._is_function:
                    self._add(node, node.decorator_list, chain, line)
                    self._read(node.body, (*chain, (node, "body")))
            elif isinstance(node, _COMPOUND):
                self._compound(node, chain, line)
            elif not isinstance(node, ast.ClassDef):
                self._simple(node, chain, line)

    def _compound(self, node: Any, chain: Chain, line: ast.stmt) -> None:
        heads = [getattr(node, name) for name in ("test", "iter", "subject") if hasattr(node, name)]
        step = self._add(node, [*heads, *getattr(node, "items", ())], chain, line)
        if isinstance(node, LOOPS):
            self._bind(node.target, node.iter, step, element=True)
        for item in node.items if isinstance(node, _WITHS) else ():
            if item.optional_vars is not None:
                self._bind(item.optional_vars, item.context_expr, step)
        branches = [("body", getattr(node, "body", ()))]
        for name in ("handlers", "cases"):
            branches += [(f"{name}{index}", part.body) for index, part in enumerate(getattr(node, name, ()))]
        branches += [(name, getattr(node, name, ())) for name in ("orelse", "finalbody")]
        for name, body in branches:
            if body:
                self._read(body, (*chain, (node, name)))

    def _simple(self, node: ast.stmt, chain: Chain, line: ast.stmt) -> None:
        step = self._add(node, [node], chain, line)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in [alias for alias in node.names if alias.name != "*"]:
                name = alias.asname or alias.name.split(".")[0]
                self.bindings.setdefault(name, []).append(Assignment(name, None, (), step))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, step)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            self._bind(node.target, node.value, step, augmented=isinstance(node, ast.AugAssign))

    def _add(self, node: ast.stmt, parts: Sequence[ast.AST], chain: Chain, line: ast.stmt) -> Statement:
        step = Statement(len(self.steps), node, chain, parts, line)
        self.steps.append(step)
        calls: list[ast.Call] = []
        for inner in walk(parts):
            if type(inner) is ast.Call:
                calls.append(inner)
            elif type(inner) is ast.NamedExpr:
                self._bind(inner.target, inner.value, step)
        if len(calls) > 1:
            calls.sort(key=_place)
        self.calls += [(call, step) for call in calls]
        return step

    def _bind(
        self,
        target: ast.expr,
        value: ast.expr,
        step: Statement,
        *,
        augmented: bool = False,
        element: bool = False,
    ) -> None:
        for name, path in target_names(target):
            chosen, rest = (value, (-1, *path)) if element else _element(value, path)
            self.bindings.setdefault(name, []).append(Assignment(name, chosen, rest, step, augmented))

    # Asking

    @cached_property
    def called(self) -> frozenset[str]:
        """The last parts of the names of what is called."""
        callees = [call.func for call, _ in self.calls]
        names = [callee.attr for callee in callees if isinstance(callee, ast.Attribute)]
        return frozenset([*names, *(callee.id for callee in callees if isinstance(callee, ast.Name))])

    def reaching(self, name: str, step: Statement) -> list[Assignment]:
        """The assignments whose value `name` may have where `step` uses it, the latest first."""
        return order.reaching(self.bindings.get(name, ()), step)

    def is_definite(self, found: Sequence[Assignment], step: Statement) -> bool:
        """Whether one of the assignments happens whenever `step` is reached; or one in each branch of an `if`."""
        return order.is_definite(found, step)


def expression(node: cst.CSTNode) -> ast.expr:
    """What `ast` makes of an expression of LibCST's, as far as it can be a model: a constant stands for all else."""
    found: ast.expr = ast.Constant(None)
    if isinstance(node, cst.Name):
        found = ast.Name(node.value, ast.Load())
    elif isinstance(node, cst.Attribute):
        found = ast.Attribute(expression(node.value), node.attr.value, ast.Load())
    elif isinstance(node, cst.Call):
        found = ast.Call(expression(node.func), [], [])
        for arg in node.args:
            value = expression(arg.value)
            if arg.keyword is not None or arg.star == "**":
                found.keywords.append(ast.keyword(arg.keyword.value if arg.keyword is not None else None, value))
            else:
                found.args.append(ast.Starred(value, ast.Load()) if arg.star else value)
    elif isinstance(node, (cst.Tuple, cst.List)):
        parts = [expression(part.value) for part in node.elements]
        if any(isinstance(part, cst.StarredElement) for part in node.elements):
            return found
        found = ast.Tuple(parts, ast.Load()) if isinstance(node, cst.Tuple) else ast.List(parts, ast.Load())
    elif isinstance(node, cst.IfExp):
        found = ast.IfExp(ast.Constant(None), expression(node.body), expression(node.orelse))
    elif isinstance(node, cst.NamedExpr):
        found = expression(node.value)
    return found


def bind(function: ast.FunctionDef | ast.AsyncFunctionDef, call: ast.Call, *, skip: int) -> dict[str, ast.expr]:
    """Which parameter gets which argument. `skip`: leading parameters that the call does not give (1 for `self`)."""
    positional = [*function.args.posonlyargs, *function.args.args]
    given: dict[str, ast.expr] = {}
    for parameter, value in zip(positional[skip:], call.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        given[parameter.arg] = value
    known = {parameter.arg for parameter in (*positional, *function.args.kwonlyargs)}
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg in known and keyword.arg}
    return given


def _leaves(node: ast.If, branch: str, inside: Chain) -> bool:
    """Whether a branch, or that of its `elif` that is gone into, ends the function or the loop's round."""
    suite = node.body if branch == "body" else node.orelse
    last = suite[-1]
    if branch == "orelse" and len(suite) == 1 and isinstance(last, ast.If) and inside and inside[0][0] is last:
        return _leaves(last, inside[0][1], inside[1:])
    return isinstance(last, (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _place(node: ast.expr) -> tuple[int, int, int, int]:
    """Of two that start at the same place, the outer one comes first."""
    return node.lineno, node.col_offset, -(node.end_lineno or 0), -(node.end_col_offset or 0)


def target_names(target: ast.expr) -> list[tuple[str, Path]]:
    """The names that an assignment to `target` binds, each with its place inside a tuple."""
    name = dotted(target)
    if name is not None:
        return [(name, ())]
    found: list[tuple[str, Path]] = []
    if isinstance(target, (ast.Tuple, ast.List)):
        for place, part in enumerate(target.elts):
            inner = target_names(part.value if isinstance(part, ast.Starred) else part)
            found += [(name, (place, *path)) for name, path in inner]
    return found


def _element(value: ast.expr, path: Path) -> tuple[ast.expr, Path]:
    """Follow `path` into tuple displays: what `b` gets in `a, b = f(), g()` is `g()`."""
    while path:
        parts = elements(value)
        if parts is None or path[0] >= len(parts):
            break
        value, path = parts[path[0]], path[1:]
    return value, path


__all__ = ["Assignment", "Indexed", "Loop", "Statement", "Statements", "bind", "expression", "target_names"]
