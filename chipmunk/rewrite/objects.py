"""Which objects of the repository's classes an attribute may hold: also those that are put in its place later.

A module may leave its work to a processor object, which is given to its constructor or to a setter. Which objects
users put there is decided when the program runs; every class beside the default one that is called alike may be.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from chipmunk.rewrite.ast_nodes import arguments, dotted, last_name
from chipmunk.rewrite.repository import Class, Function, Module, Repository
from chipmunk.rewrite.statements import Statement, bind

_DEPTH = 4
_FILES = 4
"""A class whose objects are made in more files than this is of general use."""
_INTERFACE = 3
"""How many parameters, after the receiver, must have the same names for two classes to be called alike."""


@dataclass
class Held:
    """What an attribute may hold."""

    methods: list[Function] = field(default_factory=list)
    """The methods that a call of it runs."""
    replaceable: bool = False
    """Whether anything else may be put there: a setter or the constructor takes it from outside."""


def held_by(repository: Repository, owner: Class, attribute: str, method: str | None, builder: Module) -> Held:
    """The methods that `self.<attribute>(…)` may run in a method of `owner`, or `self.<attribute>.<method>(…)`.

    builder: the file of the block that the owner's objects are built for.
    """
    search = _Search(repository, owner, builder)
    classes = list(repository.classes_in(owner, attribute))
    held = Held()
    for value, function, step in repository.assigned(owner, attribute):
        for name in _parameters_in(value, function, step):
            held.replaceable = True
            classes += [found for found in search.given_for(function, name, 0) if found not in classes]
    for value, function, step in _set_elsewhere(repository, owner, attribute):
        held.replaceable = True
        classes += [found for found in search.classes_of(value, function, step) if found not in classes]
    for found in classes:
        run = _method(repository, found, method)
        if run is not None and run not in held.methods:
            held.methods.append(run)
    if held.replaceable and method is None and not _is_general(repository, owner):
        held.methods += _called_alike(repository, held.methods)
    return held


def _set_elsewhere(repository: Repository, owner: Class, attribute: str) -> list[tuple[ast.expr, Function, Statement]]:
    """What the constructor gives to `set_<attribute>`, where that is inherited from a class of another package."""
    setter = f"set_{attribute}"
    if repository.assigned(owner, attribute) or repository.method(owner, setter) is not None:
        return []
    makers = [maker for c in repository.bases(owner) if (maker := c.methods.get("__init__")) is not None]
    calls = [(call, maker, step) for maker in makers for call, step in maker.statements.calls]
    return [
        (given[0], maker, step)
        for call, maker, step in calls
        if dotted(call.func) == f"{maker.receiver}.{setter}" and len(given := arguments(call)) == 1
    ]


def _is_general(repository: Repository, owner: Class) -> bool:
    """Whether objects of the class are made in so many files that the processors beside it are for others too."""
    return len(repository.files_with(owner.name + "(")) > _FILES


def _method(repository: Repository, owner: Class, name: str | None) -> Function | None:
    names = ("forward", "__call__") if name is None else (name,)
    return next((found for n in names if (found := repository.method(owner, n)) is not None), None)


def _parameters_in(value: ast.expr, function: Function, step: Statement) -> list[str]:
    """The parameters of the function that the value may be, as they were given."""
    if isinstance(value, ast.IfExp):
        return [*_parameters_in(value.body, function, step), *_parameters_in(value.orelse, function, step)]
    inside, name = function.statements, dotted(value)
    if name not in function.parameters[1:] or inside.is_definite(inside.reaching(name, step), step):
        return []
    return [name]


@dataclass(frozen=True)
class _Search:
    """The search for the classes of the objects that are given to an object of `owner`."""

    repository: Repository
    owner: Class
    builder: Module
    asked: set[tuple[int, str]] = field(default_factory=set)

    def given_for(self, function: Function, parameter: str, depth: int) -> list[Class]:
        """The classes whose objects are given to a parameter of one of the owner's methods."""
        name = function.outline.name
        if (id(function), parameter) in self.asked:
            return []
        self.asked.add((id(function), parameter))
        # What other methods put there, when users ask for it, are replacements.
        makers = [c.methods.get("__init__") for c in self.repository.bases(self.owner)]
        callers = [caller for caller in makers if caller is not None]
        calls = [(call, caller, step) for caller in callers for call, step in caller.statements.calls]
        calls = [found for found in calls if dotted(found[0].func) == f"{found[1].receiver}.{name}"]
        if name == "__init__":
            calls = []
            for module in dict.fromkeys((self.builder, self.owner.module)):
                names = "|".join((self.owner.name, *module.aliases)).encode()
                functions = [f for f in module.all_functions() if re.search(rb"\b(?:" + names + rb")\s*\(", f.text)]
                calls += [(call, f, step) for f in functions for call, step in f.statements.calls]
            calls = [found for found in calls if self._builds_owner(*found)]
        found: list[Class] = []
        for call, caller, step in calls:
            argument = bind(function.outline, call, skip=function.receivers).get(parameter)
            if argument is not None:
                found += self._classes_of(argument, caller, step, depth)
        return found

    def classes_of(self, value: ast.expr, function: Function, step: Statement) -> list[Class]:
        """The classes that a value in one of the owner's methods may be an object of."""
        return self._classes_of(value, function, step, 0)

    def _builds_owner(self, call: ast.Call, caller: Function, step: Statement) -> bool:
        if last_name(call.func) not in (self.owner.name, *caller.module.aliases):
            return False
        return self.repository.resolve(dotted(call.func), caller, step) is self.owner

    def _classes_of(self, value: ast.expr, function: Function, step: Statement, depth: int) -> list[Class]:
        """The classes that a value may be an object of."""
        if depth > _DEPTH:
            return []
        if isinstance(value, ast.Call):
            callee = dotted(value.func)
            meaning = self.repository.resolve(callee, function, step)
            receiver, _, attribute = (callee or "").partition(".")
            if meaning is None and receiver == function.receiver and attribute:
                meaning = _class_attribute(self.repository, self.owner, attribute)
            return [meaning] if isinstance(meaning, Class) else []
        if isinstance(value, ast.IfExp):
            return [c for part in (value.body, value.orelse) for c in self._classes_of(part, function, step, depth + 1)]
        name = dotted(value)
        if name is None:
            return []
        bindings = function.statements.reaching(name, step)
        if name in function.parameters and not function.statements.is_definite(bindings, step):
            given = self.given_for(function, name, depth + 1)
            if given:  # else what is put in its place where nothing is given
                return given
        values = [(binding.value, binding.step) for binding in bindings if binding.value and not binding.path]
        return [c for inner, at in values for c in self._classes_of(inner, function, at, depth + 1)]


