"""Which parameter of a model's forward is the timestep, for models that no loop of the repository counts steps of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.repository import Function, Repository
from chipmunk.rewrite.roles import CONCATENATIONS
from chipmunk.rewrite.syntax import bind, elements, is_call, last_name, parameters, self_attribute

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context
    from chipmunk.rewrite.roles import Model

_DEPTH = 3
"""How many calls down a sine may be taken."""
_TIME_WORDS = ("time", "sigma")
_TIMES = ("t", "time", "timestep", "sigma")
"""Names that say no more than that; `time_sign` or `end_time` beside one of them is something else."""


def model_mark(context: Context, model: Model) -> cst.Call | None:
    """The `chipmunk.model_forward(…)` above the model's forward, if it is marked already."""
    for decorator in model.forward.node.decorators:
        call = decorator.decorator
        if isinstance(call, cst.Call) and context.runtime_call(call, model.forward.module) == "model_forward":
            return call
    return None


def timestep_parameter(repository: Repository, model: Model) -> str | None:
    """The parameter of the model's forward that is the timestep: the first one that a sine and a cosine are taken of.

    Positions are, too: they are no candidates, nor is the image. A parameter that must be given goes before one that
    may be left out, then a name that speaks of time, and of nothing else, before others; that alone is enough where no
    sine is seen.
    """
    others = {model.image, model.order.ids, *_joined_parameters(model)}
    own = parameters(model.forward.node)[1:]
    names = [p.name.value for p in own if p.name.value not in others]
    reached = [name for name in _waves(repository, model.forward, 0) if name in names]
    required = {p.name.value for p in own if p.default is None}
    for candidates in ([n for n in names if n in required], names):
        seen = [name for name in reached if name in candidates]
        spoken = [name for name in (*seen, *candidates) if _speaks_of_time(name)]
        plain = [name for name in spoken if name.lower().rstrip("s") in _TIMES]
        if spoken or seen:
            return (plain or spoken or seen)[0]
    return None


def _speaks_of_time(name: str) -> bool:
    return name == "t" or any(word in name.lower() for word in _TIME_WORDS)


def _joined_parameters(model: Model) -> set[str]:
    """Parameters that are concatenated with the image or its positions: other tokens and theirs."""
    found: set[str] = set()
    scope = model.forward.scope
    for call, step in scope.calls:
        if not is_call(call, *CONCATENATIONS) or not call.args:
            continue
        roots = [scope.roots(part, step) - {scope.receiver} for part in elements(call.args[0].value) or []]
        joined = [next(iter(each)) for each in roots if len(each) == 1]
        if {model.image, model.order.ids} & set(joined):
            found.update(joined)
        if len(together := frozenset[str]().union(*roots)) == 2 and together & {model.image, model.order.ids}:
            found |= together
    return found


def _waves(repository: Repository, function: Function, depth: int) -> list[str]:
    """The function's parameters of which a sine or cosine is taken, here or further down, in the order of the text.

    What a function of another package does with its first argument is told by its name: `time_proj(level)`.
    """
    found: list[str] = []
    scope = function.scope
    if depth > _DEPTH:
        return found
    for call, step in scope.calls:
        values: list[cst.BaseExpression] = []
        if last_name(call.func) in ("sin", "cos"):
            values = [arg.value for arg in call.args] or (
                [call.func.value] if isinstance(call.func, cst.Attribute) else []
            )
        else:
            callees = list(_callees(repository, function, call, step))
            if not callees and depth == 0 and any(word in last_name(call.func).lower() for word in _TIME_WORDS):
                values = [arg.value for arg in call.args[:1]]
            for callee in callees:
                given = bind(callee.outline, call, skip=callee.receivers)
                values += [given[name] for name in _waves(repository, callee, depth + 1) if name in given]
        for value in values:
            roots = scope.roots(value, step) - ({scope.receiver} if function.receivers else set())
            if len(roots) == 1 or depth:  # further down, frequencies come from other parameters
                found += [name for name in scope.parameters if name in roots and name not in found]
    return found


def _callees(repository: Repository, function: Function, call: cst.Call, step: Step) -> Iterator[Function]:
    meaning = repository.resolve(call.func, function, step)
    if isinstance(meaning, Function) and meaning is not function:
        yield meaning
    attribute = self_attribute(call.func, function.scope.receiver)
    if attribute is not None and function.owner is not None and not isinstance(meaning, Function):
        for owner in repository.classes_in(function.owner, attribute):
            run = repository.method(owner, "forward")
            if run is not None and run is not function:
                yield run
