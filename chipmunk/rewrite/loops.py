"""Sampling loops: which loops call a model over and over, handing it what descends from its last answers.

The model may be called under any name to which it flows, through functions one or two calls down, functions inside the
function, and objects that hold it. What is found is a fact; the step clock's rule makes the change.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chipmunk.rewrite.ast_nodes import dotted, last_name, mentions, required, walk
from chipmunk.rewrite.feedback import feeds_back
from chipmunk.rewrite.repository import Class, Function
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.statements import Loop, Statement, Statements, bind
from chipmunk.rewrite.values import Place, flat

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Home = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_DEPTH = 3
"""How many calls down the model may be called."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One place that calls the model. `callee`: the model's expression there, without the `chipmunk.slot` around it."""

    call: ast.Call
    step: Statement
    callee: ast.expr | None
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
    loop: Loop
    calls: list[ModelCall]
    """In the order of the text."""
    is_used: bool = True
    """Whether the repository mentions the function that it stands in."""

    @property
    def head(self) -> Statement:
        return next(step for step in self.place.statements.steps if step.node is self.loop)


@dataclass(frozen=True, eq=False)
class Uncounted:
    """A loop or call that has no steps that an iterable could count."""

    source: Source
    node: ast.expr | ast.stmt
    reason: str
    matched: ast.expr | None
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
    step: Statement


