"""Tell Chipmunk when a denoising step begins: wrap the iterable of the sampling loops.

A sampling loop is a `for` whose body calls the model (a parameter, variable or attribute to which the model flows from
its construction, or by its annotation) and hands it something that descends from what it returned before. What the loop
iterates stays inside the new call. Where a loop calls the model at more than one place in the text, each place after
the first gets a slot, and so caches, of its own; ordinals would not do, as not every step makes the same calls. The
model may be called through functions, closures and objects of the repository. Where no iterable counts the steps (a
`while`, a sampler in another package), the model's own timestep does.
"""

from __future__ import annotations

import ast

from chipmunk.registry import Example
from chipmunk.rewrite.ast_nodes import dotted
from chipmunk.rewrite.context import Context, Matched
from chipmunk.rewrite.loops import ModelCall, SamplingLoop
from chipmunk.rewrite.minimal import SAMPLING, variant
from chipmunk.rewrite.plan import LoopFacts, SiteStatus
from chipmunk.rewrite.source import Node, Source
from chipmunk.rewrite.statements import Statement, target_names
from chipmunk.rewrite.syntax import argument
from chipmunk.rewrite.timestep import model_mark, timestep_parameter

NAME = "step-clock"
API = 1
VERSION = "2"


def rule(context: Context) -> None:
    loops = context.sampling
    for found in loops.found:
        _patch_loop(context, found)
    for left in loops.uncounted:
        if left.denoises:
            _count_otherwise(context, left.model, left.source, left.node, left.reason, left.matched)
        else:
            context.left_dense(left.source, left.node, left.reason, matched=left.matched)
    for index, model in enumerate(context.models):
        if any(call.model == index for found in loops.found for call in found.calls):
            continue
        if not any(left.model == index and left.denoises for left in loops.uncounted):
            reason, source = "no loop that calls the model was found", model.forward.source
            if any(context.models[call.model].owner is model.owner for found in loops.found for call in found.calls):
                reason = f"no loop of those that call {model.name} is known to run {model.forward.name}"
            _count_otherwise(context, index, source, model.forward.outline, reason, f"class {model.name}")


def _count_otherwise(context: Context, index: int, source: Source, node: Node, reason: str, matched: Matched) -> None:
    """Report steps that no iterable can count: the patch of the model's forward has them counted there, if it can."""
    model = context.models[index]
    mark = model_mark(context, model)
    name = timestep_parameter(context.repository, model)
    if mark is not None and argument(mark, 99, "timesteps") is None:
        name = None
    if name is None:
        context.left_dense(source, node, f"{reason}: its calls run dense", matched=matched)
        return
    status = SiteStatus.PATCHED if mark is None else SiteStatus.ALREADY
    counted = f"{reason}: steps are counted by changes of `{name}`, at the model's forward"
    context.site(source, node, status, counted, matched=matched)


def _patch_loop(context: Context, found: SamplingLoop) -> None:
    place, loop, calls = found.place, found.loop, found.calls
    source, head = place.module.source, found.head
    models = list(dict.fromkeys(call.at_head for call in calls))
    inner, wrapped = loop.iter, set()
    while isinstance(inner, ast.Call) and context.runtime_call(inner, place.names, head) == "steps":
        wrapped.add(dotted(inner.args[0]))
        inner = inner.args[1]
    slots = _slot_names(calls)
    missing = [(call, name) for call, name in zip(calls[1:], slots[1:], strict=True) if call.slot is None]
    matched = loop.iter
    unwrapped = [model for model in models if model not in wrapped]
    if not unwrapped and not missing:
        context.already(source, loop, "the loop's steps are counted", matched=matched)
    else:
        if unwrapped:
            _wrap(context, source, loop.iter, unwrapped)
        for call, name in missing:
            _name_slot(context, source, call, name)
        many = f", at {len(calls)} places" if len(calls) > 1 else ""
        through = next((f" (in {call.helper})" for call in calls if call.helper), "")
        reason = f"each step of this loop calls the model as {' and '.join(models)}{through}{many}"
        context.patched(source, loop, reason, matched=matched)
    for call in calls:
        if loop in call.step.loops[:-1]:
            again = "a loop inside the step calls the model here: of its calls in one step, all but the first run dense"
            context.left_dense(source, call.call, again)
    parameter = models[0] if place.function is not None and models[0] in place.function.parameters else None
    facts = LoopFacts(source.path, place.name, context.line(source, loop), parameter, tuple(slots))
    context.loops.setdefault(calls[0].model, []).append(facts)


def _wrap(context: Context, source: Source, iterable: ast.expr, models: list[str]) -> None:
    runtime, text = context.runtime(source), source.code(iterable)
    first = iterable.elts[0] if isinstance(iterable, ast.Tuple) and iterable.elts else None
    if first is not None and source.span(first)[0] == source.span(iterable)[0]:  # a tuple without parentheses
        text = f"({text})"
    for model in models:
        text = f"{runtime}.steps({model}, {text})"
    context.replace(source, iterable, text)


def _name_slot(context: Context, source: Source, call: ModelCall, name: str) -> None:
    assert call.callee is not None
    text = source.code(call.callee)
    context.replace(source, call.callee, f'{context.runtime(source)}.slot({text}, "{name}")')
    reason = f'a second place that calls the model: slot "{name}"'
    context.patched(source, call.call, reason, matched=source.summary(call.callee) + "(…)")


def _slot_names(calls: list[ModelCall]) -> list[str]:
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


def _assigned(step: Statement) -> str:
    node = step.node
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
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

_HELPER = f"""\
def predict(network: Painter, image, image_ids, text, text_ids, time):
    return {_CALL.replace("model", "network")}


def sample("""
_HELPED = variant(
    SAMPLING,
    (_CALL, "predict(model, image, image_ids, text, text_ids, time)"),
    ("def sample(", _HELPER),
)
_TWICE = variant(
    _HELPED,
    (
        "        image = image +",
        "        velocity -= predict(model, image, image_ids, -text, text_ids, time)\n        image = image +",
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
        "two functions' calls in a step: they cannot be told apart here, but by the model's timestep they can",
        "flow/sampling.py",
        _TWICE,
        None,
    ),
    Example(
        "a `while` loop",
        "flow/sampling.py",
        variant(SAMPLING, (f"for now, then in {_HEAD}:", "while (now := times.pop()) > (then := 0):")),
        None,
    ),
    Example(
        "a function of the repository calls the model",
        "flow/sampling.py",
        _HELPED,
        variant(_HELPED, _IMPORT, _STEPS),
    ),
    Example("a sampling loop", "flow/sampling.py", SAMPLING, variant(SAMPLING, _IMPORT, _STEPS)),
    Example(
        "two calls in a step",
        "flow/sampling.py",
        _GUIDED,
        variant(
            _GUIDED,
            _IMPORT,
            _STEPS,
            ("opposite = model(image", 'opposite = chipmunk.slot(model, "opposite")(\n            image'),
            ("text=-text, text_ids=text_ids, time=time)", "text=-text, text_ids=text_ids, time=time\n        )"),
        ),
    ),
)
