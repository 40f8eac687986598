"""MLPs of which one method of the block begins the work, and another one ends it.

`q, k, v, hidden = self.begin(x)`, then `return self.end(x, mixed, hidden)`: what the first linear made leaves a method
as one of its results, and enters another as a parameter. On a sparse step it holds no values, so all methods that call
either of the two must hand it from the one to the other, and do nothing else with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.mlps.cuts import Cuts
from chipmunk.rewrite.mlps.looking import Look
from chipmunk.rewrite.mlps.pieces import First, reads
from chipmunk.rewrite.reach import Reached, reached_from
from chipmunk.rewrite.repository import Function, Module
from chipmunk.rewrite.syntax import bind, dotted, elements, last_name, self_attribute, target_names, walk


@dataclass(frozen=True)
class Begun:
    """The first linear in a method of its own. `problem`: why the MLP must stay dense."""

    where: Reached
    first: First
    problem: str = ""


def begun(context: Context, end: Reached, parameter: str) -> Begun | None:
    """The first linear whose output a method of the block gets as `parameter`, if another method makes it."""
    own = end.function.receivers and end.block_name == end.function.scope.receiver
    if end.caller is None or not own or parameter not in end.function.scope.parameters or parameter in end.streams:
        return None
    outer, call, _ = end.caller
    link = _link(outer.function, call, end.function, parameter)
    if link is None:
        return None
    made, place = link
    found = [w for w in reached_from(context.repository, end.block) if w.caller is not None and w.caller[1] is made]
    if len(found) != 1 or found[0].block_name != found[0].function.scope.receiver:
        return None
    where = found[0]
    returned = _returned(where.function, place)
    if returned is None:
        return None
    look = Look(context, where)
    value, step, path, passed = look.follow(*returned)
    cut = Cuts(look).first(value, step, path, passed)
    if cut is None:
        return None
    first, more = cut
    problem = ""
    elsewhere = "{} is used in other places too: on a sparse step it would not hold what they expect"
    for held in (*passed, *more):
        if any(read not in held.readers for read in reads(look.scope, held.binding, shape=held.shape)):
            problem = elsewhere.format(held.binding.name)
    if len(_mentions(end.function, parameter)) != 1 or parameter in end.function.scope.bindings:
        problem = elsewhere.format(parameter)
    for caller in _callers(context, end.function, where.function):
        if caller is None:
            problem = f"{where.function.name} or {end.function.name} may be called in other places too"
        elif not _hands_on(caller, where.function, end.function, parameter, place):
            problem = f"{caller.name} does not just hand on what {where.function.name} makes to {end.function.name}"
    return Begun(where, first, problem)


def _link(outer: Function, call: cst.Call, end: Function, parameter: str) -> tuple[cst.Call, int] | None:
    """The call whose result, and which one of them, is given for the parameter."""
    step = next(step for each, step in outer.scope.calls if each is call)
    given = bind(end.outline, call, skip=end.receivers).get(parameter)
    known = outer.scope.reaching(given.value, step) if isinstance(given, cst.Name) else []
    if len(known) != 1 or not outer.scope.is_definite(known, step) or len(known[0].path) != 1:
        return None
    made = known[0].value
    return (made, known[0].path[0]) if isinstance(made, cst.Call) else None


def _returned(function: Function, place: int) -> tuple[cst.BaseExpression, Step] | None:
    """The element of the tuple that the function returns, at its only `return`."""
    steps = [step for step in function.scope.steps if isinstance(step.node, cst.Return)]
    parts = elements(steps[0].node.value) if len(steps) == 1 and isinstance(steps[0].node, cst.Return) else None
    return (parts[place], steps[0]) if parts is not None and place < len(parts) else None


def _callers(context: Context, *methods: Function) -> Iterator[Function | None]:
    """The functions that call one of the methods; None for a place that cannot be told."""
    repository, seen = context.repository, set[int]()
    names = {method.outline.name for method in methods}
    for path in sorted({path for name in names for path in repository.files_with(name)}):
        module = repository.module(path)
        places: list[Function | Module] = [] if module is None else [module, *module.all_functions()]
        for place in places:
            if names.isdisjoint(place.words):
                continue
            for call, step in place.scope.calls:
                if last_name(call.func) not in names:
                    continue
                meaning = repository.resolve(call.func, place, step)
                if isinstance(meaning, Function) and meaning not in methods:
                    continue
                if not isinstance(place, Function) or meaning is None:
                    yield None
                elif id(place) not in seen:
                    seen.add(id(place))
                    yield place


def _hands_on(caller: Function, begin: Function, end: Function, parameter: str, place: int) -> bool:
    """Whether the function calls each of the two once, and hands on the result at `place` without reading it."""
    scope = caller.scope
    found = []
    for method in (begin, end):
        calls = [(c, s) for c, s in scope.calls if self_attribute(c.func, scope.receiver) == method.outline.name]
        if len(calls) != 1 or any(isinstance(node, (cst.For, cst.While)) for node, _ in calls[0][1].chain):
            return False
        found.append(calls[0])
    (made, at), (call, step) = found
    link = _link(caller, call, end, parameter)
    if at.chain != step.chain or link is None or link[0] is not made or link[1] != place:
        return False
    given = bind(end.outline, call, skip=end.receivers)[parameter]
    binding = scope.reaching(dotted(given) or "", step)[0]
    whole = isinstance(at.node, cst.Assign) and len(at.node.targets) == 1 and at.node.value is made
    names = target_names(at.node.targets[0].target) if whole and isinstance(at.node, cst.Assign) else []
    return whole and (binding.name, (place,)) in names and reads(scope, binding, shape=False) == [given]


def _mentions(function: Function, name: str) -> list[cst.CSTNode]:
    """The places in a function's statements that name one of its parameters."""
    nodes = [node for step in function.scope.steps for part in step.expressions for node in walk(part)]
    return [node for node in nodes if isinstance(node, cst.Name) and node.value == name]
