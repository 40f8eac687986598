"""What the expressions that make a module build: torch's layers, sequences and lists of them, and objects of classes.

A module is followed from its construction: the arguments of its constructor decide the constructor's conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import libcst as cst

from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.repository import Class, External, Function, Repository
from chipmunk.rewrite.syntax import argument, bind, dotted, elements, integer, last_name, parameters, text_of_string

_DEPTH = 12

# Libraries' classes that need not lie in the repository: what the constructor's arguments make of them.
_LIBRARY = {
    "diffusers.models.attention.FeedForward": ("net.0.proj", "net.2", "FeedForward, GELU"),
    "timm.models.vision_transformer.Mlp": ("fc1", "fc2", "Mlp"),
    "timm.layers.Mlp": ("fc1", "fc2", "Mlp"),
    "timm.layers.mlp.Mlp": ("fc1", "fc2", "Mlp"),
}
_LIBRARY_ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class Layer:
    """`linear`, `gelu_tanh`, `gelu`, `gelu?` (which one is not known), `silu`, or `idle` (dropout, identity)."""

    kind: str


@dataclass(frozen=True)
class Series:
    items: tuple[Built, ...]
    runs: bool
    """A Sequential, which calls its items one after another; otherwise a list."""


@dataclass(frozen=True)
class Given:
    """An argument, where it stands, and what its names stand for there."""

    value: cst.BaseExpression
    function: Function
    step: Step | None
    arguments: tuple[tuple[str, Given], ...]


@dataclass(frozen=True)
class Instance:
    """An object of the repository's class. `arguments`: what the constructor was given, by parameter."""

    owner: Class
    arguments: tuple[tuple[str, Given], ...] = ()


@dataclass(frozen=True)
class LibraryMlp:
    """An object of a library's class that is an MLP: its activation, and what `layers.Mlp` says of it."""

    activation: str
    parts: str
    of: str


Built = Layer | Series | Instance | LibraryMlp | None
_Arguments = tuple[tuple[str, Given], ...]


class Unclear:
    """What is no literal."""


def is_torch(
    repository: Repository, callee: cst.BaseExpression, name: str, function: Function, step: Step | None
) -> bool:
    """Whether the callee is torch's `name`, or may be, as nothing is known of it."""
    if last_name(callee) != name or dotted(callee) is None:
        meaning = repository.resolve(callee, function, step)
        return isinstance(meaning, External) and meaning.name.startswith("torch.") and meaning.name.endswith(f".{name}")
    meaning = repository.resolve(callee, function, step)
    return meaning is None or (isinstance(meaning, External) and meaning.name.startswith("torch"))


def built_as(repository: Repository, owner: Class, attribute: str) -> Iterator[Built]:
    """What the expressions that are assigned to `self.attribute` build."""
    builder = Builder(repository)
    for value, method, step in repository.values_of(owner, attribute):
        yield from builder.choices(Given(value, method, step, ()))


