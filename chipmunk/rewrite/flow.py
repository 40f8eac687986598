"""What happens to values inside one function: what a name stands for, and which parameters reach a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst

from chipmunk.rewrite import order
from chipmunk.rewrite.syntax import children, dotted, elements, parameters, self_attribute, target_names, walk

# `x.shape[1]` or `like.dtype` say something about a tensor, but carry none of its values.
DESCRIPTIONS = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"}
DESCRIBING_CALLS = {"size", "dim", "numel", "stride"}
CASTS = {"to", "type_as", "view_as", "expand_as"}

Chain = tuple[tuple[cst.CSTNode, str], ...]


@dataclass(frozen=True, eq=False)
class Step:
    """A simple statement, or the head of a compound one (`for … in …:`), in the order of the text."""

    index: int
    node: cst.CSTNode
    statement: cst.CSTNode
    """The whole line or the compound statement that `node` belongs to."""
    expressions: tuple[cst.CSTNode, ...]
    chain: Chain
    """The compound statements around it, outermost first, each with the branch it stands in."""

    @property
    def loops(self) -> list[cst.For]:
        return [node for node, branch in self.chain if isinstance(node, cst.For) and branch == "body"]

    def excludes(self, later: Step) -> bool:
        """Whether `later` cannot run once this has: they stand in different branches, or this one's branch returns."""
        if order.exclusive(self.chain, later.chain):
            return True
        for depth, (node, branch) in enumerate(self.chain):
            if isinstance(node, cst.If) and self.chain[:depth] == later.chain[:depth] and self.index < later.index:
                suite = node.body if branch == "body" else getattr(node.orelse, "body", None)
                if isinstance(suite, cst.IndentedBlock) and _leaves(suite) and (node, branch) not in later.chain:
                    return True
        return False


@dataclass(frozen=True, eq=False)
class Binding:
    """A name (`img`, `self.model`) that gets a value. `path`: which element of the value, () for all of it."""

    name: str
    value: cst.BaseExpression | None
    path: tuple[int, ...]
    step: Step
    augmented: bool = False


@dataclass(eq=False)
class Scope:
    """The statements of a function, or of a module outside its functions and classes."""

    node: cst.FunctionDef | cst.Module
    steps: list[Step] = field(default_factory=list)
    bindings: dict[str, list[Binding]] = field(default_factory=dict)
    calls: list[tuple[cst.Call, Step]] = field(default_factory=list)
    """Every call, in the order of the text, with the statement it stands in."""
    _known_roots: dict[tuple[int, int], tuple[cst.CSTNode, frozenset[str]]] = field(default_factory=dict)
    """By node (`id`, so the node is kept) and step."""

    def __post_init__(self) -> None:
        self._read(self.node if isinstance(self.node, cst.Module) else self.node.body, ())

    @property
    def function(self) -> cst.FunctionDef:
        assert isinstance(self.node, cst.FunctionDef)
        return self.node

    @cached_property
    def parameters(self) -> list[str]:
        return [p.name.value for p in parameters(self.node)] if isinstance(self.node, cst.FunctionDef) else []

    @property
    def receiver(self) -> str:
        """The name of the first parameter, `self` in a method."""
        return self.parameters[0] if self.parameters else "self"

    # Reading the statements

    def _read(self, body: object, chain: Chain) -> None:
        for statement in body.body if isinstance(body, (cst.BaseSuite, cst.Module)) else ():
            if isinstance(statement, cst.SimpleStatementLine):
                for small in statement.body:
                    self._simple(small, statement, chain)
            elif isinstance(statement, cst.BaseSmallStatement):
                self._simple(statement, statement, chain)
            elif isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
                # A function inside a function runs with its names; those of a module are scopes of their own.
                if isinstance(self.node, cst.FunctionDef) and isinstance(statement, cst.FunctionDef):
                    self._add(statement, statement, tuple(statement.decorators), chain)
                    self._read(statement.body, (*chain, (statement, "body")))
            else:
                self._compound(statement, chain)

    def _compound(self, statement: cst.CSTNode, chain: Chain) -> None:
        heads: list[cst.CSTNode] = []
        branches: list[tuple[str, object]] = []
        for name in ("test", "iter", "subject", "items"):
            head = getattr(statement, name, None)
            heads += head if isinstance(head, (list, tuple)) else [head] if head is not None else []
        step = self._add(statement, statement, tuple(heads), chain)
        if isinstance(statement, cst.For):
            self._bind(statement.target, statement.iter, step, element=True)
        for item in statement.items if isinstance(statement, cst.With) else ():
            if item.asname is not None:
                self._bind(item.asname.name, item.item, step)
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            part = getattr(statement, name, None)
            branches += (
                [(f"{name}{i}", p) for i, p in enumerate(part)] if isinstance(part, (list, tuple)) else [(name, part)]
            )
        for name, part in branches:
            if isinstance(part, cst.If):  # elif
                self._compound(part, (*chain, (statement, name)))
            elif isinstance(part, cst.BaseSuite):
                self._read(part, (*chain, (statement, name)))
            elif isinstance(part, cst.CSTNode) and isinstance(getattr(part, "body", None), cst.BaseSuite):
                self._read(part.body, (*chain, (statement, name)))  # type: ignore[attr-defined]

    def _simple(self, small: cst.BaseSmallStatement, statement: cst.CSTNode, chain: Chain) -> None:
        if isinstance(small, (cst.Import, cst.ImportFrom)):
            step = self._add(small, statement, (), chain)
            for alias in small.names if isinstance(small.names, (list, tuple)) else ():
                name = alias.evaluated_alias or alias.evaluated_name.split(".")[0]
                self.bindings.setdefault(name, []).append(Binding(name, None, (), step))
            return
        step = self._add(small, statement, tuple(children(small)), chain)
        if isinstance(small, cst.Assign):
            for target in small.targets:
                self._bind(target.target, small.value, step)
        elif isinstance(small, cst.AnnAssign) and small.value is not None:
            self._bind(small.target, small.value, step)
        elif isinstance(small, cst.AugAssign):
            self._bind(small.target, small.value, step, augmented=True)

    def _add(
        self, node: cst.CSTNode, statement: cst.CSTNode, expressions: tuple[cst.CSTNode, ...], chain: Chain
    ) -> Step:
        step = Step(len(self.steps), node, statement, expressions, chain)
        self.steps.append(step)
        for expression in expressions:
            for inner in walk(expression):
                if type(inner) is cst.Call:
                    self.calls.append((inner, step))
                elif type(inner) is cst.NamedExpr:
                    self._bind(inner.target, inner.value, step)
        return step

    def _bind(
        self,
        target: cst.BaseExpression,
        value: cst.BaseExpression,
        step: Step,
        *,
        augmented: bool = False,
        element: bool = False,
    ) -> None:
        for name, path in target_names(target):
            chosen, rest = (value, path) if element else _element(value, path)
            binding = Binding(name, chosen, (-1, *rest) if element else rest, step, augmented)
            self.bindings.setdefault(name, []).append(binding)

    # Asking

    def reaching(self, name: str, step: Step) -> list[Binding]:
        """The assignments whose value `name` may have where `step` uses it, the latest first."""
        return order.reaching(self.bindings.get(name, ()), step)

    def is_definite(self, found: list[Binding], step: Step) -> bool:
        """Whether one of the assignments happens whenever `step` is reached; or one in each branch of an `if`."""
        return order.is_definite(found, step)

    def calls_behind(self, value: cst.CSTNode, step: Step) -> Iterator[tuple[cst.Call, Step]]:
        """The calls of this function that the value at `step` may be computed by."""
        seen: set[tuple[str, int]] = set()
        pending: list[tuple[cst.CSTNode, Step]] = [(value, step)]
        while pending:
            node, at = pending.pop()
            for part in walk(node):
                if isinstance(part, cst.Call):
                    yield part, at
            for name in value_names(node):
                if (name, at.index) not in seen:
                    seen.add((name, at.index))
                    pending += [(b.value, b.step) for b in self.reaching(name, at) if b.value is not None]

    def roots(self, node: cst.CSTNode, step: Step) -> frozenset[str]:
        """The parameters whose values may be part of the expression's value (shapes and dtypes do not count)."""
        known = self._known_roots.get((id(node), step.index))
        if known is None:
            found: set[str] = set()
            self._roots(node, step, found, set())
            known = self._known_roots[id(node), step.index] = node, frozenset(found)
        return known[1]

    def _roots(self, node: cst.CSTNode, step: Step, found: set[str], seen: set[tuple[str, int]]) -> None:
        for name in value_names(node):
            if (name, step.index) in seen:
                continue
            seen.add((name, step.index))
            bindings = self.reaching(name, step)
            for binding in bindings:
                if binding.value is not None:
                    self._roots(binding.value, binding.step, found, seen)
            if name in self.parameters and not self.is_definite(bindings, step):
                found.add(name)


