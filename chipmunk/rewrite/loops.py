"""Sampling loops: which loops call a model over and over, handing it what descends from its last answers.

The model may be called under any name to which it flows, through functions one or two calls down, functions inside the
function, and objects that hold it. What is found is a fact; the step clock's rule makes the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.ast_nodes import mentions
from chipmunk.rewrite.feedback import feeds_back
from chipmunk.rewrite.flow import Scope, Step
from chipmunk.rewrite.repository import Class, Function
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import bind, dotted, is_call, last_name, parameters, text_of_string, walk
from chipmunk.rewrite.values import Place

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context

_DEPTH = 3
"""How many calls down the model may be called."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One place that calls the model. `callee`: the model's expression there, without the `chipmunk.slot` around it."""

    call: cst.Call
    step: Step
    callee: cst.BaseExpression | None
    name: str
    """The model's expression as a dotted name."""
    slot: str | None
    model: int
    helper: str = ""
    """The function through which the model is called; empty for a call of the model itself."""
    at_head: str = ""
    """The model's expression at the head of the loop."""


@dataclass(eq=False)
class SamplingLoop:
    """A loop whose rounds are denoising steps."""

    place: Place
    loop: cst.For
    calls: list[ModelCall]
    """In the order of the text."""
    is_used: bool = True
    """Whether the repository mentions the function that it stands in."""

    @property
    def head(self) -> Step:
        return next(step for step in self.place.scope.steps if step.node is self.loop)


@dataclass(frozen=True, eq=False)
class Uncounted:
    """A loop or call that has no steps that an iterable could count."""

    source: Source
    node: cst.CSTNode
    reason: str
    matched: cst.CSTNode | None
    model: int
    denoises: bool
    """Whether its calls may be denoising steps all the same: then the model's own timestep can count them."""


@dataclass(eq=False)
class Loops:
    found: list[SamplingLoop] = field(default_factory=list)
    uncounted: list[Uncounted] = field(default_factory=list)

    def leaves_calls(self, model: int) -> bool:
        """Whether the model is called where no loop counts the steps, or by nobody in the repository."""
        if any(other.model == model and other.denoises for other in self.uncounted):
            return True
        return not any(call.model == model for found in self.found for call in found.calls)


def find_loops(context: Context) -> Loops:
    """All loops that call any of the models."""
    return _Finder(context).find()


@dataclass(frozen=True, eq=False)
class _Route:
    """A function calls the model outside loops. `name`: the model's expression in the function's own names."""

    name: str
    model: int
    step: Step


