"""Where the model goes in the repository: from its construction through functions, attributes and arguments.

A value keeps its label (`model:0`, or `args` for parsed command-line arguments) through assignments, tuples, returns,
arguments of the repository's functions, and the few calls that return the same object (`.to(device)`, `torch.compile`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import PurePosixPath

import libcst as cst

from chipmunk.rewrite import outlines
from chipmunk.rewrite.flow import Binding, Step
from chipmunk.rewrite.modules import Place
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository
from chipmunk.rewrite.roles import Model
from chipmunk.rewrite.syntax import bind, dotted, elements, is_call, last_name, parameters, self_attribute, walk

ARGS = "args:"
_GIVEN = "given:"
"""The label, within what a function returns, of a parameter that it gives back."""
_PARSING = ("parse_args", "parse_known_args")
_SAME_OBJECT = {"to", "eval", "train", "cuda", "cpu", "half", "float", "bfloat16", "requires_grad_", "type", "to_empty"}
_WRAPPERS = {
    "compile", "DataParallel", "DistributedDataParallel", "FSDP", "FullyShardedDataParallel", "partial", "prepare",
    "unwrap_model",
}  # fmt: skip
_INSIDE = {"module", "_orig_mod"}
"""Attributes under which wrappers hold what they wrap."""
_ANY_CLASS = {"Any", "Callable", "Module", "ModelMixin", "ConfigMixin", "TypeVar"}
"""Annotations that say nothing about a model."""
_FROM_HERE = re.compile(rb"from(?<!\wfrom)\s+\.+\s+import(?!\w)")
_SETTING = {"setattr", "add_module", "register_module", "__setattr__"}

# Asked of a node's `type`: LibCST's classes are abstract ones, of which `isinstance` is slow.
_VALUES = {cst.Attribute, cst.Call, cst.Tuple, cst.List, cst.IfExp, cst.NamedExpr}
_KNOWN_VALUES = {cst.Name, *_VALUES}

Value = frozenset[str] | tuple["Value", ...]
NOTHING: frozenset[str] = frozenset()


def label_of(index: int) -> str:
    return f"model:{index}"


def args_label(call: cst.Call) -> str:
    """The label of what this call of `parse_args` returns."""
    return f"{ARGS}{id(call)}"


@dataclass(eq=False)
class Values:
    """The labels of the repository's values; grown until nothing changes."""

    repository: Repository
    models: list[Model]
    places: list[Place] = field(default_factory=list)
    returns: dict[int, Value] = field(default_factory=dict)
    """By function (`id`), what it returns."""
    arguments: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By function (`id`) and parameter."""
    attributes: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By class (`id`) and attribute."""
    _known: dict[str, set[str]] = field(default_factory=dict)
    """Names of model classes, and of functions that return a model: name → modules that it can be imported from."""
    _hot: set[str] = field(default_factory=lambda: set(_PARSING))
    """Words without which a function has nothing to do with models."""
    _read: set[str] = field(default_factory=set)
    """Paths whose functions are among `places`."""
    _names: set[str] = field(default_factory=set)
    """Names of the functions and classes in them."""
    _grown: bool = False
    """Whether a name was added, or a module of one."""
    _called: set[int] = field(default_factory=set)
    """Functions (`id`) with an argument that has a label."""
    _news: set[object] = field(default_factory=set)
    """What was learnt since the places that it may matter to were last visited: words, functions (`id`), places."""
    _globals: dict[tuple[int, str], frozenset[str]] = field(default_factory=dict)
    """By module (`id`) and name."""
    _attribute_names: set[str] = field(default_factory=set)
    """The attributes of any class that have a label."""
    _holding: dict[Place, bool] = field(default_factory=dict)
    """What was answered about places when all was known."""
    _returning: Function | None = None
    """The function of which the returned value is asked: its parameters are labelled by their names."""
    _unseen: set[tuple[str, str, int]] = field(default_factory=set)
    """Files that do not see a name from any of so many modules."""

    # Growing

    def grow(self) -> None:
        """Follow the models through all files that name them, or what makes or takes them."""
        for model in self.models:
            for owner in self._subclasses(model):
                self._learn(owner.name, owner.module)
        self._read_files()
        self._recognise_calls()

    def _learn(self, name: str, module: Module) -> None:
        """Files that take `name` from `module` are worth reading."""
        path = PurePosixPath(module.path)
        stem = path.parent.name if path.stem == "__init__" else path.stem
        if stem not in self._known.setdefault(name, set()):
            self._known[name].add(stem)
            self._grown = True
            self._tell(name)

    def _tell(self, word: str) -> None:
        """Something is known of what has this name."""
        self._hot.add(word)
        self._news.add(word)

    def _recognise_calls(self) -> None:
        """A parameter that a loop calls with the model's own keywords is the model, though nothing says so."""
        for index, model in enumerate(self.models):
            given = [p for p in parameters(model.forward.node)[1:]]
            known, wanted = {p.name.value for p in given}, {p.name.value for p in given if p.default is None}
            if len(wanted) < 3:
                continue
            for path in self.repository.files_where(partial(_gives, wanted), ("gives", *sorted(wanted))):
                module = self.repository.module(path)
                functions = module.all_functions() if module is not None else []
                for function in [f for f in functions if wanted <= f.words and _calls_with(f, wanted)]:
                    for call, step in function.scope.calls:
                        keywords = {arg.keyword.value for arg in call.args if arg.keyword is not None}
                        name = dotted(call.func)
                        if step.loops and name in function.scope.parameters and wanted <= keywords <= known:
                            self._add_places(function.module)
                            self._settle()
                            if (id(function), name) not in self.arguments:
                                self._give(self.arguments, (id(function), name), frozenset({label_of(index)}))
        self._read_files()

    def _add_places(self, module: Module) -> None:
        if module.path not in self._read:
            self._read.add(module.path)
            found = [Place(module, None), *(Place(module, function) for function in module.all_functions())]
            self.places += found
            names = {place.function.outline.name for place in found if place.function is not None}
            self._news |= {*found, *names, *module.classes} - self._names
            self._names |= {*names, *module.classes}
            for name in self._known.keys() & module.imports.keys():
                self._learn(name, module)

    def _subclasses(self, model: Model) -> list[Class]:
        """The model's class, and those in its file that inherit from it."""
        return [c for c in model.owner.module.classes.values() if model.owner in self.repository.bases(c)]

    def _read_files(self) -> None:
        """Read every file that can see a known name, settle what that tells, and again while there is more."""
        self._grown = True
        while self._grown:
            self._grown = False
            paths = {path for name in self._known for path in self.repository.files_with(name)}
            for path in sorted(paths - self._read):
                if self._sees_known(path):
                    module = self.repository.module(path)
                    if module is not None:
                        self._add_places(module)
            self._settle()

    def _sees_known(self, path: str) -> bool:
        """The cheap test before a file is parsed: it has a name, not just in prose, and a module that gives it."""
        content = self.repository.files[path]
        for name, stems in self._known.items():
            if name.encode() not in content or (path, name, len(stems)) in self._unseen:
                continue
            if _word(name, r"(?:[ \t]*[^\w \t]|\s+as\b|\Z)").search(content):
                if any(stem.encode() in content and _word(stem, r"(?!\w)").search(content) for stem in stems):
                    return True
                if _FROM_HERE.search(content):
                    return True
            self._unseen.add((path, name, len(stems)))
        return False

    def places_with(self, words: Collection[str]) -> list[Place]:
        """The places that say one of the words."""
        return [place for place in self.places if not place.words.isdisjoint(words)]

    def _settle(self) -> None:
        """Visit the places to which something new may matter, until there is nothing new."""
        while self._news:
            news, self._news = self._news, set()
            for place in list(self.places):
                is_new = place in news or id(place.function) in news or not news.isdisjoint(place.words)
                if is_new and self.is_hot(place) and self._may_matter(place):
                    self._visit(place)

    def is_hot(self, place: Place) -> bool:
        """Whether the place can hold a model at all: it says one of the words, or gets a model as an argument."""
        if place.function is not None and id(place.function) in self._called:
            return True
        return not self._hot.isdisjoint(place.words)

    def _may_matter(self, place: Place) -> bool:
        """Whether a visit may tell anything: what has no label goes nowhere. Told without the place's tree."""
        aliases = place.module.aliases
        if any(aliases.get(name, name) in self._known for name in place.outline.annotations):
            return True
        return place.outline.lets_out(self._source(place), self._given(place))

    def may_hold(self, place: Place) -> bool:
        """Whether a name of the place may get a model from a call, or a model be called; told without its tree."""
        if place not in self._holding:
            hot = self.is_hot(place)
            self._holding[place] = hot and place.outline.holds(self._source(place), self._given(place))
        return self._holding[place]

    def _given(self, place: Place) -> list[str]:
        """The parameters that have a label."""
        return [name for name in place.outline.parameters if (id(place.function), name) in self.arguments]

    def _source(self, place: Place) -> outlines.Source:
        """What is known of the expressions of a place, but for its own names."""
        aliases, outline, function = place.module.aliases, place.outline, place.function
        owners = self.repository.bases(function.owner) if function is not None and function.owner is not None else []
        receiver = outline.parameters[0] if outline.parameters else "self"

        def source(node: ast.expr) -> Iterable[ast.expr] | bool:
            if isinstance(node, ast.Name):
                return (id(place.module), node.id) in self._globals
            if isinstance(node, ast.Attribute):
                inner = node.value.id if isinstance(node.value, ast.Name) else None
                if owners and inner == receiver:
                    return any((id(owner), node.attr) in self.attributes for owner in owners)
                if inner is not None and node.attr in self._attribute_names and outline.may_be_object(inner):
                    return True
                return [node.value] if node.attr in _INSIDE else False
            if isinstance(node, ast.Call):
                return self._call_source(node, aliases)
            if isinstance(node, (ast.Tuple, ast.List)):
                return node.elts
            if isinstance(node, ast.IfExp):
                return [node.body, node.orelse]
            return [node.value] if isinstance(node, ast.NamedExpr) else False

        return source

    def _call_source(self, node: ast.Call, aliases: Mapping[str, str]) -> Iterable[ast.expr] | bool:
        """Whether the call's value may have a label; else the expressions that it would have it from."""
        attribute = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else attribute or ""
        if aliases.get(name, name) in self._known or attribute in _PARSING:
            return True
        found = [node.func.value] if isinstance(node.func, ast.Attribute) and attribute in _SAME_OBJECT else []
        if name in _WRAPPERS:
            found += [*node.args, *(keyword.value for keyword in node.keywords)]
        return found

    def _visit(self, place: Place) -> None:
        scope, function = place.scope, place.function
        warm = place.outline.warm(self._source(place), self._given(place))
        if function is not None:
            for parameter in parameters(function.node):
                label = self._annotated(parameter.annotation, place)
                if label:
                    self._give(self.arguments, (id(function), parameter.name.value), label)
            label = self._annotated(function.node.returns, place)
            if label and id(function) not in self.returns:
                self._returns(function, label)
        for name, bindings in scope.bindings.items():
            if function is not None and function.owner is not None and name.startswith(scope.receiver + "."):
                for binding in bindings:
                    annotation = binding.step.node.annotation if isinstance(binding.step.node, cst.AnnAssign) else None
                    labels = self._bound(binding, place) | self._annotated(annotation, place)
                    self._set_attribute(function.owner, name.split(".", 1)[1], labels)
            elif function is None and (labels := NOTHING.union(*(self._bound(b, place) for b in bindings))):
                self._give(self._globals, (id(place.module), name), labels)
        for step in scope.steps:
            if function is not None and isinstance(step.node, cst.Return) and step.node.value is not None:
                self._returning = function
                value = self.value(step.node.value, step, place)
                self._returning = None
                if _any(value):
                    self._returns(function, value)
        for call, step in scope.calls:
            if any(self._may_be_warm(arg.value, place, warm) for arg in call.args):
                self._pass(call, step, place)
                self._register(call, step, place)

    def _may_be_warm(self, node: cst.BaseExpression, place: Place, warm: Collection[str]) -> bool:
        """The cheap test before an expression is valued. `warm`: the place's own names that may have a label."""
        if type(node) is cst.Name:
            return node.value in warm or (id(place.module), node.value) in self._globals
        return type(node) in _VALUES

    def _returns(self, function: Function, value: Value) -> None:
        merged = _merge(self.returns.get(id(function), NOTHING), value)
        if merged != self.returns.get(id(function)):
            self.returns[id(function)] = merged
            self._tell(function.outline.name)
            if function.owner is None:
                self._learn(function.outline.name, function.module)

    def _set_attribute(self, owner: Class, attribute: str, labels: frozenset[str]) -> None:
        if labels:
            self._give(self.attributes, (id(owner), attribute), labels)

    def _register(self, call: cst.Call, step: Step, place: Place) -> None:
        """`self.register(a=a)` sets `self.a`, if the method is another library's, or sets attributes by name."""
        function = place.function
        method = self_attribute(call.func, place.scope.receiver)
        if method is None or function is None or function.owner is None:
            return
        named = [(arg.keyword.value, arg.value) for arg in call.args if arg.keyword is not None]
        own = self.repository.method(function.owner, method) if named else None
        if own is None or not (_SETTING.isdisjoint(own.words) or _SETTING.isdisjoint(own.scope.words)):
            for attribute, value in named:
                self._set_attribute(function.owner, attribute, _labels(self.value(value, step, place)))

    def _pass(self, call: cst.Call, step: Step, place: Place) -> None:
        """Hand labels from the call's arguments to the callee's parameters."""
        given = [self.value(arg.value, step, place) if not arg.star else NOTHING for arg in call.args]
        labelled = frozenset().union(*(_labels(value) for value in given))
        if not labelled or (last_name(call.func) not in self._names and self.model_of(labelled) is None):
            return
        callee = self.callee(call, step, place)
        if callee is None:
            return
        for parameter, argument in bind(callee.node, call, skip=callee.receivers).items():
            labels = _labels(self.value(argument, step, place))
            if labels:
                self._give(self.arguments, (id(callee), parameter), labels)
        if self.model_of(labelled) is not None:
            self._add_places(callee.module)

    def callee(self, call: cst.Call, step: Step, place: Place) -> Function | None:
        """The repository's function, method or constructor that the call runs."""
        meaning = self.repository.resolve(call.func, place.names, step)
        if isinstance(meaning, Class):
            return self.repository.method(meaning, "__init__")
        return meaning if isinstance(meaning, Function) else None

    def _give(self, table: dict[tuple[int, str], frozenset[str]], key: tuple[int, str], labels: frozenset[str]) -> None:
        if not labels <= table.get(key, NOTHING):
            table[key] = table.get(key, NOTHING) | labels
            if table is self.arguments:
                self._called.add(key[0])
                self._news.add(key[0])
            else:
                if table is self.attributes:
                    self._attribute_names.add(key[1])
                self._tell(key[1])

    def _annotated(self, annotation: cst.Annotation | None, place: Place) -> frozenset[str]:
        if annotation is None:
            return NOTHING
        found = [name for node in walk(annotation.annotation) if (name := dotted(node) or _quoted(node))]
        return frozenset().union(
            *(self._model_labels(name, place.module) for name in found if self._is_known(name, place.module))
        )

    def _is_known(self, name: str, module: Module) -> bool:
        """Whether the name can mean a model's class, or a function that returns a model; resolving it costs more."""
        last = name.split(".")[-1]
        return module.aliases.get(last, last) in self._known

    def _model_labels(
        self, name: cst.CSTNode | str | None, names: Function | Module, step: Step | None = None
    ) -> frozenset[str]:
        meaning = self.repository.resolve(name, names, step)
        if not isinstance(meaning, Class):
            return NOTHING
        for owner in self.repository.bases(meaning):  # the nearest: a model may inherit from another one
            if found := frozenset(label_of(i) for i, model in enumerate(self.models) if model.owner is owner):
                return found
        return NOTHING

    # Asking

    def value(self, node: cst.CSTNode | None, step: Step, place: Place, depth: int = 0) -> Value:
        """The labels of an expression's value; a tuple of them for a tuple."""
        if node is None or depth > 12:
            return NOTHING
        if type(node) not in _KNOWN_VALUES:
            return NOTHING
        if isinstance(node, (cst.Name, cst.Attribute)):
            return self._name(node, step, place, depth)
        if isinstance(node, cst.Call):
            return self._call(node, step, place, depth)
        if isinstance(node, (cst.Tuple, cst.List)):
            parts = elements(node)
            return tuple(self.value(part, step, place, depth + 1) for part in parts) if parts is not None else NOTHING
        if isinstance(node, cst.IfExp):
            return _merge(
                self.value(node.body, step, place, depth + 1), self.value(node.orelse, step, place, depth + 1)
            )
        return self.value(node.value, step, place, depth + 1) if isinstance(node, cst.NamedExpr) else NOTHING

    def _call(self, node: cst.Call, step: Step, place: Place, depth: int) -> Value:
        name = last_name(node.func)
        if self._is_known(name, place.module):
            meaning = self.repository.resolve(node.func, place.names, step)
            if isinstance(meaning, Class):
                return self._model_labels(node.func, place.names, step)
            if isinstance(meaning, Function):
                return self._given_back(self.returns.get(id(meaning), NOTHING), meaning, node, step, place, depth)
        if isinstance(node.func, cst.Attribute):
            if node.func.attr.value in _SAME_OBJECT:
                return self.value(node.func.value, step, place, depth + 1)
            if node.func.attr.value in _PARSING and is_parser(node.func.value, step, place, self):
                labels: Value = frozenset({args_label(node)})
                return labels if node.func.attr.value == "parse_args" else (labels, NOTHING)
        if name in _WRAPPERS and node.args:
            if name == "prepare" and len(node.args) > 1:
                return tuple(self.value(arg.value, step, place, depth + 1) for arg in node.args)
            return self.value(node.args[0].value, step, place, depth + 1)
        return NOTHING

    def _given_back(
        self, value: Value, callee: Function, call: cst.Call, step: Step, place: Place, depth: int
    ) -> Value:
        """What a call returns, with the labels of its own arguments where the function gives those back.

        What one caller hands to `compiled(model)`, another one does not get from it.
        """
        if isinstance(value, tuple):
            return tuple(self._given_back(part, callee, call, step, place, depth) for part in value)
        names = {label.removeprefix(_GIVEN) for label in value if label.startswith(_GIVEN)}
        if not names:
            return value
        given = bind(callee.node, call, skip=callee.receivers)
        found = [_labels(self.value(given.get(name), step, place, depth + 1)) for name in names]
        return frozenset(label for label in value if not label.startswith(_GIVEN)).union(*found)

    def _is_annotated(self, name: str, place: Place) -> bool:
        """Whether a parameter of the place says that it is a model."""
        assert place.function is not None
        given = parameters(place.function.node)
        return any(bool(self._annotated(p.annotation, place)) for p in given if p.name.value == name)

    def _name(self, node: cst.Name | cst.Attribute, step: Step, place: Place, depth: int) -> Value:
        name = dotted(node)
        if name is None:
            return NOTHING
        scope, function = place.scope, place.function
        bindings = scope.reaching(name, step)
        found: Value = NOTHING
        for binding in bindings:
            found = _merge(found, self._bound(binding, place, depth + 1))
        if scope.is_definite(bindings, step):
            return found
        if function is not None and name in scope.parameters:
            labels = self.arguments.get((id(function), name), NOTHING)
            if labels and function is self._returning and not self._is_annotated(name, place):
                labels = frozenset({_GIVEN + name})
            return _merge(found, labels)
        if function is not None and function.owner is not None:
            attribute = self_attribute(node, scope.receiver)
            if attribute is not None:
                for owner in self.repository.bases(function.owner):
                    found = _merge(found, self.attributes.get((id(owner), attribute), NOTHING))
                return found
        if function is not None and name not in scope.bindings and "." not in name:
            # A global of the module, as it is when the module has run.
            for binding in place.module.bindings(name):
                found = _merge(found, self._bound(binding, Place(place.module, None), depth + 1))
        if isinstance(node, cst.Attribute) and not _any(found):
            if node.attr.value in _INSIDE:
                return self.value(node.value, step, place, depth + 1)
            for owner in self._classes_of(node.value, step, place):
                for base in self.repository.bases(owner):
                    found = _merge(found, self.attributes.get((id(base), node.attr.value), NOTHING))
        return found

    def _says_another(self, annotation: cst.Annotation, place: Place) -> bool:
        """Whether an annotation names a class that none of the models is or inherits from."""
        name = dotted(annotation.annotation) or _quoted(annotation.annotation)
        meaning = self.repository.resolve(name, place.names) if name is not None else None
        if isinstance(meaning, Class):
            classes = self.repository.bases(meaning)
            return not any(m.owner in classes or meaning in self.repository.bases(m.owner) for m in self.models)
        if isinstance(meaning, External):
            last = meaning.name.split(".")[-1]
            return last not in _ANY_CLASS and all(m.name != last for m in self.models)
        return False

    def _classes_of(self, node: cst.BaseExpression, step: Step, place: Place) -> Iterator[Class]:
        """The repository's classes whose object a name may stand for: by its annotation, or its construction."""
        name = dotted(node)
        if name is None or "." in name:
            return
        bindings = place.scope.reaching(name, step)
        meanings = [
            self.repository.resolve(binding.value.func, place.names, binding.step)
            for binding in bindings
            if isinstance(binding.value, cst.Call) and not binding.path
        ]
        if place.function is not None and not place.scope.is_definite(bindings, step):
            for parameter in parameters(place.function.node):
                if parameter.name.value == name and parameter.annotation is not None:
                    annotated = parameter.annotation.annotation
                    said = dotted(annotated) or _quoted(annotated)
                    meanings.append(self.repository.resolve(said, place.module) if said else None)
        yield from (meaning for meaning in meanings if isinstance(meaning, Class))

    def _bound(self, binding: Binding, place: Place, depth: int = 0) -> frozenset[str]:
        node = binding.step.node
        if isinstance(node, cst.AnnAssign) and binding.value is not None and self._says_another(node.annotation, place):
            return NOTHING
        value = self.value(binding.value, binding.step, place, depth + 1)
        for index in binding.path:
            if not isinstance(value, tuple) or not 0 <= index < len(value):
                return NOTHING
            value = value[index]
        return value if isinstance(value, frozenset) else NOTHING

    def labels(self, node: cst.CSTNode | None, step: Step, place: Place) -> frozenset[str]:
        """The labels of an expression that is no tuple."""
        return _labels(self.value(node, step, place))

    def bound(self, binding: Binding, place: Place) -> frozenset[str]:
        """The labels of what a name is bound to."""
        return self._bound(binding, place)

    def model_of(self, labels: frozenset[str]) -> int | None:
        """The model's place in `models`; the first if there are several."""
        return min((int(label.split(":")[1]) for label in labels if label.startswith("model:")), default=None)


