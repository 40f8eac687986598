"""What a function does with values and names, as `ast` tells it: enough to know what its tree would not hold.

The questions of `values.Values` are answered here for a whole function at once, and generously: yes where LibCST's
tree, with the order of the statements and what names mean, would say no.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_VALUES = (ast.Name, ast.Attribute, ast.Call, ast.Tuple, ast.List, ast.IfExp, ast.NamedExpr)
"""The expressions whose value can be a model, or can have one among its elements."""


Source = Callable[[ast.expr], "Iterable[ast.expr] | bool"]
"""Whether an expression may be a model by itself; else the expressions that it has its value from."""


@dataclass(eq=False)
class Outline:
    """A function's statements, or those of a module: where values come from, and where they go."""

    bound: list[tuple[str, ast.expr]] = field(default_factory=list)
    """Names, dotted ones too (`self.model`), with what they are bound to."""
    out: list[ast.expr] = field(default_factory=list)
    """What is returned, given to calls, or bound to attributes of the receiver; what a module's names are bound to."""
    called: list[ast.expr] = field(default_factory=list)
    """What calls call."""
    annotations: set[str] = field(default_factory=set)
    """The last parts of the names in annotations of parameters, of the result, and of the receiver's attributes."""
    annotated: set[str] = field(default_factory=set)
    """The parameters that have an annotation."""
    parameters: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Outline:
        found = cls()
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found.parameters = [arg.arg for arg in given]
        found.annotated = {arg.arg for arg in given if arg.annotation is not None}
        for annotation in [*(arg.annotation for arg in given), node.returns]:
            found.annotations |= _names_in(annotation)
        found._read(node.body, found.parameters[0] if found.parameters else "self")
        return found

    @classmethod
    def of_module(cls, body: Iterable[ast.stmt]) -> Outline:
        found = cls()
        found._read([statement for statement in body if not isinstance(statement, (*_FUNCTIONS, ast.ClassDef))], None)
        return found

    def _read(self, body: Iterable[ast.stmt], receiver: str | None) -> None:
        """`receiver`: None for a module."""
        for node in walk(body):
            if isinstance(node, ast.Call):
                self._gives([*node.args, *(keyword.value for keyword in node.keywords if keyword.arg is not None)])
                self.called += _called(node.func)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value, receiver)
            elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
                self._bind(node.target, node.value, receiver)
                if isinstance(node, ast.AnnAssign):
                    self.annotations |= _names_in(node.annotation)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._bind(node.optional_vars, node.context_expr, receiver)
            elif isinstance(node, ast.Return) and node.value is not None:
                self._gives([node.value])

    def _gives(self, values: Iterable[ast.expr]) -> None:
        self.out += [value for value in values if isinstance(value, _VALUES)]

    def _bind(self, target: ast.expr, value: ast.expr, receiver: str | None) -> None:
        if isinstance(value, _VALUES):
            for name in _targets(target):
                self.bound.append((name, value))
                if receiver is None or name.startswith(receiver + "."):
                    self.out.append(value)

    def lets_out(self, source: Source, given: Iterable[str]) -> bool:
        """Whether a model may leave the function, if the names `given` are models."""
        warm = self.warm(source, given)
        return any(_is_warm(value, source, warm) for value in self.out)

    def holds(self, source: Source, given: Iterable[str]) -> bool:
        """Whether a name may get a model from a call, or a model may be called, if the names `given` are models."""
        warm = self.warm(source, given)
        made = (value for _, value in self.bound if isinstance(value, ast.Call))
        return any(_is_warm(value, source, warm) for value in (*made, *self.called))

    def warm(self, source: Source, given: Iterable[str]) -> set[str]:
        """The names that may be models."""
        warm, pending, before = set(given), self.bound, -1
        while pending and len(warm) > before:
            before, rest = len(warm), []
            for name, value in pending:
                if name in warm or _is_warm(value, source, warm):
                    warm.add(name)
                else:
                    rest.append((name, value))
            pending = rest
        return warm

    def may_be_object(self, name: str) -> bool:
        """Whether the name may stand for an object of a known class: it is annotated, or bound to a call."""
        return name in self.annotated or any(name == bound and isinstance(v, ast.Call) for bound, v in self.bound)


@dataclass(frozen=True)
class Uses:
    """What the statements of a function or module do with names: all that their tree says, and more."""

    bound: frozenset[str]
    """Names that get a value, and the last parts of attributes that do."""
    callees: tuple[ast.expr, ...]
    """What is called."""

    @classmethod
    def of(cls, body: Iterable[ast.stmt]) -> Uses:
        bound: set[str] = set()
        callees: list[ast.expr] = []
        names: list[ast.Name] = []
        for node in walk(body, names):
            if isinstance(node, ast.Attribute):
                if type(node.ctx) is not ast.Load:
                    bound.add(node.attr)
            elif isinstance(node, ast.Call):
                callees.append(node.func)
            elif isinstance(node, ast.alias):
                bound.add(node.asname or node.name.split(".")[0])
        bound.update(name.id for name in names if type(name.ctx) is not ast.Load)
        return cls(frozenset(bound), tuple(callees))

    @cached_property
    def called(self) -> frozenset[str]:
        """The last parts of the names of what is called."""
        return frozenset(
            callee.id if isinstance(callee, ast.Name) else callee.attr
            for callee in self.callees
            if isinstance(callee, (ast.Name, ast.Attribute))
        )


def dotted(node: ast.expr) -> str | None:
    """`self.blocks` for the expression that reads so; None for anything but names and attributes."""
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return None if value is None else f"{value}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def walk(nodes: Iterable[ast.AST], names: list[ast.Name] | None = None) -> Iterator[ast.AST]:
    """The nodes and all below them but names and constants, in any order: `ast.walk` takes twice as long.

    names: gets the names.
    """
    stack = list(nodes)
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind is ast.Name:
            if names is not None:
                names.append(node)  # type: ignore[arg-type]
            continue
        yield node
        for name in node._fields:
            part = getattr(node, name, None)
            if type(part) is list:
                stack += [item for item in part if isinstance(item, ast.AST)]
            elif isinstance(part, ast.AST) and part._fields and type(part) is not ast.Constant:
                stack.append(part)


def _is_warm(node: ast.expr, source: Source, warm: set[str]) -> bool:
    if dotted(node) in warm:
        return True
    found = source(node)
    return found if isinstance(found, bool) else any(_is_warm(part, source, warm) for part in found)


def _called(node: ast.expr) -> list[ast.expr]:
    """`model` for `model`, `model.forward` and `slot(model, "name")`."""
    if isinstance(node, ast.Attribute) and node.attr == "forward":
        return [node, node.value]
    return [node, *_called(node.args[0])] if isinstance(node, ast.Call) and node.args else [node]


def _targets(target: ast.expr) -> Iterator[str]:
    name = dotted(target)
    if name is not None:
        yield name
    for element in target.elts if isinstance(target, (ast.Tuple, ast.List)) else ():
        yield from _targets(element.value if isinstance(element, ast.Starred) else element)


def _names_in(annotation: ast.expr | None) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.split(".")[-1])
    return found