class _Finder:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._result = Loops()
        self._loops: dict[cst.For, SamplingLoop] = {}
        self._routes: dict[int, list[_Route]] = {}
        """By function, function inside a function, or lambda (`id` of the node)."""
        self._names: set[str] = set()
        """Names of functions with a route."""
        self._keywords: dict[int, tuple[set[str], set[str]]] = {}
        """By model, if there are at least three that its forward must have: these, and all that it takes."""
        for index, model in enumerate(context.models):
            names = parameters(model.forward.node)[1:]
            wanted = {name.name.value for name in names if name.default is None}
            if len(wanted) > 2:
                self._keywords[index] = wanted, {name.name.value for name in names}

    def find(self) -> Loops:
        for place in self._context.values.places:
            for call in self._direct_calls(place) if self._may_call(place) else ():
                self._add(place, call)
        seen: set[int] = set()
        for _ in range(_DEPTH):
            # What was learnt about functions is used in the next round: routes grow by one call a round.
            places = [p for p in self._context.values.places if self._may_call_helper(p)]
            for place, call in [(p, c) for p in places for c in self._calls_of_helpers(p, seen)]:
                self._add(place, call)
        self._merge_nested()
        for found in self._loops.values():
            self._judge(found)
        self._result.found.sort(key=lambda found: not found.is_used)
        return self._result

    # Calls

    def _may_call(self, place: Place) -> bool:
        """Whether the place may call a model at all; told without its tree."""
        if self._context.values.calls(place):
            return True
        return place.loops and any(wanted <= place.words for wanted, _ in self._keywords.values())

    def _may_call_helper(self, place: Place) -> bool:
        if self._has_callable and place.loops:
            return True
        return not self._names.isdisjoint(place.words) and not self._names.isdisjoint(place.statements.called)

    def _direct_calls(self, place: Place) -> Iterator[ModelCall]:
        values = self._context.values
        for call, step in place.scope.calls:
            callee, slot = call.func, None
            inner = callee if isinstance(callee, cst.Call) and len(callee.args) == 2 else None
            if inner is not None and self._context.runtime_call(inner, place.names, step) == "slot":
                callee, slot = inner.args[0].value, text_of_string(inner.args[1].value)
            if isinstance(callee, cst.Attribute) and callee.attr.value == "forward":
                callee = callee.value
            if (name := dotted(callee)) is None:
                continue
            model = values.model_of(values.labels(callee, step, place))
            if model is None and step.loops and len(call.args) > 2:
                model = self._by_keywords(call)
            if model is not None:
                yield ModelCall(call, step, callee, name, slot, model)

    def _by_keywords(self, call: cst.Call) -> int | None:
        """The only model whose forward takes exactly these keywords, and must have at least three of them."""
        given = {arg.keyword.value for arg in call.args if arg.keyword is not None}
        if len(given) != len(call.args):
            return None
        hits = [index for index, (wanted, known) in self._keywords.items() if wanted <= given <= known]
        return hits[0] if len(hits) == 1 else None

    def _add(self, place: Place, found: ModelCall) -> None:
        """The call belongs to the innermost loop around it, or else to the function that it stands in."""
        source, home = place.module.source, _home(place, found)
        loops = [node for node in found.step.loops if home is None or _inside(found.step, home, node)]
        if loops:
            self._loops.setdefault(loops[-1], SamplingLoop(place, loops[-1], [])).calls.append(found)
            return
        around = [node for node, _ in found.step.chain if isinstance(node, cst.While)]
        if around:
            trains = _trains(place.scope, around[0])
            reason = "a training loop" if trains else "a `while` loop has no iterable to count steps by"
            self._result.uncounted.append(Uncounted(source, found.call, reason, None, found.model, not trains))
        elif home is not None:
            self._routes.setdefault(id(home), []).append(_Route(found.name, found.model, found.step))
            self._names.add(_name_of(home, place))

    def _calls_of_helpers(self, place: Place, seen: set[int]) -> Iterator[ModelCall]:
        """Calls of functions that call the model: `x = self.step(x, t)`."""
        for call, step in place.scope.calls:
            if id(call) in seen or not (last_name(call.func) in self._names or (step.loops and self._has_callable)):
                continue
            for node, callee in self._helpers(call, step, place):
                routes = self._routes.get(id(node), [])
                if not routes or _is_in(step, node) or self._context.runtime_call(call, place.names, step) is not None:
                    continue
                seen.add(id(call))
                name = last_name(call.func)
                expression = self._expression(routes[0].name, node, callee, call, place)
                if expression is None:
                    reason = f"{name} calls the model, but the loop has no name for it"
                elif any(not first.step.excludes(later.step) for first, later in _pairs(routes)):
                    reason = f"{name} calls the model at several places"
                else:
                    yield ModelCall(call, step, None, expression, None, routes[0].model, helper=name)
                    break
                if step.loops:
                    left = Uncounted(place.module.source, call, reason, None, routes[0].model, True)
                    self._result.uncounted.append(left)
                break

    def _helpers(self, call: cst.Call, step: Step, place: Place) -> Iterator[tuple[cst.CSTNode, Function | None]]:
        """What the call may run: a function inside this function, one of the repository, or an object's method."""
        name = dotted(call.func)
        if isinstance(call.func, cst.Name):
            for inner in place.scope.steps:
                if isinstance(inner.node, cst.FunctionDef) and inner.node.name.value == name:
                    yield inner.node, None
            for binding in place.scope.reaching(call.func.value, step):
                if isinstance(binding.value, cst.Lambda):
                    yield binding.value, None
        callee = self._context.values.callee(call, step, place)
        if callee is not None and callee.node.name.value != "__init__":
            yield callee.node, callee
        if name is None:
            return
        for owner in self._classes_of(name, step, place):
            for method in ("__call__", "forward"):
                run = self._context.repository.method(owner, method)
                if run is not None:
                    yield run.node, run
                    break
        head, _, method = name.rpartition(".")
        for owner in self._classes_of(head, step, place) if head else ():
            run = self._context.repository.method(owner, method)
            if run is not None:
                yield run.node, run

    def _classes_of(self, name: str, step: Step, place: Place) -> Iterator[Class]:
        """The repository's classes of which `name`, a variable or an attribute of self, may hold an object."""
        repository, scope = self._context.repository, place.scope
        attribute = name.partition(".")[2] if name.startswith(f"{scope.receiver}.") else ""
        if attribute and "." not in attribute and place.function is not None and place.function.owner is not None:
            yield from repository.classes_in(place.function.owner, attribute)
        for binding in scope.reaching(name, step):
            if isinstance(binding.value, cst.Call) and not binding.path:
                meaning = repository.resolve(binding.value.func, place.names, binding.step)
                if isinstance(meaning, Class):
                    yield meaning

    def _expression(
        self, name: str, node: cst.CSTNode, callee: Function | None, call: cst.Call, place: Place
    ) -> str | None:
        """`name`, the model in the names of the function `node`, in the names of the place that calls it."""
        head, _, rest = name.partition(".")
        tail = f".{rest}" if rest else ""
        function = node if isinstance(node, (cst.FunctionDef, cst.Lambda)) else None
        if function is None:
            return None
        receivers = 0 if callee is None else callee.receivers
        if callee is not None and receivers and head == callee.scope.receiver:
            owner = dotted(call.func) or ""
            owner = owner.rpartition(".")[0] if owner.split(".")[-1] == callee.node.name.value else owner
            if is_call(call.func.value, "super") if isinstance(call.func, cst.Attribute) else False:
                owner = place.scope.receiver
            return f"{owner}{tail}" if owner else None
        given = {}
        if isinstance(function, cst.FunctionDef):
            given = bind(function, call, skip=receivers)
            own = {p.name.value for p in parameters(function)}
        else:
            own = {p.name.value for p in function.params.params}
        if head in own:
            value = dotted(given.get(head))
            return None if value is None else value + tail
        if callee is None:
            return name  # a name of the function around both
        is_here = callee.module is place.module and head not in place.scope.bindings
        return name if is_here and (place.function is None or head not in place.scope.parameters) else None

    @property
    def _has_callable(self) -> bool:
        """Whether some object of the repository calls the model when it is called itself."""
        return not self._names.isdisjoint(("__call__", "forward"))

    # Loops

    def _merge_nested(self) -> None:
        """A loop inside another one that calls the model too belongs to the outer one's step, if that one has steps."""
        for loop in list(self._loops):
            inner = self._loops[loop]
            around = [node for call in inner.calls for node in call.step.loops if node is not loop]
            outer = next((self._loops[node] for node in around if node in self._loops), None)
            if outer is not None and feeds_back(outer.place.scope, outer.loop, _where(outer.calls)):
                del self._loops[loop]
                outer.calls += inner.calls

    def _judge(self, found: SamplingLoop) -> None:
        scope, source, loop = found.place.scope, found.place.module.source, found.loop
        calls = sorted(found.calls, key=lambda call: call.step.index)
        heads = [_at_head(scope, call.name, call.step, found) for call in calls]
        found.calls = [replace(call, at_head=head or "") for call, head in zip(calls, heads, strict=True)]
        denoises, reason = True, ""
        if _trains(scope, loop):
            denoises, reason = False, "a training loop"
        elif not feeds_back(scope, loop, _where(found.calls)):
            around = {node for call in found.calls for node in call.step.loops if node is not loop}
            denoises = any(feeds_back(scope, node, _where(found.calls)) for node in around)
            reason = "nothing that the model returns reaches its next call: these are no denoising steps"
            if denoises:
                reason = "a step calls the model in a loop of its own, from one place"
        elif loop.asynchronous is not None:
            reason = "an `async for` loop has no iterable to count steps by"
        elif len(found.calls) > 1 and (helper := next((c.helper for c in found.calls if c.helper), "")):
            places = len(found.calls)
            reason = f"the loop calls the model at {places} places, one of them inside {helper}: they are told apart by"
            reason += " no name"
        elif None in heads:
            reason = "the model that it calls has no name where the loop begins"
        if reason:
            left = Uncounted(source, loop, reason, loop.iter, found.calls[0].model, denoises)
            self._result.uncounted.append(left)
            return
        function = found.place.function
        found.is_used = function is None or self._is_mentioned(function)
        self._result.found.append(found)

    def _is_mentioned(self, function: Function) -> bool:
        name = function.outline.name
        if name.startswith("__"):
            return True
        places = (place for place in self._context.values.places if place.function is not function)
        return any(name in place.words and mentions(place.body, {name}) for place in places)