class _Finder:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._result = Loops()
        self._loops: dict[Loop, SamplingLoop] = {}
        self._routes: dict[int, list[_Route]] = {}
        """By function, function inside a function, or lambda (`id` of the node)."""
        self._names: set[str] = set()
        """Names of functions with a route."""
        self._keywords: dict[int, tuple[set[str], set[str]]] = {}
        """By model, if there are at least three that its forward must have: these, and all that it takes."""
        for index, model in enumerate(context.models):
            wanted = {*required(model.forward.outline.args)[1:]}
            if len(wanted) > 2:
                self._keywords[index] = wanted, {*model.forward.parameters[1:]}

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
        if self._context.values.is_hot(place):
            return True
        return place.loops and any(wanted <= place.words for wanted, _ in self._keywords.values())

    def _may_call_helper(self, place: Place) -> bool:
        if self._has_callable and place.loops:
            return True
        return not self._names.isdisjoint(place.words) and not self._names.isdisjoint(place.statements.called)

    def _direct_calls(self, place: Place) -> Iterator[ModelCall]:
        values = self._context.values
        for call, step in place.statements.calls:
            callee, slot = call.func, None
            inner = callee if isinstance(callee, ast.Call) and len(callee.args) == 2 else None
            if inner is not None and self._context.runtime_call(inner, place.names, step) == "slot":
                callee, slot = inner.args[0], _text(inner.args[1])
            if isinstance(callee, ast.Attribute) and callee.attr == "forward":
                callee = callee.value
            if (name := dotted(callee)) is None:
                continue
            model = values.model_of(flat(values.value(callee, step, place)))
            if model is None and step.in_loop and not call.args and len(call.keywords) > 2:
                model = self._by_keywords(call)
            if model is not None:
                yield ModelCall(call, step, callee, name, slot, model)

    def _by_keywords(self, call: ast.Call) -> int | None:
        """The only model whose forward takes exactly these keywords, and must have at least three of them."""
        given = {keyword.arg or "**" for keyword in call.keywords}
        hits = [index for index, (wanted, known) in self._keywords.items() if wanted <= given <= known]
        return hits[0] if len(hits) == 1 else None

    def _add(self, place: Place, found: ModelCall) -> None:
        """The call belongs to the innermost loop around it, or else to the function that it stands in."""
        source, home = place.module.source, _home(place, found)
        loops = [node for node in found.step.loops if home is None or _inside(found.step, home, node)]
        if loops:
            self._loops.setdefault(loops[-1], SamplingLoop(place, loops[-1], [])).calls.append(found)
            return
        around = [node for node, _ in found.step.chain if isinstance(node, ast.While)]
        if around:
            trains = _trains(place.statements, around[0])
            reason = "a training loop" if trains else "a `while` loop has no iterable to count steps by"
            self._result.uncounted.append(Uncounted(source, found.call, reason, None, found.model, not trains))
        elif home is not None:
            self._routes.setdefault(id(home), []).append(_Route(found.name, found.model, found.step))
            self._names.add(_name_of(home, place))

    def _calls_of_helpers(self, place: Place, seen: set[int]) -> Iterator[ModelCall]:
        """Calls of functions that call the model: `x = self.step(x, t)`."""
        for call, step in place.statements.calls:
            if id(call) in seen or not (last_name(call.func) in self._names or (step.in_loop and self._has_callable)):
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
                if step.in_loop:
                    left = Uncounted(place.module.source, call, reason, None, routes[0].model, True)
                    self._result.uncounted.append(left)
                break

    def _helpers(self, call: ast.Call, step: Statement, place: Place) -> Iterator[tuple[_Home, Function | None]]:
        """What the call may run: a function inside this function, one of the repository, or an object's method."""
        name = dotted(call.func)
        if isinstance(call.func, ast.Name):
            for inner in place.statements.steps:
                if isinstance(inner.node, _FUNCTIONS) and inner.node.name == name:
                    yield inner.node, None
            for binding in place.statements.reaching(call.func.id, step):
                if isinstance(binding.value, ast.Lambda):
                    yield binding.value, None
        callee = self._context.values.callee(call, step, place)
        if callee is not None and callee.outline.name != "__init__":
            yield callee.outline, callee
        if name is None:
            return
        for owner in self._classes_of(name, step, place):
            for method in ("__call__", "forward"):
                run = self._context.repository.method(owner, method)
                if run is not None:
                    yield run.outline, run
                    break
        head, _, method = name.rpartition(".")
        for owner in self._classes_of(head, step, place) if head else ():
            run = self._context.repository.method(owner, method)
            if run is not None:
                yield run.outline, run

    def _classes_of(self, name: str, step: Statement, place: Place) -> Iterator[Class]:
        """The repository's classes of which `name`, a variable or an attribute of self, may hold an object."""
        repository, function = self._context.repository, place.function
        if function is not None and function.owner is not None and name.startswith(f"{function.receiver}."):
            attribute = name.partition(".")[2]
            yield from repository.classes_in(function.owner, attribute) if "." not in attribute else ()
        for binding in place.statements.reaching(name, step):
            if isinstance(binding.value, ast.Call) and not binding.path:
                meaning = repository.resolve(dotted(binding.value.func), place.names, binding.step)
                if isinstance(meaning, Class):
                    yield meaning

    def _expression(self, name: str, node: _Home, callee: Function | None, call: ast.Call, place: Place) -> str | None:
        """`name`, the model in the names of the function `node`, in the names of the place that calls it."""
        head, _, rest = name.partition(".")
        tail = f".{rest}" if rest else ""
        receivers = 0 if callee is None else callee.receivers
        if callee is not None and receivers and head == callee.receiver:
            owner = dotted(call.func) or ""
            owner = owner.rpartition(".")[0] if owner.split(".")[-1] == callee.outline.name else owner
            of = call.func.value if isinstance(call.func, ast.Attribute) else None
            if isinstance(of, ast.Call) and last_name(of.func) == "super":
                owner = _receiver(place)
            return f"{owner}{tail}" if owner else None
        own = {parameter.arg for parameter in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        if head in own:
            given = None if isinstance(node, ast.Lambda) else bind(node, call, skip=receivers).get(head)
            value = dotted(given) if given is not None else None
            return None if value is None else value + tail
        if callee is None:
            return name  # a name of the function around both
        is_here = callee.module is place.module and head not in place.statements.bindings
        return name if is_here and (place.function is None or head not in place.function.parameters) else None

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
            if outer is not None and feeds_back(outer.place.statements, outer.loop, _where(outer.calls)):
                del self._loops[loop]
                outer.calls += inner.calls

    def _judge(self, found: SamplingLoop) -> None:
        statements, source, loop = found.place.statements, found.place.module.source, found.loop
        calls = sorted(found.calls, key=lambda call: call.step.index)
        heads = [_at_head(statements, call.name, call.step, found) for call in calls]
        found.calls = [replace(call, at_head=head or "") for call, head in zip(calls, heads, strict=True)]
        denoises, reason = True, ""
        if _trains(statements, loop):
            denoises, reason = False, "a training loop"
        elif not feeds_back(statements, loop, _where(found.calls)):
            around = {node for call in found.calls for node in call.step.loops if node is not loop}
            denoises = any(feeds_back(statements, node, _where(found.calls)) for node in around)
            reason = "nothing that the model returns reaches its next call: these are no denoising steps"
            if denoises:
                reason = "a step calls the model in a loop of its own, from one place"
        elif isinstance(loop, ast.AsyncFor):
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


def _home(place: Place, found: ModelCall) -> _Home | None:
    """The innermost function or lambda that the call stands in; None outside all functions."""
    for node in walk(found.step.parts):
        if isinstance(node, ast.Lambda) and any(inner is found.call for inner in walk([node.body])):
            return node
    inner = [node for node, _ in found.step.chain if isinstance(node, _FUNCTIONS)]
    if inner:
        return inner[-1]
    return None if place.function is None else place.function.outline


def _name_of(home: _Home, place: Place) -> str:
    """What a function is called by: a method `__call__` or `forward` by whatever holds its object."""
    if not isinstance(home, ast.Lambda):
        return home.name
    for bindings in place.statements.bindings.values():
        for binding in bindings:
            if binding.value is home:
                return binding.name
    return ""


def _receiver(place: Place) -> str:
    return "self" if place.function is None else place.function.receiver


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _inside(step: Statement, home: _Home, loop: Loop) -> bool:
    """Whether the loop stands inside the function `home`, not around it."""
    if isinstance(home, ast.Lambda):
        return False
    nodes = [node for node, _ in step.chain]
    return home not in nodes or nodes.index(home) < nodes.index(loop)


def _is_in(step: Statement, function: _Home) -> bool:
    return any(node is function for node, _ in step.chain)


def _pairs(routes: list[_Route]) -> Iterator[tuple[_Route, _Route]]:
    for index, first in enumerate(routes):
        for later in routes[index + 1 :]:
            yield first, later


def _at_head(statements: Statements, name: str, step: Statement, found: SamplingLoop) -> str | None:
    """What is called `name` at `step` of the loop, named where the loop begins; None if it is made inside."""
    parts = name.split(".")
    for taken in range(len(parts), 0, -1):
        bindings = statements.reaching(".".join(parts[:taken]), step)
        inside = [each for each in bindings if found.loop in each.step.loops or each.step is found.head]
        if inside:
            value = dotted(inside[0].value) if inside[0].value is not None else None
            if len(inside) > 1 or not statements.is_definite(inside, step) or value is None or inside[0].path:
                return None
            return _at_head(statements, ".".join([value, *parts[taken:]]), inside[0].step, found)
    return name


def _trains(statements: Statements, loop: Loop | ast.While) -> bool:
    return any(
        last_name(call.func) == "backward" and any(node is loop for node, _ in step.chain)
        for call, step in statements.calls
    )


def _where(calls: list[ModelCall]) -> list[tuple[ast.Call, Statement]]:
    return [(call.call, call.step) for call in calls]
