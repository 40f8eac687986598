"""Where the values of a function come from and where they go: enough to know what a visit would not tell.

The questions of `growth` are answered here for a whole function at once, and generously: yes where the order of its
statements, and what names mean, would say no.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

from chipmunk.rewrite.ast_nodes import dotted
from chipmunk.rewrite.statements import Statements

VALUES = (ast.Name, ast.Attribute, ast.Call, ast.Tuple, ast.List, ast.IfExp, ast.NamedExpr)
"""The expressions whose value can be a model, or can have one among its elements."""

Source = Callable[[ast.expr], "Iterable[ast.expr] | bool"]
"""Whether an expression may be a model by itself; else the expressions that it has its value from."""


class Outline:
    """A function's statements, or those of a module: where values come from, and where they go."""

    def __init__(self, statements: Statements, node: ast.FunctionDef | ast.AsyncFunctionDef | None) -> None:
        """`node`: the function; None for a module."""
        arguments = node.args if node is not None else None
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs] if arguments is not None else []
        self.parameters = [arg.arg for arg in given]
        steps = [step.node for step in statements.steps]
        said = [arg.annotation for arg in given]
        said += [each.annotation for each in steps if isinstance(each, ast.AnnAssign) and each.value is not None]
        said += [node.returns] if node is not None else []
        self.annotations = {name for annotation in said if annotation is not None for name in _names_in(annotation)}
        """The last parts of the names in annotations of parameters, of the result, and of what is assigned."""
        self._annotated = {arg.arg for arg in given if arg.annotation is not None}
        self._bound = [
            (name, binding.value)
            for name, bindings in statements.bindings.items()
            for binding in bindings
            if isinstance(binding.value, VALUES) and binding.path[:1] != (-1,)
        ]
        """Names, dotted ones too (`self.model`), with what they are bound to."""
        receiver = None if node is None else (self.parameters[0] if self.parameters else "self") + "."
        out = [arg for call, _ in statements.calls for arg in call.args]
        out += [keyword.value for call, _ in statements.calls for keyword in call.keywords if keyword.arg is not None]
        out += [each.value for each in steps if isinstance(each, ast.Return) and each.value is not None]
        out += [value for name, value in self._bound if receiver is None or name.startswith(receiver)]
        self._out = [value for value in out if isinstance(value, VALUES)]
        """What is returned, given to calls, or bound to attributes of the receiver; what a module's names are."""

    def lets_out(self, source: Source, warm: set[str]) -> bool:
        """Whether a model may leave the function, if the names `warm` may be models."""
        return any(is_warm(value, source, warm) for value in self._out)

    def warm(self, source: Source, given: Iterable[str]) -> set[str]:
        """The names that may be models, if the names `given` are."""
        warm, pending, before = set(given), self._bound, -1
        while pending and len(warm) > before:
            before, rest = len(warm), []
            for name, value in pending:
                if name in warm or is_warm(value, source, warm):
                    warm.add(name)
                else:
                    rest.append((name, value))
            pending = rest
        return warm

    def may_be_object(self, name: str) -> bool:
        """Whether the name may stand for an object of a known class: it is annotated, or bound to a call."""
        return name in self._annotated or any(name == bound and isinstance(v, ast.Call) for bound, v in self._bound)


def is_warm(node: ast.expr, source: Source, warm: set[str]) -> bool:
    """Whether an expression may be a model, if the names `warm` are."""
    if dotted(node) in warm:
        return True
    found = source(node)
    return found if isinstance(found, bool) else any(is_warm(part, source, warm) for part in found)


def _names_in(annotation: ast.expr) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.split(".")[-1])
    return found
