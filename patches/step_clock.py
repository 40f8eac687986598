"""Tell Chipmunk when a denoising step begins: wrap the iterable of the sampling loops.

A sampling loop is a `for` whose body calls the model (a parameter, variable or attribute to which the model flows from
its construction, or by its annotation) and hands it something that descends from what it returned before. What the loop
iterates stays inside the new call. Where a loop calls the model at more than one place in the text, each place after
the first gets a slot, and so caches, of its own; ordinals would not do, as not every step makes the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.minimal import SAMPLING, variant
from chipmunk.rewrite.plan import LoopFacts
from chipmunk.rewrite.syntax import bind, dotted, last_name, target_names, text_of_string, walk
from chipmunk.rewrite.values import Place

NAME = "step-clock"
API = 1
VERSION = "1"


_GROWING = ("append", "extend", "update")


@dataclass(frozen=True, eq=False)
class _ModelCall:
    """One place that calls the model. `callee`: the model's expression, without the `chipmunk.slot` around it."""

    call: cst.Call
    step: Step
    callee: cst.BaseExpression
    slot: str | None
    model: int
    helper: str = ""
    """The function through which the model is called; empty for a call of the model itself."""


def rule(context: Context) -> None:
    outside: dict[int, list[_ModelCall]] = {}
    loops: dict[cst.For, list[_ModelCall]] = {}
    homes: dict[cst.For, Place] = {}
    for place in context.values.places:
        for found in _model_calls(context, place):
            if found.step.loops:
                loops.setdefault(found.step.loops[-1], []).append(found)
                homes[found.step.loops[-1]] = place
            elif any(isinstance(node, cst.While) for node, _ in found.step.chain):
                reason = "a `while` loop has no iterable to count steps by: the model runs dense here"
                context.left_dense(place.module.source, found.call, reason)
            elif place.function is not None:
                outside.setdefault(id(place.function), []).append(found)
    for place in context.values.places:
        for loop, call in _loops_by_helper(context, place, outside):
            if loop not in loops:
                homes[loop] = place
            loops.setdefault(loop, []).append(call)
    for index, model in enumerate(context.models):
        if not any(call.model == index for calls in loops.values() for call in calls):
            reason = "no loop that calls the model was found: outside of one, its calls run dense"
            context.left_dense(model.owner.source, model.forward.node.name, reason, matched=f"class {model.name}")
    _merge_nested(loops)
    for loop, calls in loops.items():
        if any(last_name(call.func) == "backward" for call, step in homes[loop].scope.calls if loop in step.loops):
            source = homes[loop].module.source
            context.left_dense(source, loop, "a training loop", matched=source.summary(loop.iter))
            continue
        if not _feeds_back(homes[loop].scope, loop, calls):
            source = homes[loop].module.source
            reason = "nothing that the model returns reaches its next call: these are no denoising steps"
            context.left_dense(source, loop, reason, matched=source.summary(loop.iter))
            continue
        _patch_loop(context, homes[loop], loop, sorted(calls, key=lambda c: c.step.index))


def _model_calls(context: Context, place: Place) -> list[_ModelCall]:
    found: list[_ModelCall] = []
    for call, step in place.scope.calls:
        callee, slot = call.func, None
        inner = callee if isinstance(callee, cst.Call) and len(callee.args) == 2 else None
        if inner is not None and context.runtime_call(inner, place.names, step) == "slot":
            callee, slot = inner.args[0].value, text_of_string(inner.args[1].value)
        if isinstance(callee, cst.Attribute) and callee.attr.value == "forward":
            callee = callee.value
        if dotted(callee) is None:
            continue
        model = context.values.model_of(context.values.labels(callee, step, place))
        if model is not None:
            found.append(_ModelCall(call, step, callee, slot, model))
    return found


def _loops_by_helper(
    context: Context, place: Place, outside: dict[int, list[_ModelCall]]
) -> Iterator[tuple[cst.For, _ModelCall]]:
    """Loops whose body calls a function of the repository that calls the model once: `x = self.step(x, t)`."""
    for call, step in place.scope.calls:
        if not step.loops:
            continue
        callee = context.values.callee(call, step, place)
        inner = outside.get(id(callee), [])
        if callee is None or not inner or context.runtime_call(call, place.names, step) is not None:
            continue
        name = dotted(inner[0].callee) or ""
        given = bind(callee.node, call, skip=callee.receivers)
        expression: cst.BaseExpression | None = given.get(name)
        if expression is None and callee.receivers and name.startswith(f"{callee.scope.receiver}."):
            method = dotted(call.func) or ""
            if method.startswith(f"{place.scope.receiver}.") and method.count(".") == 1:
                expression = inner[0].callee
        if expression is None or dotted(expression) is None:
            reason = f"{callee.name} calls the model, but the loop has no name for it: its steps are not counted"
            context.left_dense(place.module.source, call, reason)
        elif len(inner) > 1:
            reason = f"{callee.name} calls the model at several places: their steps are not counted"
            context.left_dense(place.module.source, call, reason)
        else:
            yield step.loops[-1], _ModelCall(call, step, expression, None, inner[0].model, helper=callee.name)


