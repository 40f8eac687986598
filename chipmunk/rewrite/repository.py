"""The repository as a program: what a name in one file means, followed through imports into other files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath

import libcst as cst

from chipmunk.rewrite import syntax
from chipmunk.rewrite.ast_nodes import arguments, dotted, last_name
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.modules import Class, External, Function, Meaning, Module, imported_names
from chipmunk.rewrite.source import Source, SourceError
from chipmunk.rewrite.statements import Indexed, Statement, bind

_FOLLOW = 6  # imports of imports
_ADDING = {"append", "extend", "insert"}


class Repository:
    """All Python files; parsed when first asked for. Files that cannot be parsed are kept in `unreadable`."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        parsed: Mapping[str, Module | SourceError] | None = None,
        before: Repository | None = None,
    ) -> None:
        """`before`: the repository before some of its files were changed, of which the texts have been searched."""
        self.files = files
        self._before = before
        self._changed = (
            {path for path in files if files[path] is not before.files[path]} if before is not None else set()
        )
        self._modules: dict[str, Module | SourceError] = dict(parsed or {})
        self._found_modules: dict[tuple[str, str], str | None] = {}
        self._classes_built: dict[tuple[int, str, str], list[Class]] = {}
        self._assigned: dict[tuple[int, str], list[tuple[ast.expr, Function, Statement]]] = {}
        self._values: dict[tuple[int, str], list[tuple[cst.BaseExpression, Function, Step]]] = {}
        self._bases: dict[int, list[Class]] = {}
        self._found_files: dict[Hashable, list[str]] = {}

    @property
    def parsed(self) -> dict[str, Module | SourceError]:
        return self._modules

    @property
    def unreadable(self) -> dict[str, SourceError]:
        return {path: found for path, found in self._modules.items() if isinstance(found, SourceError)}

    def module(self, path: str) -> Module | None:
        """The file at `path`, parsed; None if it cannot be."""
        if path not in self._modules:
            try:
                self._modules[path] = Module(Source(path, self.files[path]))
            except SourceError as error:
                self._modules[path] = error
        found = self._modules[path]
        return found if isinstance(found, Module) else None

    def files_where(self, test: Callable[[bytes], bool], key: Hashable = None) -> list[str]:
        """The paths, sorted, of the files whose content passes the test. `key`: what tells it from other tests."""
        key = key or test
        if key not in self._found_files:
            known = self._before.files_where(test, key) if self._before is not None else []
            asked = self._changed if self._before is not None else self.files
            found = {path for path in known if path not in self._changed}
            found |= {path for path in asked if test(self.files[path])}
            self._found_files[key] = sorted(found)
        return self._found_files[key]

    def files_with(self, word: str) -> list[str]:
        """The paths of the files that have the word somewhere, or a longer one that it is part of."""
        part = word.encode()
        return self.files_where(lambda content: part in content, word)

    @cached_property
    def own_names(self) -> set[str]:
        """Names under which the repository's own code can be imported."""
        names: set[str] = set()
        for path in self.files:
            parts = PurePosixPath(path).with_suffix("").parts
            names.update(parts)
        return names

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Last part of a module's dotted name → the files that may be it."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.files):
            parts = _parts(path)
            if parts:
                found.setdefault(parts[-1], []).append(path)
        return found

    # Imports

    def find_module(self, name: str, importer: str) -> str | None:
        """The file that `import name`, or `from name import …`, means in the file `importer`."""
        key = (name, importer)
        if key not in self._found_modules:
            self._found_modules[key] = self._find_module(name, PurePosixPath(importer).parent)
        return self._found_modules[key]

    def _find_module(self, name: str, folder: PurePosixPath) -> str | None:
        if name.startswith("."):
            level = len(name) - len(name.lstrip("."))
            for _ in range(level - 1):
                folder = folder.parent
            base = [*folder.parts, *(p for p in name.lstrip(".").split(".") if p)]
            return self._file_of(base)
        parts = name.split(".")
        if not parts[-1] or (parts[0] in sys.stdlib_module_names and len(parts) == 1):
            return None
        candidates: list[tuple[bool, int, int, str]] = []
        for path in self._by_name.get(parts[-1], ()):
            own = _parts(path)
            if own[-len(parts) :] != parts:
                continue
            root = own[: len(own) - len(parts)]
            # A folder inside a package is on the import path only for scripts that lie in that very folder.
            if self._is_package(root) and tuple(root) != folder.parts:
                continue
            shared = _shared(root, list(folder.parts))
            candidates.append((self._is_package(root), -shared, len(root), path))
        return min(candidates)[3] if candidates else None

    def _file_of(self, parts: list[str]) -> str | None:
        for path in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if path in self.files:
                return path
        return None

    def _is_package(self, parts: list[str]) -> bool:
        return bool(parts) and "/".join([*parts, "__init__.py"]) in self.files

    # Names

    def resolve(
        self, expression: cst.CSTNode | str | None, function: Function | Module, step: Indexed | None = None
    ) -> Meaning | None:
        """What a name or dotted name means inside `function` (at `step`, if given); None if unknown."""
        name = expression if isinstance(expression, str) else syntax.dotted(expression)
        if name is None:
            return None
        first, *rest = name.split(".")
        module = function if isinstance(function, Module) else function.module
        if isinstance(function, Function):
            if first in function.statements.bindings:
                return self._local(first, rest, function, step)
            if first in function.parameters:
                if function.owner is not None and first == function.parameters[0] and len(rest) == 1:
                    return self.method(function.owner, rest[0])
                return None
        return self._in_module(module, first, rest, 0)

    def _local(self, first: str, rest: list[str], function: Function, step: Indexed | None) -> Meaning | None:
        """A name that the function binds itself: an import inside it, or another name for something known."""
        inside = function.statements
        bindings = inside.bindings[first] if step is None else inside.reaching(first, inside.steps[step.index])
        for binding in bindings:
            imported = imported_names(binding.step.node)
            if first in imported:
                return self._imported(*imported[first], rest, function.module, 0)
            name = dotted(binding.value) if binding.value is not None and not binding.path else None
            if name not in (None, first):
                return self.resolve(".".join([name or "", *rest]), function, binding.step)
        return None

    def _in_module(self, module: Module, first: str, rest: list[str], depth: int) -> Meaning | None:
        if depth > _FOLLOW:
            return None
        if first in module.classes:
            owner = module.classes[first]
            return owner if not rest else self.method(owner, rest[0])
        if first in module.functions and not rest:
            return module.functions[first]
        if first in module.imports:
            return self._imported(*module.imports[first], rest, module, depth)
        for binding in reversed(module.bindings(first)):
            name = dotted(binding.value) if binding.value is not None else None
            if name is not None and not binding.path and name.split(".")[0] != first:
                head, *tail = name.split(".")
                return self._in_module(module, head, [*tail, *rest], depth + 1)
            return None
        for star in module.stars:
            path = self.find_module(star, module.path)
            other = self.module(path) if path is not None else None
            found = self._in_module(other, first, rest, depth + 1) if other is not None else None
            if found is not None and not isinstance(found, External):
                return found
        return None

    def _imported(
        self, name: str, attribute: str | None, rest: list[str], module: Module, depth: int
    ) -> Meaning | None:
        parts = ([attribute] if attribute is not None else []) + rest
        # `from . import layers`, `import flux.math` and `from flux import math` all name a module in the end.
        for taken in range(len(parts), -1, -1):
            dots = name if name.endswith(".") or not parts[:taken] else name + "."
            path = self.find_module(dots + ".".join(parts[:taken]), module.path)
            other = self.module(path) if path is not None else None
            if other is not None and parts[taken:]:
                found = self._in_module(other, parts[taken], parts[taken + 1 :], depth + 1)
                if found is not None:
                    return found
        return External(".".join([name, *parts])) if not name.startswith(".") else None

    # Classes

    def bases(self, owner: Class) -> list[Class]:
        """The class and those it inherits from, as far as they are in the repository, nearest first."""
        if id(owner) not in self._bases:
            found = [owner]
            for current in found:
                for base in current.outline.bases:
                    meaning = self.resolve(dotted(base), current.module)
                    if isinstance(meaning, Class) and meaning not in found and len(found) < 10:
                        found.append(meaning)
            self._bases[id(owner)] = found
        return self._bases[id(owner)]

    def method(self, owner: Class, name: str) -> Function | None:
        return next((c.methods[name] for c in self.bases(owner) if name in c.methods), None)

    def assigned(self, owner: Class, attribute: str) -> list[tuple[ast.expr, Function, Statement]]:
        """The expressions that any method assigns to `self.attribute`."""
        key = (id(owner), attribute)
        if key not in self._assigned:
            self._assigned[key] = [
                (binding.value, method, binding.step)
                for method in self._binding(owner, attribute)
                for binding in method.statements.bindings[f"{method.receiver}.{attribute}"]
                if binding.value is not None and not binding.path
            ]
        return self._assigned[key]

    def values_of(self, owner: Class, attribute: str) -> list[tuple[cst.BaseExpression, Function, Step]]:
        """The same as LibCST's trees."""
        key = (id(owner), attribute)
        if key not in self._values:
            self._values[key] = [
                (binding.value, method, binding.step)
                for method in self._binding(owner, attribute)
                for binding in method.scope.bindings[f"{method.receiver}.{attribute}"]
                if binding.value is not None and not binding.path
            ]
        return self._values[key]

    def _binding(self, owner: Class, attribute: str) -> Iterator[Function]:
        """The methods that assign to `self.attribute`."""
        for current in self.bases(owner):
            for method in current.methods.values():
                if attribute in method.words and f"{method.receiver}.{attribute}" in method.statements.bindings:
                    yield method

    def classes_in(self, owner: Class, attribute: str, run: str = "forward") -> list[Class]:
        """The classes of the objects in `self.attribute`: one for a sub-module, those of a list's elements.

        run: the method of theirs that is called.
        """
        key = (id(owner), attribute, run)
        if key not in self._classes_built:
            found: list[Class] = []
            for value, method, step in self.assigned(owner, attribute):
                self._built(owner, value, method, step, found, 0, run)
            methods = [method for current in self.bases(owner) for method in current.methods.values()]
            for method in [method for method in methods if attribute in method.words]:
                adding = {f"{method.receiver}.{attribute}.{name}" for name in _ADDING}
                for call, step in method.statements.calls:
                    for arg in arguments(call) if dotted(call.func) in adding else ():
                        self._built(owner, arg, method, step, found, 0, run)
            self._classes_built[key] = found
        return self._classes_built[key]

    def _built(
        self,
        owner: Class,
        value: ast.expr,
        method: Function,
        step: Statement,
        found: list[Class],
        depth: int,
        run: str,
    ) -> None:
        """Collect the outermost repository classes that the expression makes objects of, where `self` is an `owner`."""
        if isinstance(value, ast.Call):
            meaning = self.resolve(dotted(value.func), method, step)
            classes = [meaning] if isinstance(meaning, Class) else []
            if isinstance(value.func, ast.Name) and meaning is None:
                classes = self._given(owner, method, value.func.id, step)
            for made in classes:
                if made not in found and any(self.method(made, name) for name in (run, "forward", "__call__")):
                    found.append(made)
            if any(not self._is_list(made) for made in classes):
                return
        if isinstance(value, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):
            return self._built(owner, value.elt, method, step, found, depth, run)
        if isinstance(value, ast.Name) and depth < 3:
            for binding in method.statements.reaching(value.id, step):
                if binding.value is not None:
                    self._built(owner, binding.value, method, binding.step, found, depth + 1, run)
            for call, at in method.statements.calls:
                if call.args and dotted(call.func) == f"{value.id}.append":
                    self._built(owner, call.args[0], method, at, found, depth + 1, run)
            return
        for part in _outermost(value):
            self._built(owner, part, method, step, found, depth, run)

    def _is_list(self, owner: Class) -> bool:
        """Whether it is the repository's own kind of `nn.ModuleList`: what is in it are its arguments."""
        bases = [(dotted(base) or "").split(".")[-1] for c in self.bases(owner) for base in c.outline.bases]
        return "ModuleList" in bases

    def _given(self, owner: Class, method: Function, parameter: str, step: Statement) -> list[Class]:
        """The classes that a parameter of a constructor may be: what an `owner` is made with, and its default."""
        if parameter not in method.parameters or method.statements.reaching(parameter, step):
            return []
        name = method.outline.name
        own = self.method(owner, name)
        values: list[tuple[ast.expr | None, Function | Module, Statement | None]] = []
        if own is None or own is method:
            values = [
                (bind(method.outline, call, skip=1).get(parameter), place, at) for call, place, at in self._made(owner)
            ]
        else:
            for call, at in own.statements.calls:
                above = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr == name else None
                if isinstance(above, ast.Call) and last_name(above.func) == "super":
                    given = bind(method.outline, call, skip=1).get(parameter)
                    if isinstance(given, ast.Name) and given.id in own.parameters:
                        return self._given(owner, own, given.id, at)
                    values.append((given, own, at))
        if not values or any(value is None for value, *_ in values):
            values.insert(0, (_default(method.outline.args, parameter), method.module, None))
        meanings = [self.resolve(dotted(value), place, at) for value, place, at in values if value is not None]
        return list(dict.fromkeys(meaning for meaning in meanings if isinstance(meaning, Class)))

    def _made(self, owner: Class) -> Iterator[tuple[ast.Call, Function | Module, Statement]]:
        """The calls that make an object of the class, by its name."""
        for path in self.files_with(owner.name + "("):
            module = self.module(path)
            places: list[Function | Module] = [] if module is None else [module, *module.all_functions()]
            for place in [place for place in places if owner.name in place.words]:
                for call, step in place.statements.calls:
                    if last_name(call.func) == owner.name and self.resolve(dotted(call.func), place, step) is owner:
                        yield call, place, step


def _outermost(node: ast.AST) -> Iterator[ast.expr]:
    """The calls and names below the node that are in no other call."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, (ast.Call, ast.Name)):
            yield part
        else:
            yield from _outermost(part)


def _default(given: ast.arguments, name: str) -> ast.expr | None:
    """What a parameter is where it is not given."""
    positional = [*given.posonlyargs, *given.args]
    known = dict(zip([p.arg for p in positional[len(positional) - len(given.defaults) :]], given.defaults, strict=True))
    return {**known, **dict(zip([p.arg for p in given.kwonlyargs], given.kw_defaults, strict=True))}.get(name)


def _parts(path: str) -> list[str]:
    parts = list(PurePosixPath(path).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def _shared(first: list[str], second: list[str]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


__all__ = ["Class", "External", "Function", "Meaning", "Module", "Repository", "imported_names"]