def _element(value: cst.BaseExpression, path: tuple[int, ...]) -> tuple[cst.BaseExpression, tuple[int, ...]]:
    """Follow `path` into tuple displays: what `b` gets in `a, b = f(), g()` is `g()`."""
    while path:
        parts = elements(value)
        if parts is None or path[0] >= len(parts):
            break
        value, path = parts[path[0]], path[1:]
    return value, path


def value_names(node: cst.CSTNode) -> Iterator[str]:
    """Names whose values flow into the expression; dotted for attributes of plain names (`self.x`)."""
    if type(node) is cst.Name:  # `isinstance` is slow where it says no
        yield node.value
    elif type(node) is cst.Attribute:
        if node.attr.value in DESCRIPTIONS:
            return
        name = dotted(node)
        if name is not None:
            yield name
        yield from value_names(node.value)
    elif type(node) is cst.Call:
        if type(node.func) is cst.Attribute:
            if node.func.attr.value in DESCRIBING_CALLS:
                return
            yield from value_names(node.func.value)
            if node.func.attr.value in CASTS:
                return
        else:
            yield from value_names(node.func)
        for arg in node.args:
            yield from value_names(arg.value)
    elif type(node) is cst.Subscript:
        yield from value_names(node.value)  # an index chooses values, and is none
    elif type(node) is cst.Lambda:
        yield from value_names(node.body)
    elif type(node) is cst.IfExp:
        yield from value_names(node.body)
        yield from value_names(node.orelse)
    else:
        for part in children(node):
            yield from value_names(part)


def _leaves(suite: cst.IndentedBlock) -> bool:
    """Whether the suite ends the function (or the loop's round) it stands in."""
    last = suite.body[-1] if suite.body else None
    end = last.body[-1] if isinstance(last, cst.SimpleStatementLine) else None
    return isinstance(end, (cst.Return, cst.Raise, cst.Continue, cst.Break))


def mentions(node: cst.CSTNode, name: str) -> bool:
    """Whether a plain name occurs anywhere below the node."""
    return any(isinstance(n, cst.Name) and n.value == name for n in walk(node))


__all__ = ["Binding", "Scope", "Step", "mentions", "self_attribute", "value_names"]
