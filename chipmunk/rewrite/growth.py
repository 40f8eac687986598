"""How a model is followed through the repository: from its construction on, until nothing more is learnt."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial

from chipmunk.rewrite.ast_nodes import arguments, dotted, last_name, mentions, required, walk
from chipmunk.rewrite.known_names import KnownNames
from chipmunk.rewrite.modules import Place
from chipmunk.rewrite.outlines import VALUES, Source, is_warm
from chipmunk.rewrite.repository import Class, Function, Module, Repository
from chipmunk.rewrite.roles import Model
from chipmunk.rewrite.statements import Statement, bind
from chipmunk.rewrite.values import (
    INSIDE,
    NOTHING,
    PARSING,
    SAME_OBJECT,
    WRAPPERS,
    Value,
    Values,
    any_label,
    flat,
    label_of,
    merge,
)

_SETTING = {"setattr", "add_module", "register_module", "__setattr__"}


def grow(repository: Repository, models: list[Model]) -> Values:
    """Follow the models through all files that name them, or what makes or takes them."""
    return _Growth(repository, models).grow()


class _Growth:
    def __init__(self, repository: Repository, models: list[Model]) -> None:
        self._repository = repository
        self._known = KnownNames(repository)
        self._values = Values(repository, models, self._known.stems)
        self._read: set[str] = set()
        """Paths whose functions are among the places."""
        self._names: set[str] = set()
        """Names of the functions and classes in them."""
        self._grown = False
        """Whether a name was added, or a module of one."""
        self._news: set[object] = set()
        """What was learnt since the places that it may matter to were last visited: words, functions (`id`), places."""

    def grow(self) -> Values:
        for model in self._values.models:
            for owner in self._subclasses(model):
                self._learn(owner.name, owner.module)
        self._read_files()
        self._recognise_calls()
        return self._values

    def _subclasses(self, model: Model) -> list[Class]:
        """The model's class, and those in its file that inherit from it."""
        return [c for c in model.owner.module.classes.values() if model.owner in self._repository.bases(c)]

    def _learn(self, name: str, module: Module) -> None:
        if self._known.learn(name, module):
            self._grown = True
            self._tell(name)

    def _tell(self, word: str) -> None:
        """Something is known of what has this name."""
        self._values.hot[word] = None
        self._news.add(word)

    # Files

    def _read_files(self) -> None:
        """Read every file that can see a known name, settle what that tells, and again while there is more."""
        self._grown = True
        while self._grown:
            self._grown = False
            for path in self._known.files(self._read):
                module = self._repository.module(path)
                if module is not None:
                    self._add_places(module)
            self._settle()

    def _add_places(self, module: Module) -> None:
        if module.path not in self._read:
            self._read.add(module.path)
            found = [Place(module, None), *(Place(module, function) for function in module.all_functions())]
            self._values.places += found
            names = {place.function.outline.name for place in found if place.function is not None}
            self._news |= {*found, *names, *module.classes} - self._names
            self._names |= {*names, *module.classes}
            for name in self._known.stems.keys() & module.imports.keys():
                self._learn(name, module)

    def _recognise_calls(self) -> None:
        """A parameter that a loop calls with the model's own keywords is the model, though nothing says so."""
        values = self._values
        for index, model in enumerate(values.models):
            wanted = {*required(model.forward.outline.args)[1:]}
            known = {*model.forward.parameters[1:]}
            if len(wanted) < 3:
                continue
            for path in self._repository.files_where(partial(_gives, wanted), ("gives", *sorted(wanted))):
                module = self._repository.module(path)
                functions = module.all_functions() if module is not None else []
                for function in [f for f in functions if _says_all(f.text, wanted) and _calls_with(f, wanted)]:
                    for call, step in function.statements.calls:
                        keywords = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
                        name = dotted(call.func)
                        if step.in_loop and name in function.parameters and wanted <= keywords <= known:
                            self._add_places(function.module)
                            self._settle()
                            if (id(function), name) not in values.arguments:
                                self._give(values.arguments, (id(function), name), frozenset({label_of(index)}))
        self._read_files()

    # Places

    def _settle(self) -> None:
        """Visit the places to which something new may matter, until there is nothing new."""
        while self._news:
            news, self._news = self._news, set()
            for place in list(self._values.places):
                if self._values.is_hot(place) and self._is_touched(place, news):
                    source = self._source(place)
                    warm = place.outline.warm(source, self._given(place))
                    if self._may_matter(place, source, warm):
                        self._visit(place, source, warm)

    def _visit(self, place: Place, source: Source, warm: set[str]) -> None:
        """`warm`: the names that may be models."""
        values, scope, function = self._values, place.statements, place.function
        if function is not None:
            for parameter in function.signature:
                label = values.annotated(parameter.annotation, place)
                if label:
                    self._give(values.arguments, (id(function), parameter.arg), label)
            label = values.annotated(function.outline.returns, place)
            if label and id(function) not in values.returns:
                self._returns(function, label)
        for name, bindings in scope.bindings.items():
            if function is not None and function.owner is not None and name.startswith(function.receiver + "."):
                for binding in bindings:
                    node = binding.step.node
                    annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                    labels = values.assigned(binding, place) | values.annotated(annotation, place)
                    self._set_attribute(function.owner, name.split(".", 1)[1], labels)
            elif function is None and (labels := NOTHING.union(*(values.assigned(b, place) for b in bindings))):
                self._give(values.globals, (id(place.module), name), labels)
        for step in scope.steps:
            if function is not None and isinstance(step.node, ast.Return):
                value = values.returned(step.node, step, place)
                if any_label(value):
                    self._returns(function, value)
        for call, step in scope.calls:
            if any(type(arg) in VALUES and is_warm(arg, source, warm) for arg in arguments(call)):
                self._pass(call, step, place)
                self._register(call, step, place)

    def _returns(self, function: Function, value: Value) -> None:
        returns = self._values.returns
        merged = merge(returns.get(id(function), NOTHING), value)
        if merged != returns.get(id(function)):
            returns[id(function)] = merged
            self._tell(function.outline.name)
            if function.owner is None:
                self._learn(function.outline.name, function.module)

    def _set_attribute(self, owner: Class, attribute: str, labels: frozenset[str]) -> None:
        if labels:
            self._give(self._values.attributes, (id(owner), attribute), labels)

    def _register(self, call: ast.Call, step: Statement, place: Place) -> None:
        """`self.register(a=a)` sets `self.a`, if the method is another library's, or sets attributes by name."""
        function, func = place.function, call.func
        if function is None or function.owner is None or not isinstance(func, ast.Attribute):
            return
        if not isinstance(func.value, ast.Name) or func.value.id != function.receiver:
            return
        named = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None]
        own = self._repository.method(function.owner, func.attr) if named else None
        if own is None or not (_SETTING.isdisjoint(own.words) or not mentions(own.outline.body, _SETTING)):
            for attribute, value in named:
                labels = flat(self._values.value(value, step, place))
                self._set_attribute(function.owner, attribute, labels)

    def _pass(self, call: ast.Call, step: Statement, place: Place) -> None:
        """Hand labels from the call's arguments to the callee's parameters."""
        values = self._values
        given = [arg for arg in call.args if not isinstance(arg, ast.Starred)]
        given += [keyword.value for keyword in call.keywords if keyword.arg is not None]
        labelled = frozenset().union(*(flat(values.value(arg, step, place)) for arg in given))
        is_model = values.model_of(labelled) is not None
        if not labelled or (last_name(call.func) not in self._names and not is_model):
            return
        callee = values.callee(call, step, place)
        if callee is None:
            return
        for parameter, argument in bind(callee.outline, call, skip=callee.receivers).items():
            labels = flat(values.value(argument, step, place))
            if labels:
                self._give(values.arguments, (id(callee), parameter), labels)
        if is_model:
            self._add_places(callee.module)

    def _give(self, table: dict[tuple[int, str], frozenset[str]], key: tuple[int, str], labels: frozenset[str]) -> None:
        if not labels <= table.get(key, NOTHING):
            table[key] = table.get(key, NOTHING) | labels
            if table is self._values.arguments:
                self._values.called.add(key[0])
                self._news.add(key[0])
            else:
                if table is self._values.attributes:
                    self._values.attribute_names.add(key[1])
                self._tell(key[1])

    # The cheap tests before a place is visited, or an expression valued

    def _is_touched(self, place: Place, news: set[object]) -> bool:
        return place in news or id(place.function) in news or not news.isdisjoint(place.words)

    def _may_matter(self, place: Place, source: Source, warm: set[str]) -> bool:
        """Whether a visit may tell anything: what has no label goes nowhere."""
        aliases = place.module.aliases
        if any(aliases.get(name, name) in self._values.known for name in place.outline.annotations):
            return True
        return place.outline.lets_out(source, warm)

    def _given(self, place: Place) -> list[str]:
        """The parameters that have a label."""
        return [name for name in place.outline.parameters if (id(place.function), name) in self._values.arguments]

    def _source(self, place: Place) -> Source:
        """What is known of the expressions of a place, but for its own names."""
        values, aliases, outline, function = self._values, place.module.aliases, place.outline, place.function
        owners = self._repository.bases(function.owner) if function is not None and function.owner is not None else []
        receiver = outline.parameters[0] if outline.parameters else "self"

        def source(node: ast.expr) -> Iterable[ast.expr] | bool:
            if isinstance(node, ast.Name):
                return (id(place.module), node.id) in values.globals
            if isinstance(node, ast.Attribute):
                inner = node.value.id if isinstance(node.value, ast.Name) else None
                if owners and inner == receiver:
                    return any((id(owner), node.attr) in values.attributes for owner in owners)
                if inner is not None and node.attr in values.attribute_names and outline.may_be_object(inner):
                    return True
                return [node.value] if node.attr in INSIDE else False
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
        if aliases.get(name, name) in self._values.known or attribute in PARSING:
            return True
        found = [node.func.value] if isinstance(node.func, ast.Attribute) and attribute in SAME_OBJECT else []
        if name in WRAPPERS:
            found += [*node.args, *(keyword.value for keyword in node.keywords)]
        return found


def _gives(keywords: Collection[str], content: bytes) -> bool:
    """Whether a file may have a loop in which something is called with all these keywords."""
    if not _says_all(content, keywords) or b"for " not in content:
        return False
    # that the pattern begins with plain text makes it fast
    return all(re.search(rf"{word}(?<!\w{word})\s*=".encode(), content) for word in keywords)


def _says_all(text: bytes, words: Collection[str]) -> bool:
    """Whether a text has all the words, the longest first: it is the rarest."""
    return all(word.encode() in text for word in sorted(words, key=len, reverse=True))


def _calls_with(function: Function, keywords: set[str]) -> bool:
    """Whether a parameter is called with all these keywords."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in function.parameters
        and keywords <= {keyword.arg for keyword in node.keywords}
        for node in walk(function.outline.body)
    )


__all__ = ["grow"]