@cache
def _word(word: str, then: str) -> re.Pattern[bytes]:
    """A whole word, and what comes after it. That the pattern begins with plain text makes it fast."""
    text = re.escape(word)
    return re.compile(f"{text}(?<!\\w{text}){then}".encode())


def _gives(keywords: Collection[str], content: bytes) -> bool:
    """Whether a file may have a loop in which something is called with all these keywords."""
    words = [keyword.encode() for keyword in keywords]
    if b"for " not in content or not all(word in content for word in words):
        return False
    return all(re.search(rb"\b" + word + rb"\s*=", content) for word in words)


def _calls_with(function: Function, keywords: set[str]) -> bool:
    """Whether a parameter is called with all these keywords; told without its tree."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in function.parameters
        and keywords <= {keyword.arg for keyword in node.keywords}
        for node in outlines.walk(function.outline.body)
    )


def is_parser(node: cst.CSTNode, step: Step, place: Place, values: Values) -> bool:
    """Whether the expression is an `argparse.ArgumentParser`."""
    if isinstance(node, cst.Call):
        meaning = values.repository.resolve(node.func, place.names, step)
        return isinstance(meaning, External) and meaning.name == "argparse.ArgumentParser"
    name = dotted(node)
    return name is not None and any(
        b.value is not None and not isinstance(b.value, cst.Name) and is_parser(b.value, b.step, place, values)
        for b in place.scope.reaching(name, step)
    )


def _labels(value: Value) -> frozenset[str]:
    if isinstance(value, frozenset):
        return value
    return NOTHING


def _any(value: Value) -> bool:
    return bool(value) if isinstance(value, frozenset) else any(_any(part) for part in value)


def _merge(first: Value, second: Value) -> Value:
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return tuple(_merge(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, frozenset) and isinstance(second, frozenset):
        return first | second
    return first if isinstance(first, tuple) else second


def _quoted(node: cst.CSTNode) -> str | None:
    """The name in a quoted annotation: `"Flux"`."""
    if isinstance(node, cst.SimpleString) and isinstance(node.evaluated_value, str):
        return node.evaluated_value if re.fullmatch(r"[\w.]+", node.evaluated_value) else None
    return None


def functions_of(places: list[Place]) -> Iterator[Place]:
    return (place for place in places if place.function is not None)


__all__ = ["ARGS", "Place", "Value", "Values", "functions_of", "is_call", "is_parser", "label_of"]
