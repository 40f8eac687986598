"""What comes back: whether a loop hands the model something that descends from what it returned before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.syntax import dotted, last_name, walk

_GROWING = ("append", "extend", "update")


def feeds_back(scope: Scope, loop: cst.For, calls: Iterable[tuple[cst.Call, Step]]) -> bool:
    """Whether the loop hands the model something that descends from what the model returned in an earlier round."""
    calls = list(calls)
    nodes = [call for call, _ in calls]
    assignments = _assignments(scope, loop)
    seen: set[tuple[str, int, bool]] = set()

    def earlier(value: cst.CSTNode, step: Step, crossed: bool) -> bool:
        """Whether the value at `step` is, or if `crossed` may be, an answer of the model of an earlier round."""
        if crossed and any(node in nodes for node in walk(value)):
            return True
        return any(of_name(name, step, crossed) for name in set(value_names(value)))

    def of_name(name: str, step: Step, crossed: bool) -> bool:
        if (name, step.index, crossed) in seen:
            return False
        seen.add((name, step.index, crossed))
        inside = [b for b in assignments if _overlap(b[0], name)]
        here = [b for b in scope.reaching(name, step) if loop in b.step.loops or b.step.node is loop]
        before = [b for b in inside if b[2].index < step.index]
        if any(earlier(value, at, crossed) for _, value, at in before):
            return True
        if here and scope.is_definite(here, step):
            return False
        return any(earlier(value, at, True) for _, value, at in inside)

    return any(earlier(arg.value, step, False) for call, step in calls for arg in call.args)


def _assignments(scope: Scope, loop: cst.For) -> list[tuple[str, cst.CSTNode, Step]]:
    steps = [step for step in scope.steps if loop in step.loops or step.node is loop]
    return [(name, value, step) for step in steps for name, value in _assigned(scope, step)]


def _overlap(assigned: str, used: str) -> bool:
    """Whether assigning to one name changes the other: `state.x` and `state`."""
    return assigned == used or assigned.startswith(f"{used}.") or used.startswith(f"{assigned}.")


def _assigned(scope: Scope, step: Step) -> Iterator[tuple[str, cst.CSTNode]]:
    """What the statement assigns, `x[i] = v` and `x.add_(v)` among it."""
    for bindings in scope.bindings.values():
        for binding in bindings:
            if binding.step is step and binding.value is not None:
                yield binding.name, binding.value
    if isinstance(step.node, cst.Assign):
        for target in step.node.targets:
            if isinstance(target.target, cst.Subscript) and (name := dotted(target.target.value)) is not None:
                yield name, step.node.value
    if isinstance(step.node, cst.Expr) and isinstance(step.node.value, cst.Call):
        function = step.node.value.func
        name = dotted(function.value) if isinstance(function, cst.Attribute) else None
        if name is not None and (last_name(function).endswith("_") or last_name(function) in _GROWING):
            yield name, step.node.value
