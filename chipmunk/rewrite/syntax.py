"""Small questions to a LibCST tree: what a node's parts are, what an expression is called, which argument is which."""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any, TypeGuard

import libcst as cst

# Parts of a node that hold only formatting: leaving them out makes a walk three times faster.
_FORMATTING = ("whitespace", "leading_lines", "lines_after", "trailing", "header", "footer", "newline", "indent")
_PUNCTUATION = {"lpar", "rpar", "lbracket", "rbracket", "comma", "semicolon", "equal", "dot", "colon", "asynchronous"}
_LEAVES = {cst.Name, cst.Integer, cst.Float, cst.SimpleString, cst.Ellipsis}
"""Nodes without parts that carry meaning."""


@cache
def _parts(kind: Hashable) -> Callable[[cst.CSTNode], Iterable[object]]:
    names = [name for name in getattr(kind, "__dataclass_fields__", ()) if not name.startswith(_FORMATTING)]
    names = [name for name in names if name not in _PUNCTUATION]
    # Of a single name, `attrgetter` returns no tuple.
    return attrgetter(*names) if len(names) > 1 else lambda node: [getattr(node, name) for name in names]


@cache
def _is_node(kind: Hashable) -> bool:
    """Asked of each part's type: LibCST's classes are abstract ones, of which `isinstance` is slow."""
    return isinstance(kind, type) and issubclass(kind, cst.CSTNode)


def children(node: cst.CSTNode) -> list[cst.CSTNode]:
    """The parts of `node` that carry meaning, in text order but for decorators and conditional expressions."""
    found: list[Any] = []
    part: Any
    for part in _parts(type(node))(node):
        if _is_node(part.__class__):
            found.append(part)
        elif type(part) is tuple or type(part) is list:
            found += [item for item in part if _is_node(item.__class__)]
    return found


def walk(node: cst.CSTNode, into: Callable[[cst.CSTNode], bool] | None = None) -> Iterator[cst.CSTNode]:
    """`node` and everything below it, parents first; nothing below a node for which `into` is false."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        if type(current) in _LEAVES:
            continue
        if into is None or into(current):
            stack += reversed(children(current))


def dotted(node: cst.CSTNode | None) -> str | None:
    """`self.blocks` for the expression that reads so; None for anything but names and attributes."""
    if type(node) is cst.Name:  # `isinstance` is slow, and this is asked of nearly every node
        return node.value
    if type(node) is cst.Attribute:
        value = dotted(node.value)
        return None if value is None else f"{value}.{node.attr.value}"
    return None


def self_attribute(node: cst.CSTNode | None, receiver: str = "self") -> str | None:
    """`blocks` for the expression `self.blocks`."""
    if isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name) and node.value.value == receiver:
        return node.attr.value
    return None


def self_list(node: cst.CSTNode | None, receiver: str = "self") -> str | None:
    """`blocks` for the expression `self.blocks`, `lists.image` for `self.lists["image"]`."""
    if isinstance(node, cst.Subscript) and len(node.slice) == 1 and isinstance(node.slice[0].slice, cst.Index):
        attribute, key = self_attribute(node.value, receiver), text_of_string(node.slice[0].slice.value)
        return f"{attribute}.{key}" if attribute is not None and key is not None and key.isidentifier() else None
    return self_attribute(node, receiver)


def last_name(node: cst.CSTNode | None) -> str:
    """`cat` for `torch.cat` and for `cat`; empty for other expressions."""
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


def is_call(node: cst.CSTNode | None, *names: str) -> TypeGuard[cst.Call]:
    """Whether `node` is a call of a function whose last name is one of `names` (of any function without names)."""
    return isinstance(node, cst.Call) and (not names or last_name(node.func) in names)


def elements(node: cst.CSTNode | None) -> list[cst.BaseExpression] | None:
    """The elements of a tuple or list display without stars; None for anything else."""
    if not isinstance(node, (cst.Tuple, cst.List)):
        return None
    if any(isinstance(element, cst.StarredElement) for element in node.elements):
        return None
    return [element.value for element in node.elements]


def argument(call: cst.Call, position: int, *names: str) -> cst.BaseExpression | None:
    """The value given for a parameter, by position or by one of its names."""
    for index, arg in enumerate(call.args):
        if arg.star:
            return next((a.value for a in call.args if a.keyword is not None and a.keyword.value in names), None)
        if (arg.keyword is None and index == position) or (arg.keyword is not None and arg.keyword.value in names):
            return arg.value
    return None


def integer(node: cst.CSTNode | None) -> int | None:
    """The value of an integer literal, with its sign."""
    if isinstance(node, cst.Integer):
        return int(node.value, 0)
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        value = integer(node.expression)
        return None if value is None else -value
    return None


def text_of_string(node: cst.CSTNode | None) -> str | None:
    """The value of a plain string literal."""
    if isinstance(node, (cst.SimpleString, cst.ConcatenatedString)):
        value = node.evaluated_value
        return value if isinstance(value, str) else None
    return None


def parameters(function: cst.FunctionDef) -> list[cst.Param]:
    """All named parameters, in the order of the text; `*args` and `**kwargs` are left out."""
    names = function.params
    return [*names.posonly_params, *names.params, *names.kwonly_params]


def bind(
    function: ast.FunctionDef | ast.AsyncFunctionDef, call: cst.Call, *, skip: int, first: int = 0
) -> dict[str, cst.BaseExpression]:
    """Which parameter gets which argument.

    `skip`: leading parameters that the call does not give (1 for `self`); `first`: leading arguments that are not
    the function's (1 for the function itself in `checkpoint(function, ...)`).
    """
    positional = [p.arg for p in (*function.args.posonlyargs, *function.args.args)]
    known = {*positional, *(p.arg for p in function.args.kwonlyargs)}
    positional = positional[skip:]
    given: dict[str, cst.BaseExpression] = {}
    for index, arg in enumerate(call.args[first:]):
        if arg.star:
            break
        if arg.keyword is None and index < len(positional):
            given[positional[index]] = arg.value
    for arg in call.args[first:]:
        if arg.keyword is not None and arg.keyword.value in known:
            given[arg.keyword.value] = arg.value
    return given


def target_names(target: cst.BaseExpression) -> list[tuple[str, tuple[int, ...]]]:
    """The names that an assignment to `target` binds, each with its place inside a tuple: `(img, txt)` → img at 0."""
    name = dotted(target)
    if name is not None:
        return [(name, ())]
    found: list[tuple[str, tuple[int, ...]]] = []
    if isinstance(target, (cst.Tuple, cst.List)):
        for place, element in enumerate(target.elements):
            found += [(inner, (place, *path)) for inner, path in target_names(element.value)]
    return found