def _class_attribute(repository: Repository, owner: Class, name: str) -> Class | None:
    """The class that a class's own attribute is another name for: `default = Processor` in its body."""
    for current in repository.bases(owner):
        for statement in current.outline.body:
            if isinstance(statement, ast.Assign) and dotted(statement.targets[0]) == name:
                meaning = repository.resolve(dotted(statement.value), current.module)
                if isinstance(meaning, Class):
                    return meaning
    return None


def _called_alike(repository: Repository, known: list[Function]) -> list[Function]:
    """Methods of other classes, in the files of those known or in files that import them, that are called alike."""
    found: list[Function] = []
    for function in known:
        wanted = _leading(function)
        if len(wanted) < _INTERFACE:
            continue
        for module in (function.module, *_importers(repository, function.module, wanted[0])):
            for owner in module.classes.values():
                other = _method(repository, owner, None)
                if other is not None and other not in known and other not in found and _leading(other) == wanted:
                    found.append(other)
    return found


def _importers(repository: Repository, module: Module, first: str) -> list[Module]:
    """The files that import a file, and define something that is called with an argument of the name `first`."""
    parts = [part for part in module.path.removesuffix(".py").split("/") if part != "__init__"]
    called = re.compile(rb"\bdef (?:forward|__call__)\s*\(\s*\w+\s*,\s*" + re.escape(first.encode()) + rb"\b")
    found: list[Module] = []
    word = parts[-1].encode()
    for path in repository.files_where(lambda text: word in text and called.search(text) is not None, (word, called)):
        if path == module.path:
            continue
        other = repository.module(path)
        imports = other.imports.values() if other is not None else ()
        names = [name if name.strip(".") else f"{name}{inner}" for name, inner in imports]
        if other is not None and any(repository.find_module(name, path) == module.path for name in names):
            found.append(other)
    return found


def _leading(function: Function) -> list[str]:
    return function.parameters[1 : _INTERFACE + 1]
