"""Where the model is in the repository: the labels of values, by which `growth` follows it.

A value keeps its label (`model:0`, or `args` for parsed command-line arguments) through assignments, tuples, returns,
arguments of the repository's functions, and the few calls that return the same object (`.to(device)`, `torch.compile`).
All of it is told by `ast`; what rules ask of LibCST's trees is answered by the statement of the same index.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import libcst as cst

from chipmunk.rewrite.ast_nodes import arguments, dotted, elements, last_name, quoted
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.modules import Place
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository
from chipmunk.rewrite.roles import Model
from chipmunk.rewrite.statements import Assignment, Statement, bind, expression

ARGS = "args:"
_GIVEN = "given:"
"""The label, within what a function returns, of a parameter that it gives back."""
PARSING = ("parse_args", "parse_known_args")
SAME_OBJECT = {"to", "eval", "train", "cuda", "cpu", "half", "float", "bfloat16", "requires_grad_", "type", "to_empty"}
WRAPPERS = {
    "compile", "DataParallel", "DistributedDataParallel", "FSDP", "FullyShardedDataParallel", "partial", "prepare",
    "unwrap_model",
}  # fmt: skip
INSIDE = {"module", "_orig_mod"}
"""Attributes under which wrappers hold what they wrap."""
_ANY_CLASS = {"Any", "Callable", "Module", "ModelMixin", "ConfigMixin", "TypeVar"}
"""Annotations that say nothing about a model."""
_DEPTH = 12

Value = frozenset[str] | tuple["Value", ...]
NOTHING: frozenset[str] = frozenset()


def label_of(index: int) -> str:
    return f"model:{index}"


def args_label(call: ast.Call, step: Statement, place: Place) -> str:
    """The label of what this call of `parse_args` returns."""
    return f"{ARGS}{id(place.names)}:{step.index}:{dotted(call.func)}"


@dataclass(eq=False)
class Values:
    """The labels of the repository's values."""

    repository: Repository
    models: list[Model]
    known: Mapping[str, Collection[str]]
    """Names of model classes, and of functions that return a model."""
    places: list[Place] = field(default_factory=list)
    """Where a model may be: the functions, and the statements around them, of all files that can see one."""
    returns: dict[int, Value] = field(default_factory=dict)
    """By function (`id`), what it returns."""
    arguments: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By function (`id`) and parameter."""
    attributes: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By class (`id`) and attribute."""
    attribute_names: set[str] = field(default_factory=set)
    """The attributes of any class that have a label."""
    globals: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By module (`id`) and name."""
    hot: dict[str, None] = field(default_factory=lambda: dict.fromkeys(PARSING))
    """Words without which a function has nothing to do with models, in the order in which they were learnt."""
    called: set[int] = field(default_factory=set)
    """Functions (`id`) with an argument that has a label."""
    _cold: dict[Place, int] = field(default_factory=dict)

    _returning: Function | None = None
    """The function of which the returned value is asked: its parameters are labelled by their names."""

    # Asking

    def labels(self, node: cst.CSTNode | None, step: Step, place: Place) -> frozenset[str]:
        """The labels of an expression of LibCST's that is no tuple."""
        if node is None:
            return NOTHING
        return flat(self.value(expression(node), place.statements.steps[step.index], place))

    def model_of(self, labels: frozenset[str]) -> int | None:
        """The model's place in `models`; the first if there are several."""
        return min((int(label.split(":")[1]) for label in labels if label.startswith("model:")), default=None)

    def callee(self, call: ast.Call, step: Statement, place: Place) -> Function | None:
        """The repository's function, method or constructor that the call runs."""
        meaning = self.repository.resolve(dotted(call.func), place.names, step)
        if isinstance(meaning, Class):
            return self.repository.method(meaning, "__init__")
        return meaning if isinstance(meaning, Function) else None

    def places_with(self, words: Collection[str]) -> list[Place]:
        """The places that say one of the words."""
        return [place for place in self.places if place.says(words)]

    def is_hot(self, place: Place) -> bool:
        """Whether the place can hold a model at all: it says one of the words, or gets a model as an argument."""
        if place.function is not None and id(place.function) in self.called:
            return True
        asked = self._cold.get(place, 0)  # of so many words it says none; -1: it says one
        if 0 <= asked < len(self.hot) and place.says({*islice(self.hot, asked, None)}):
            asked = -1
        self._cold[place] = asked if asked < 0 else len(self.hot)
        return asked < 0

    # Values of expressions

    def value(self, node: ast.expr | None, step: Statement, place: Place, depth: int = 0) -> Value:
        """The labels of an expression's value; a tuple of them for a tuple."""
        if node is None or depth > _DEPTH:
            return NOTHING
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._name(node, step, place, depth)
        if isinstance(node, ast.Call):
            return self._call(node, step, place, depth)
        if isinstance(node, (ast.Tuple, ast.List)):
            parts = elements(node)
            return tuple(self.value(part, step, place, depth + 1) for part in parts) if parts is not None else NOTHING
        if isinstance(node, ast.IfExp):
            return merge(self.value(node.body, step, place, depth + 1), self.value(node.orelse, step, place, depth + 1))
        return self.value(node.value, step, place, depth + 1) if isinstance(node, ast.NamedExpr) else NOTHING

    def returned(self, node: ast.Return, step: Statement, place: Place) -> Value:
        """The labels of what a function returns: a parameter's own label where it gives that back."""
        self._returning = place.function
        try:
            return self.value(node.value, step, place)
        finally:
            self._returning = None

    def assigned(self, binding: Assignment, place: Place, depth: int = 0) -> frozenset[str]:
        """The labels of what a name is bound to."""
        node = binding.step.node
        if isinstance(node, ast.AnnAssign) and binding.value is not None and self._says_another(node.annotation, place):
            return NOTHING
        value = self.value(binding.value, binding.step, place, depth + 1)
        for index in binding.path:
            if not isinstance(value, tuple) or not 0 <= index < len(value):
                return NOTHING
            value = value[index]
        return flat(value)

    def annotated(self, annotation: ast.expr | None, place: Place) -> frozenset[str]:
        """The labels of the models that an annotation names."""
        found: set[str] = set()
        for node in ast.walk(annotation) if annotation is not None else ():
            names = {dotted(node) or quoted(node), node.attr if isinstance(node, ast.Attribute) else None}
            for name in names - {None}:
                if name is not None and self._is_known(name, place.module):
                    found |= self._model_labels(name, place.module)
        return frozenset(found)

    def _call(self, node: ast.Call, step: Statement, place: Place, depth: int) -> Value:
        name = last_name(node.func)
        if self._is_known(name, place.module):
            callee = dotted(node.func)
            meaning = self.repository.resolve(callee, place.names, step)
            if isinstance(meaning, Class):
                return self._model_labels(callee, place.names, step)
            if isinstance(meaning, Function):
                return self._given_back(self.returns.get(id(meaning), NOTHING), meaning, node, step, place, depth)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in SAME_OBJECT:
                return self.value(node.func.value, step, place, depth + 1)
            if node.func.attr in PARSING and self._is_parser(node.func.value, step, place):
                labels: Value = frozenset({args_label(node, step, place)})
                return labels if node.func.attr == "parse_args" else (labels, NOTHING)
        given = arguments(node) if name in WRAPPERS else []
        if name == "prepare" and len(given) > 1:
            return tuple(self.value(arg, step, place, depth + 1) for arg in given)
        return self.value(given[0], step, place, depth + 1) if given else NOTHING

    def _given_back(
        self, value: Value, callee: Function, call: ast.Call, step: Statement, place: Place, depth: int
    ) -> Value:
        """What a call returns, with the labels of its own arguments where the function gives those back.

        What one caller hands to `compiled(model)`, another one does not get from it.
        """
        if isinstance(value, tuple):
            return tuple(self._given_back(part, callee, call, step, place, depth) for part in value)
        names = {label.removeprefix(_GIVEN) for label in value if label.startswith(_GIVEN)}
        if not names:
            return value
        given = bind(callee.outline, call, skip=callee.receivers)
        found = [flat(self.value(given.get(name), step, place, depth + 1)) for name in names]
        return frozenset(label for label in value if not label.startswith(_GIVEN)).union(*found)

    def _is_annotated(self, name: str, place: Place) -> bool:
        """Whether a parameter of the place says that it is a model."""
        assert place.function is not None
        return any(bool(self.annotated(p.annotation, place)) for p in place.function.signature if p.arg == name)

    def _name(self, node: ast.Name | ast.Attribute, step: Statement, place: Place, depth: int) -> Value:
        name = dotted(node)
        if name is None:
            return NOTHING
        scope, function = place.statements, place.function
        if isinstance(node, ast.Attribute) and name not in scope.bindings and not self._may_be_attribute(node.attr):
            return NOTHING
        bindings = scope.reaching(name, step)
        found: Value = NOTHING
        for binding in bindings:
            found = merge(found, self.assigned(binding, place, depth + 1))
        if scope.is_definite(bindings, step):
            return found
        if function is not None and name in function.parameters:
            labels = self.arguments.get((id(function), name), NOTHING)
            if labels and function is self._returning and not self._is_annotated(name, place):
                labels = frozenset({_GIVEN + name})
            return merge(found, labels)
        inner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None
        if function is not None and function.owner is not None and inner == function.receiver:
            attribute = name.split(".")[1]
            for owner in self.repository.bases(function.owner):
                found = merge(found, self.attributes.get((id(owner), attribute), NOTHING))
            return found
        if function is not None and name not in scope.bindings and "." not in name:
            # A global of the module, as it is when the module has run.
            for binding in place.module.bindings(name):
                found = merge(found, self.assigned(binding, Place(place.module, None), depth + 1))
        if isinstance(node, ast.Attribute) and not any_label(found):
            if node.attr in INSIDE:
                return self.value(node.value, step, place, depth + 1)
            for owner in self._classes_of(inner, step, place) if inner is not None else ():
                for base in self.repository.bases(owner):
                    found = merge(found, self.attributes.get((id(base), node.attr), NOTHING))
        return found

    def _may_be_attribute(self, name: str) -> bool:
        return name in self.attribute_names or name in INSIDE

    def _is_known(self, name: str, module: Module) -> bool:
        """Whether the name can mean a model's class, or a function that returns a model; resolving it costs more."""
        last = name.split(".")[-1]
        return module.aliases.get(last, last) in self.known

    def _model_labels(
        self, name: str | None, names: Function | Module, step: Statement | None = None
    ) -> frozenset[str]:
        meaning = self.repository.resolve(name, names, step)
        if not isinstance(meaning, Class):
            return NOTHING
        for owner in self.repository.bases(meaning):  # the nearest: a model may inherit from another one
            if found := frozenset(label_of(i) for i, model in enumerate(self.models) if model.owner is owner):
                return found
        return NOTHING

    def _is_parser(self, node: ast.expr, step: Statement, place: Place) -> bool:
        """Whether the expression is an `argparse.ArgumentParser`."""
        if isinstance(node, ast.Call):
            meaning = self.repository.resolve(dotted(node.func), place.names, step)
            return isinstance(meaning, External) and meaning.name == "argparse.ArgumentParser"
        name = dotted(node)
        return name is not None and any(
            b.value is not None and not isinstance(b.value, ast.Name) and self._is_parser(b.value, b.step, place)
            for b in place.statements.reaching(name, step)
        )

    def _says_another(self, annotation: ast.expr, place: Place) -> bool:
        """Whether an annotation names a class that none of the models is or inherits from."""
        name = dotted(annotation) or quoted(annotation)
        meaning = self.repository.resolve(name, place.names) if name is not None else None
        if isinstance(meaning, Class):
            classes = self.repository.bases(meaning)
            return not any(m.owner in classes or meaning in self.repository.bases(m.owner) for m in self.models)
        if isinstance(meaning, External):
            last = meaning.name.split(".")[-1]
            return last not in _ANY_CLASS and all(m.name != last for m in self.models)
        return False

    def _classes_of(self, name: str, step: Statement, place: Place) -> Iterator[Class]:
        """The repository's classes whose object a name may stand for: by its annotation, or its construction."""
        bindings = place.statements.reaching(name, step)
        meanings = [
            self.repository.resolve(dotted(binding.value.func), place.names, binding.step)
            for binding in bindings
            if isinstance(binding.value, ast.Call) and not binding.path
        ]
        if place.function is not None and not place.statements.is_definite(bindings, step):
            for parameter in place.function.signature:
                if parameter.arg == name and parameter.annotation is not None:
                    said = dotted(parameter.annotation) or quoted(parameter.annotation)
                    meanings.append(self.repository.resolve(said, place.module) if said else None)
        yield from (meaning for meaning in meanings if isinstance(meaning, Class))


def flat(value: Value) -> frozenset[str]:
    """The labels of what is no tuple."""
    return value if isinstance(value, frozenset) else NOTHING


def any_label(value: Value) -> bool:
    return bool(value) if isinstance(value, frozenset) else any(any_label(part) for part in value)


def merge(first: Value, second: Value) -> Value:
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return tuple(merge(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, frozenset) and isinstance(second, frozenset):
        return first | second
    return first if isinstance(first, tuple) else second


__all__ = ["ARGS", "PARSING", "Place", "Value", "Values", "args_label", "label_of"]