def _home(place: Place, found: ModelCall) -> cst.CSTNode | None:
    """The innermost function or lambda that the call stands in; None outside all functions."""
    for expression in found.step.expressions:
        for node in walk(expression):
            if isinstance(node, cst.Lambda) and any(inner is found.call for inner in walk(node.body)):
                return node
    inner = [node for node, _ in found.step.chain if isinstance(node, cst.FunctionDef)]
    if inner:
        return inner[-1]
    return None if place.function is None else place.function.node


def _name_of(home: cst.CSTNode, place: Place) -> str:
    """What a function is called by: a method `__call__` or `forward` by whatever holds its object."""
    if isinstance(home, cst.FunctionDef):
        return home.name.value
    for bindings in place.scope.bindings.values():
        for binding in bindings:
            if binding.value is home:
                return binding.name
    return ""


def _inside(step: Step, home: cst.CSTNode, loop: cst.For) -> bool:
    """Whether the loop stands inside the function `home`, not around it."""
    if isinstance(home, cst.Lambda):
        return False
    nodes = [node for node, _ in step.chain]
    return home not in nodes or nodes.index(home) < nodes.index(loop)


def _is_in(step: Step, function: cst.CSTNode) -> bool:
    return any(node is function for node, _ in step.chain)


def _pairs(routes: list[_Route]) -> Iterator[tuple[_Route, _Route]]:
    for index, first in enumerate(routes):
        for later in routes[index + 1 :]:
            yield first, later


def _at_head(scope: Scope, name: str, step: Step, found: SamplingLoop) -> str | None:
    """What is called `name` at `step` of the loop, named where the loop begins; None if it is made inside."""
    parts = name.split(".")
    for taken in range(len(parts), 0, -1):
        own = ".".join(parts[:taken])
        inside = [b for b in scope.reaching(own, step) if found.loop in b.step.loops or b.step is found.head]
        if inside:
            value = dotted(inside[0].value)
            if len(inside) > 1 or not scope.is_definite(inside, step) or value is None or inside[0].path:
                return None
            return _at_head(scope, ".".join([value, *parts[taken:]]), inside[0].step, found)
    return name


def _trains(scope: Scope, loop: cst.CSTNode) -> bool:
    return any(
        last_name(call.func) == "backward" and any(node is loop for node, _ in step.chain) for call, step in scope.calls
    )


def _where(calls: list[ModelCall]) -> list[tuple[cst.Call, Step]]:
    return [(call.call, call.step) for call in calls]
