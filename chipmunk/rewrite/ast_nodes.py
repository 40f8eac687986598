"""Small questions to an `ast`: what an expression is called, and what is below a node."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator


def dotted(node: ast.AST) -> str | None:
    """`self.blocks` for the expression that reads so; None for anything but names and attributes."""
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return None if value is None else f"{value}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def last_name(node: ast.AST) -> str:
    """`cat` for `torch.cat` and for `cat`; empty for other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def elements(node: ast.expr | None) -> list[ast.expr] | None:
    """The elements of a tuple or list display without stars; None for anything else."""
    if not isinstance(node, (ast.Tuple, ast.List)) or any(isinstance(part, ast.Starred) for part in node.elts):
        return None
    return node.elts


def arguments(call: ast.Call) -> list[ast.expr]:
    """What is given to a call, in the order of the text, without stars."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [arg.value if isinstance(arg, ast.Starred) else arg for arg in given]


def required(given: ast.arguments) -> list[str]:
    """The parameters that a call must give."""
    positional = [*given.posonlyargs, *given.args]
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    needed = positional[: len(positional) - len(given.defaults)]
    return [parameter.arg for parameter in (*needed, *(p for p, default in keywords if default is None))]


def quoted(node: ast.AST) -> str | None:
    """The name in a quoted annotation: `"Flux"`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if re.fullmatch(r"[\w.]+", node.value) else None
    return None


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


def mentions(body: Iterable[ast.stmt], words: Collection[str]) -> bool:
    """Whether one of the words is a name, a name's last part, or a keyword in the statements."""
    names: list[ast.Name] = []
    return any(
        (isinstance(node, ast.Attribute) and node.attr in words)
        or (isinstance(node, ast.keyword) and node.arg in words)
        for node in walk(body, names)
    ) or any(name.id in words for name in names)
