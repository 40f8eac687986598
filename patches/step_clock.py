"""Tell Chipmunk when a denoising step begins: wrap the iterable of the sampling loops.

A sampling loop is a `for` whose body calls the model: a parameter, variable or attribute to which the model flows from its
construction or by its annotation. What the loop iterates stays inside the new call. Where a loop calls the model at more
than one place in the text, each place after the first gets a slot, and so caches, of its own; ordinals would not do, as
not every step makes the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.plan import LoopFacts
from chipmunk.rewrite.syntax import dotted, target_names, text_of_string
from chipmunk.rewrite.values import Place

NAME = "step-clock"
API = 1
VERSION = "1"


@dataclass(frozen=True, eq=False)
class _ModelCall:
    """One place that calls the model. `callee`: the model's expression, inside an earlier `chipmunk.slot` or as it stands."""

    call: cst.Call
    step: Step
    callee: cst.BaseExpression
    slot: str | None
    model: int


def rule(context: Context) -> None:
    for place in context.values.places:
        loops: dict[cst.For, list[_ModelCall]] = {}
        for found in _model_calls(context, place):
            if found.step.loops:
                loops.setdefault(found.step.loops[-1], []).append(found)
            elif any(isinstance(node, cst.While) for node, _ in found.step.chain):
                reason = "a `while` loop has no iterable to count steps by: the model runs dense here"
                context.left_dense(place.module.source, found.call, reason)
        _merge_nested(loops)
        for loop, calls in loops.items():
            _patch_loop(context, place, loop, calls)


def _model_calls(context: Context, place: Place) -> list[_ModelCall]:
    found: list[_ModelCall] = []
    for call, step in place.scope.calls:
        callee, slot = call.func, None
        if context.runtime_call(callee, place.names, step) == "slot":
            assert isinstance(callee, cst.Call)
            if len(callee.args) == 2:
                callee, slot = callee.args[0].value, text_of_string(callee.args[1].value)
        if isinstance(callee, cst.Attribute) and callee.attr.value == "forward":
            callee = callee.value
        if dotted(callee) is None:
            continue
        model = context.values.model_of(context.values.labels(callee, step, place))
        if model is not None:
            found.append(_ModelCall(call, step, callee, slot, model))
    return found


def _merge_nested(loops: dict[cst.For, list[_ModelCall]]) -> None:
    """A loop inside another loop that calls the model too belongs to the outer one's step."""
    for loop in list(loops):
        outer = [other for call in loops[loop] for other in call.step.loops if other is not loop and other in loops]
        if outer:
            calls = loops.pop(loop)
            loops[outer[0]] = sorted([*loops[outer[0]], *calls], key=lambda c: c.step.index)


def _patch_loop(context: Context, place: Place, loop: cst.For, calls: list[_ModelCall]) -> None:
    source = place.module.source
    head = next(step for step in place.scope.steps if step.node is loop)
    wrapped = context.runtime_call(loop.iter, place.names, head) == "steps"
    expression = source.code(calls[0].callee)
    slots = _slot_names(calls)
    missing = [(call, name) for call, name in zip(calls[1:], slots[1:]) if call.slot is None]
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


EXAMPLES: tuple[Example, ...] = ()
