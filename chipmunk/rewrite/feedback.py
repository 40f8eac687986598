"""What comes back: whether a loop hands the model something that descends from what it returned before."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from chipmunk.rewrite.ast_nodes import arguments, dotted, last_name, walk
from chipmunk.rewrite.flow import CASTS, DESCRIBING_CALLS, DESCRIPTIONS
from chipmunk.rewrite.statements import Loop, Statement, Statements

_GROWING = ("append", "extend", "update")
_Assigned = tuple[str, ast.expr, Statement]


def feeds_back(statements: Statements, loop: Loop, calls: Iterable[tuple[ast.Call, Statement]]) -> bool:
    """Whether the loop hands the model something that descends from what the model returned in an earlier round."""
    calls = list(calls)
    nodes = [call for call, _ in calls]
    assignments = list(_assignments(statements, loop))
    seen: set[tuple[str, int, bool]] = set()

    def earlier(value: ast.expr, step: Statement, crossed: bool) -> bool:
        """Whether the value at `step` is, or if `crossed` may be, an answer of the model of an earlier round."""
        if crossed and any(node in nodes for node in walk([value])):
            return True
        return any(of_name(name, step, crossed) for name in set(_value_names(value)))

    def of_name(name: str, step: Statement, crossed: bool) -> bool:
        if (name, step.index, crossed) in seen:
            return False
        seen.add((name, step.index, crossed))
        inside = [each for each in assignments if _overlap(each[0], name)]
        here = [each for each in statements.reaching(name, step) if _is_inside(each.step, loop)]
        before = [each for each in inside if each[2].index < step.index]
        if any(earlier(value, at, crossed) for _, value, at in before):
            return True
        if here and statements.is_definite(here, step):
            return False
        return any(earlier(value, at, True) for _, value, at in inside)

    return any(earlier(arg, step, False) for call, step in calls for arg in arguments(call))


def _is_inside(step: Statement, loop: Loop) -> bool:
    return loop is step.node or loop in step.loops


def _assignments(statements: Statements, loop: Loop) -> Iterator[_Assigned]:
    """What the loop's statements assign, `x[i] = v` and `x.add_(v)` among it."""
    for bindings in statements.bindings.values():
        for binding in bindings:
            if binding.value is not None and _is_inside(binding.step, loop):
                yield binding.name, binding.value, binding.step
    for step in [step for step in statements.steps if _is_inside(step, loop)]:
        node = step.node
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and (name := dotted(target.value)) is not None:
                    yield name, node.value, step
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            func = node.value.func
            name = dotted(func.value) if isinstance(func, ast.Attribute) else None
            if name is not None and (last_name(func).endswith("_") or last_name(func) in _GROWING):
                yield name, node.value, step


def _overlap(assigned: str, used: str) -> bool:
    """Whether assigning to one name changes the other: `state.x` and `state`."""
    return assigned == used or assigned.startswith(f"{used}.") or used.startswith(f"{assigned}.")


def _value_names(node: ast.AST) -> Iterator[str]:
    """Names whose values flow into the expression, as `flow.value_names` tells them."""
    parts: Iterable[ast.AST] = ()
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        if node.attr in DESCRIPTIONS:
            return
        if (name := dotted(node)) is not None:
            yield name
        parts = [node.value]
    elif isinstance(node, ast.Call):
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if method in DESCRIBING_CALLS:
            return
        parts = [node.func.value] if isinstance(node.func, ast.Attribute) else [node.func]
        parts += arguments(node) if method not in CASTS else []
    elif isinstance(node, ast.Subscript):
        parts = [node.value]  # an index chooses values, and is none
    elif isinstance(node, ast.Lambda):
        parts = [node.body]
    elif isinstance(node, ast.IfExp):
        parts = [node.body, node.orelse]
    else:
        parts = ast.iter_child_nodes(node)
    for part in parts:
        yield from _value_names(part)