def _feeds_back(scope: Scope, loop: cst.For, calls: list[_ModelCall]) -> bool:
    """Whether the loop hands the model something that descends from what the model returned in an earlier round."""
    nodes = [call.call for call in calls]
    descended: set[str] = set()

    def descends(value: cst.CSTNode) -> bool:
        return bool(descended & set(value_names(value))) or any(node in nodes for node in walk(value))

    grown = -1
    while grown != len(descended):
        grown = len(descended)
        for step in scope.steps:
            if loop not in step.loops:
                continue
            for name, value in _assigned_values(scope, step):
                if descends(value):
                    descended.add(name)
    return any(descended & set(value_names(arg.value)) for call in nodes for arg in call.args)


def _assigned_values(scope: Scope, step: Step) -> Iterator[tuple[str, cst.CSTNode]]:
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


def _merge_nested(loops: dict[cst.For, list[_ModelCall]]) -> None:
    """A loop inside another loop that calls the model too belongs to the outer one's step."""
    for loop in list(loops):
        outer = [other for call in loops[loop] for other in call.step.loops if other is not loop and other in loops]
        if outer:
            calls = loops.pop(loop)
            loops[outer[0]] = sorted([*loops[outer[0]], *calls], key=lambda c: c.step.index)


def _patch_loop(context: Context, place: Place, loop: cst.For, calls: list[_ModelCall]) -> None:
    source = place.module.source
    if len(calls) > 1 and any(call.helper for call in calls):
        helper = next(call.helper for call in calls if call.helper)
        reason = (
            f"the loop calls the model at {len(calls)} places, one of them inside {helper}: they cannot be told apart"
        )
        context.left_dense(source, loop, reason, matched=source.summary(loop.iter))
        return
    head = next(step for step in place.scope.steps if step.node is loop)
    wrapped = context.runtime_call(loop.iter, place.names, head) == "steps"
    expression = source.code(calls[0].callee)
    slots = _slot_names(calls)
    missing = [(call, name) for call, name in zip(calls[1:], slots[1:], strict=True) if call.slot is None]
    matched = source.summary(loop.iter)
    if wrapped and not missing:
        context.already(source, loop, "the loop's steps are counted", matched=matched)
    else:
        if not wrapped:
            runtime = context.runtime(source)
            text = source.code(loop.iter)
            bare = isinstance(loop.iter, cst.Tuple) and not loop.iter.lpar
            context.replace(source, loop.iter, f"{runtime}.steps({expression}, {f'({text})' if bare else text})")
        for call, name in missing:
            context.replace(
                source, call.callee, f'{context.runtime(source)}.slot({source.code(call.callee)}, "{name}")'
            )
            context.patched(
                source,
                call.call,
                f'a second place that calls the model: slot "{name}"',
                matched=source.summary(call.callee) + "(…)",
            )
        many = f", at {len(calls)} places" if len(calls) > 1 else ""
        context.patched(source, loop, f"each step of this loop calls the model as {expression}{many}", matched=matched)
    parameter = expression if expression in place.scope.parameters else None
    facts = LoopFacts(source.path, place.name, source.line(loop), parameter, tuple(slots))
    context.loops.setdefault(calls[0].model, []).append(facts)


def _slot_names(calls: list[_ModelCall]) -> list[str]:
    """A name for each place, from what its result is assigned to; numbered where that is not unique."""
    names: list[str] = []
    taken = {call.slot for call in calls if call.slot is not None}
    for call in calls:
        name = call.slot
        if name is None:
            base = _assigned(call.step) or "call"
            name, number = base, 2
            while name in names or name in taken:
                name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _assigned(step: Step) -> str:
    if isinstance(step.node, (cst.Assign, cst.AnnAssign, cst.AugAssign)):
        target = step.node.targets[0].target if isinstance(step.node, cst.Assign) else step.node.target
        for name, _ in target_names(target):
            return name.split(".")[-1]
    return ""


_HEAD = "zip(times[:-1], times[1:])"
_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_STEPS = (_HEAD, f"chipmunk.steps(model, {_HEAD})")
_CALL = "model(image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time)"
_GUIDED = variant(
    SAMPLING,
    (
        f"velocity = {_CALL}\n",
        f"velocity = {_CALL}\n"
        f"        opposite = {_CALL.replace('text=text', 'text=-text')}\n"
        "        velocity = opposite + 2 * (velocity - opposite)\n",
    ),
)

EXAMPLES = (
    Example(
        "a loop over independent inputs: nothing is fed back, so these are no steps",
        "flow/sampling.py",
        variant(SAMPLING, ("image = image + (then - now) * velocity", "print(velocity)")),
        None,
    ),
    Example(
        "a loop that calls something else",
        "flow/sampling.py",
        variant(SAMPLING, ("model: Painter, image", "model: Painter, network, image"), (_CALL, "network(image, time)")),
        None,
    ),
    Example(
        "a `while` loop",
        "flow/sampling.py",
        variant(SAMPLING, (f"for now, then in {_HEAD}:", "while (now := times.pop()) > (then := 0):")),
        None,
    ),
    Example("a sampling loop", "flow/sampling.py", SAMPLING, variant(SAMPLING, _IMPORT, _STEPS)),
    Example(
        "two calls in a step",
        "flow/sampling.py",
        _GUIDED,
        variant(_GUIDED, _IMPORT, _STEPS, ("opposite = model(", 'opposite = chipmunk.slot(model, "opposite")(')),
    ),
)
