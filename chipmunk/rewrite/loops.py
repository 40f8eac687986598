"""Sampling loops: which loops call a model over and over, handing it what descends from its last answers.

The model may be called under any name to which it flows, through functions one or two calls down, functions inside the
function, and objects that hold it. What is found is a fact; the step clock's rule makes the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.repository import Class, Function, Repository
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import bind, dotted, is_call, last_name, parameters, self_attribute, text_of_string, walk
from chipmunk.rewrite.values import Place

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context
    from chipmunk.rewrite.roles import Model

_DEPTH = 3
"""How many calls down the model may be called."""
_GROWING = ("append", "extend", "update")
_TIME_WORDS = ("time", "sigma")


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
    matched: str | None
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

    def find(self) -> Loops:
        for place in self._context.values.places:
            for call in self._direct_calls(place):
                self._add(place, call)
        seen: set[int] = set()
        for _ in range(_DEPTH):
            # What was learnt about functions is used in the next round: routes grow by one call a round.
            for place, call in [(p, c) for p in self._context.values.places for c in self._calls_of_helpers(p, seen)]:
                self._add(place, call)
        self._merge_nested()
        for found in self._loops.values():
            self._judge(found)
        self._result.found.sort(key=lambda found: not found.is_used)
        return self._result

    # Calls

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
        hits = []
        for index, model in enumerate(self._context.models):
            names = parameters(model.forward.node)[1:]
            wanted = {name.name.value for name in names if name.default is None}
            if len(wanted) > 2 and wanted <= given <= {name.name.value for name in names}:
                hits.append(index)
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
            if outer is not None and _feeds_back(outer.place.scope, outer.loop, outer.calls):
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
        elif not _feeds_back(scope, loop, found.calls):
            around = {node for call in found.calls for node in call.step.loops if node is not loop}
            denoises = any(_feeds_back(scope, node, found.calls) for node in around)
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
            matched = source.summary(loop.iter)
            left = Uncounted(source, loop, reason, matched, found.calls[0].model, denoises)
            self._result.uncounted.append(left)
            return
        function = found.place.function
        found.is_used = function is None or self._is_mentioned(function)
        self._result.found.append(found)

    def _is_mentioned(self, function: Function) -> bool:
        name = function.node.name.value
        if name.startswith("__"):
            return True
        places = (place for place in self._context.values.places if place.function is not function)
        return any(name in place.scope.words for place in places)


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


# What comes back


def _feeds_back(scope: Scope, loop: cst.For, calls: list[ModelCall]) -> bool:
    """Whether the loop hands the model something that descends from what the model returned in an earlier round."""
    nodes = [call.call for call in calls]
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
        inside = [b for b in _assignments(scope, loop) if _overlap(b[0], name)]
        here = [b for b in scope.reaching(name, step) if loop in b.step.loops or b.step.node is loop]
        before = [b for b in inside if b[2].index < step.index]
        if any(earlier(value, at, crossed) for _, value, at in before):
            return True
        if here and scope.is_definite(here, step):
            return False
        return any(earlier(value, at, True) for _, value, at in inside)

    return any(earlier(arg.value, call.step, False) for call in calls for arg in call.call.args)


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


# The timestep


def model_mark(context: Context, model: Model) -> cst.Call | None:
    """The `chipmunk.model_forward(…)` above the model's forward, if it is marked already."""
    for decorator in model.forward.node.decorators:
        call = decorator.decorator
        if isinstance(call, cst.Call) and context.runtime_call(call, model.forward.module) == "model_forward":
            return call
    return None


def timestep_parameter(repository: Repository, model: Model) -> str | None:
    """The parameter of the model's forward that is the timestep: the first one that a sine and a cosine are taken of.

    Positions are, too: they are no candidates, nor is the image. A name that speaks of time goes first.
    """
    others = {model.image, model.ids, *_joined_parameters(model)}
    reached = [name for name in _waves(repository, model.forward, 0) if name not in others]
    names = [p.name.value for p in parameters(model.forward.node)[1:] if p.name.value not in others]
    for group in (reached, names):
        spoken = [name for name in group if name == "t" or any(word in name.lower() for word in _TIME_WORDS)]
        if spoken:
            return spoken[0]
    return reached[0] if reached else None


def _joined_parameters(model: Model) -> set[str]:
    """Parameters that are concatenated with the image or its positions: the text and its own."""
    found: set[str] = set()
    forward = model.forward
    for call, step in forward.scope.calls:
        if last_name(call.func) in ("cat", "concat", "concatenate") and call.args:
            roots = forward.scope.roots(call.args[0].value, step) - {forward.scope.receiver}
            found |= roots if len(roots) == 2 and roots & {model.image, model.ids} else set()
    return found


def _waves(repository: Repository, function: Function, depth: int) -> list[str]:
    """The function's parameters of which a sine or cosine is taken, here or further down, in the order of the text."""
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
            for callee in _callees(repository, function, call, step):
                given = bind(callee.node, call, skip=callee.receivers)
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