@dataclass
class Builder:
    """Follows constructors."""

    repository: Repository
    depth: int = 0

    def choices(self, given: Given) -> list[Built]:
        """What the expression may build: both arms of a condition that nothing decides."""
        value = given.value
        if isinstance(value, cst.IfExp):
            decided = self.decide(value.test, given)
            arms = [value.body] * (decided is not False) + [value.orelse] * (decided is not True)
            return [built for arm in arms for built in self.choices(replace(given, value=arm))]
        return [self.build(given)]

    def build(self, given: Given) -> Built:
        """What the expression builds; None if it is not known."""
        if self.depth > _DEPTH:
            return None
        self.depth += 1
        try:
            return self._build(given)
        finally:
            self.depth -= 1

    def _build(self, given: Given) -> Built:
        value = given.value
        if isinstance(value, cst.IfExp):
            return _one(self.choices(given))
        if isinstance(value, cst.Name):
            return _one([self.build(meant) for meant in self.meant(given)])
        if isinstance(value, (cst.List, cst.Tuple)):
            return Series(tuple(self.build(replace(given, value=item)) for item in elements(value) or []), False)
        return self._call(value, given) if isinstance(value, cst.Call) else None

    def _call(self, call: cst.Call, given: Given) -> Built:
        for callee in self.meant(replace(given, value=call.func)):
            if isinstance(callee.value, cst.Lambda):
                return self.build(replace(callee, value=callee.value.body))
            meaning = self.repository.resolve(callee.value, callee.function, callee.step)
            name = last_name(callee.value)
            if isinstance(meaning, Class):
                return self._instance(meaning, call, given)
            if isinstance(meaning, External) and meaning.name in _LIBRARY:
                return self._library(meaning.name, call, given)
            if name.endswith("Linear"):
                return Layer("linear")
            if isinstance(meaning, Function):
                return self._made_by(meaning, call, given)
            if isinstance(meaning, External) and not meaning.name.startswith("torch"):
                return None
            if name in ("Dropout", "Identity"):
                return Layer("idle")
            if name == "SiLU":
                return Layer("silu")
            if name == "GELU":
                text = self.text(argument(call, 0, "approximate"), given) if call.args else "none"
                return Layer({"tanh": "gelu_tanh", "none": "gelu", None: "gelu?"}.get(text, "other"))
            if name in ("Sequential", "ModuleList"):
                parts = [arg.value for arg in call.args]
                if len(parts) == 1 and (name == "ModuleList" or isinstance(parts[0], (cst.List, cst.Tuple))):
                    parts = elements(parts[0]) or []  # one list, starred or not
                return Series(tuple(self.build(replace(given, value=part)) for part in parts), name == "Sequential")
        return None

    def _instance(self, owner: Class, call: cst.Call, given: Given) -> Built:
        if owner.name.endswith("Linear"):
            return Layer("linear")
        constructor = self.repository.method(owner, "__init__")
        if constructor is None:
            return Instance(owner)
        bound = _bound(constructor, call, given)
        return None if bound is None else Instance(owner, bound)

    def _made_by(self, function: Function, call: cst.Call, given: Given) -> Built:
        """What a function of the repository makes and returns; None where that may be one thing or another."""
        bound = _bound(function, call, given)
        if bound is None:
            return None
        found: list[Built] = []
        for step in function.scope.steps:
            if isinstance(step.node, cst.Return):
                inner = Given(step.node.value or cst.Name("None"), function, step, bound)
                if self._happens(step, inner):
                    found += [self.build(meant) for meant in self.meant(inner)]
        return _one(found)

    def _library(self, name: str, call: cst.Call, given: Given) -> Built:
        first, second, classes = _LIBRARY[name]
        if any(arg.star for arg in call.args):
            return None
        if classes == "Mlp":
            return LibraryMlp("gelu?", f"{first}, act, {second}", classes)
        kind = argument(call, 4, "activation_fn")
        activation = _LIBRARY_ACTIVATIONS.get(self.text(kind, given) or "")
        return None if activation is None else LibraryMlp(activation, f"{first}, {activation}, {second}", classes)

    def attribute(self, instance: Instance, name: str) -> Built:
        """What `self.name` is in an object, lists with what is appended to them."""
        found: list[Built] = []
        for value, method, step in self.repository.values_of(instance.owner, name):
            given = self._inside(instance, value, method, step)
            if self._happens(step, given):
                found.append(self.build(given))
        built = _one(found)
        if not isinstance(built, Series) or built.runs:
            return built
        items = list(built.items)
        for owner in self.repository.bases(instance.owner):
            for method in owner.methods.values():
                for call, step in method.scope.calls:
                    if dotted(call.func) == f"{method.scope.receiver}.{name}.append" and len(call.args) == 1:
                        given = self._inside(instance, call.args[0].value, method, step)
                        if self._happens(step, given):
                            items.append(self.build(given))
        return Series(tuple(items), False)

    def _inside(self, instance: Instance, value: cst.BaseExpression, method: Function, step: Step) -> Given:
        """An expression in a method of the object; only the names of its own constructor are known."""
        constructor = self.repository.method(instance.owner, "__init__")
        known = instance.arguments if method is constructor else ()
        return Given(value, method, step, known)

    def _happens(self, step: Step, given: Given) -> bool:
        """Whether the step may run; False only if a condition around it says no."""
        for node, branch in step.chain:
            if isinstance(node, cst.If):
                decided = self.decide(node.test, given)
                if decided is not None and decided != (branch == "body"):
                    return False
        return True

    def meant(self, given: Given) -> list[Given]:
        """What a name stands for, through local variables and the constructor's arguments; itself if nothing else."""
        name, scope = given.value, given.function.scope
        if isinstance(name, cst.IfExp):
            decided = self.decide(name.test, given)
            if decided is None:
                return [given]
            return self.meant(replace(given, value=name.body if decided else name.orelse))
        if not isinstance(name, cst.Name) or given.step is None:
            return [given]
        found: list[Given] = []
        for binding in scope.reaching(name.value, given.step):
            inner = replace(given, value=binding.value, step=binding.step) if binding.value is not None else None
            if inner is not None and not binding.path and self._happens(binding.step, inner):
                found += self.meant(inner)
        arguments = dict(given.arguments)
        if not found and name.value in arguments:
            return self.meant(arguments[name.value])
        return found or [given]

    def text(self, value: cst.BaseExpression | None, given: Given) -> str | None:
        """The string that the expression is."""
        if value is None:
            return None
        found = {text_of_string(meant.value) for meant in self.meant(replace(given, value=value))}
        return found.pop() if len(found) == 1 else None

    def decide(self, test: cst.BaseExpression, given: Given) -> bool | None:
        """Whether a condition holds, from the constructor's arguments; None if they do not tell."""
        if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
            inner = self.decide(test.expression, given)
            return None if inner is None else not inner
        if isinstance(test, cst.Name):
            found = [_literal(meant.value) for meant in self.meant(replace(given, value=test))]
            return bool(found[0]) if len(found) == 1 and not isinstance(found[0], Unclear) else None
        if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
            target = test.comparisons[0]
            sides = [
                _literal(meant[0].value) if len(meant := self.meant(replace(given, value=side))) == 1 else Unclear()
                for side in (test.left, target.comparator)
            ]
            if any(isinstance(side, Unclear) for side in sides):
                return None
            if isinstance(target.operator, (cst.Equal, cst.Is)):
                return sides[0] == sides[1]
            if isinstance(target.operator, (cst.NotEqual, cst.IsNot)):
                return sides[0] != sides[1]
        return None


def _bound(function: Function, call: cst.Call, given: Given) -> _Arguments | None:
    """What the function's parameters stand for in this call; None if not all is known."""
    if any(arg.star for arg in call.args):
        return None
    defaults = [parameter for parameter in parameters(function.node) if parameter.default is not None]
    bound = {p.name.value: Given(p.default, function, None, ()) for p in defaults if p.default is not None}
    skip = 1 if function.outline.name == "__init__" else function.receivers
    for name, value in bind(function.outline, call, skip=skip).items():
        bound[name] = replace(given, value=value)
    return tuple(bound.items())


def _literal(value: cst.BaseExpression) -> object:
    """The value of a literal; an `Unclear` for anything else."""
    if isinstance(value, cst.Name) and value.value in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[value.value]
    text, number = text_of_string(value), integer(value)
    if text is None and number is None:
        return float(value.value) if isinstance(value, cst.Float) else Unclear()
    return number if text is None else text


def _one(found: list[Built]) -> Built:
    return found[0] if found and all(built == found[0] for built in found) else None
