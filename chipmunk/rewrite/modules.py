"""One file's functions, classes and imports. What is not asked of their trees is told without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst

from chipmunk.rewrite.flow import Binding, Scope
from chipmunk.rewrite.outlines import Outline, Uses
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import dotted

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOP = re.compile(rb"^[ \t]*(?:async[ \t]+)?for\b", re.MULTILINE)
_WORD = re.compile(rb"[A-Za-z_\x80-\xff][\w\x80-\xff]*")


@dataclass(eq=False)
class Function:
    """A function or method of the repository. Its tree is built when it is first asked for."""

    module: Module
    outline: ast.FunctionDef | ast.AsyncFunctionDef
    owner: Class | None = None

    @cached_property
    def node(self) -> cst.FunctionDef:
        found = self.source.definition(self.outline)
        assert isinstance(found, cst.FunctionDef)
        return found

    @cached_property
    def scope(self) -> Scope:
        return Scope(self.node)

    @property
    def text(self) -> bytes:
        return self.source.text_of(self.outline)

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name that occurs in it, and what else looks like one."""
        return _words(self.text)

    @cached_property
    def values(self) -> Outline:
        return Outline.of(self.outline)

    @cached_property
    def uses(self) -> Uses:
        return Uses.of(self.outline.body)

    @cached_property
    def parameters(self) -> list[str]:
        """Those with a name, as `scope.parameters` has them; told without its tree."""
        given = self.outline.args
        return [parameter.arg for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs)]

    @property
    def name(self) -> str:
        return self.outline.name if self.owner is None else f"{self.owner.name}.{self.outline.name}"

    @property
    def source(self) -> Source:
        return self.module.source

    @property
    def is_static(self) -> bool:
        return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in self.outline.decorator_list)

    @property
    def receivers(self) -> int:
        """How many leading parameters a call does not give: 1 for `self`."""
        return 1 if self.owner is not None and not self.is_static else 0


@dataclass(eq=False)
class Class:
    """A class of the repository, with its methods."""

    module: Module
    outline: ast.ClassDef
    methods: dict[str, Function] = field(default_factory=dict)

    @cached_property
    def node(self) -> cst.ClassDef:
        """The class's own tree, beside those of its methods."""
        found = self.source.definition(self.outline)
        assert isinstance(found, cst.ClassDef)
        return found

    @property
    def name(self) -> str:
        return self.outline.name

    @property
    def source(self) -> Source:
        return self.module.source


@dataclass(frozen=True)
class External:
    """Something that the repository imports from elsewhere, by its full name."""

    name: str


Meaning = Function | Class | External


class Module:
    """One file's definitions and imports."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, Class] = {}
        self.duplicates: list[Class] = []
        """Classes that a later class of the same name replaces: dead code."""
        self.imports: dict[str, tuple[str, str | None]] = {}
        """Name → (module, name in it or None for the module itself); leading dots for relative ones."""
        self.stars: list[str] = []
        self._read(source.outline.body)

    @property
    def path(self) -> str:
        return self.source.path

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What `as` renames anywhere in the file: new name → old name."""
        found = re.findall(rb"\b(\w+)\s+as\s+(\w+)", self.source.content)
        return {new.decode("utf-8", "replace"): old.decode("utf-8", "replace") for old, new in found}

    @cached_property
    def scope(self) -> Scope:
        """The statements outside functions and classes."""
        return Scope(cst.Module(body=self.source.statements))

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name that occurs in them, and what else looks like one."""
        return _words(self.source.plain_text)

    @cached_property
    def values(self) -> Outline:
        return Outline.of_module(self.source.outline.body)

    @cached_property
    def uses(self) -> Uses:
        """Of the statements outside functions and classes."""
        return Uses.of(part for part in self.source.outline.body if not isinstance(part, _DEFINITIONS))

    def bindings(self, name: str) -> list[Binding]:
        """What the statements outside functions and classes bind the name to."""
        return self.scope.bindings.get(name, []) if name in self.words and name in self.uses.bound else []

    def all_functions(self) -> list[Function]:
        """Functions and methods, live ones only."""
        methods = [method for owner in self.classes.values() for method in owner.methods.values()]
        return [*self.functions.values(), *methods]

    def _read(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self._read_import(statement)
            elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.functions[statement.name] = Function(self, statement)
            elif isinstance(statement, ast.ClassDef):
                found = Class(self, statement)
                for part in statement.body:
                    if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        found.methods[part.name] = Function(self, part, found)
                if found.name in self.classes:
                    self.duplicates.append(self.classes[found.name])
                self.classes[found.name] = found
            elif isinstance(statement, (ast.If, ast.Try, ast.With, ast.AsyncWith)):
                self._read(statement.body)
                for handler in getattr(statement, "handlers", ()):
                    self._read(handler.body)
                self._read(getattr(statement, "orelse", ()))

    def _read_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        origin = "." * statement.level + (statement.module or "") if isinstance(statement, ast.ImportFrom) else None
        for alias in statement.names:
            if origin is None:
                first = alias.name.split(".")[0]
                self.imports[alias.asname or first] = (alias.name if alias.asname else first, None)
            elif alias.name == "*":
                self.stars.append(origin)
            else:
                self.imports[alias.asname or alias.name] = (origin, alias.name)


def _words(text: bytes) -> frozenset[str]:
    return frozenset(b"\n".join({*_WORD.findall(text)}).decode("utf-8", "replace").split("\n"))


def imported_names(small: cst.CSTNode) -> dict[str, tuple[str, str | None]]:
    """What an import statement binds."""
    found: dict[str, tuple[str, str | None]] = {}
    if isinstance(small, cst.Import):
        for alias in small.names:
            name, alias_name = alias.evaluated_name, alias.evaluated_alias
            found[alias_name or name.split(".")[0]] = (name if alias_name else name.split(".")[0], None)
    elif isinstance(small, cst.ImportFrom) and not isinstance(small.names, cst.ImportStar):
        for alias in small.names:
            found[alias.evaluated_alias or alias.evaluated_name] = (_module_name(small), alias.evaluated_name)
    return found


def _module_name(node: cst.ImportFrom) -> str:
    return "." * len(node.relative) + (dotted(node.module) or "")


@dataclass(eq=False)
class Place:
    """A function, or a module's own statements."""

    module: Module
    function: Function | None

    @property
    def scope(self) -> Scope:
        return self.module.scope if self.function is None else self.function.scope

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name that occurs in it, and what aliases stand for; told without its tree."""
        words = self.module.words if self.function is None else self.function.words
        return words | {self.module.aliases[word] for word in words & self.module.aliases.keys()}

    @cached_property
    def loops(self) -> bool:
        """Whether it has a `for` statement; told without its tree."""
        text = self.module.source.plain_text if self.function is None else self.function.text
        return _LOOP.search(text) is not None

    @property
    def outline(self) -> Outline:
        return self.module.values if self.function is None else self.function.values

    @property
    def uses(self) -> Uses:
        return self.module.uses if self.function is None else self.function.uses

    @property
    def name(self) -> str:
        return "<module>" if self.function is None else self.function.name

    @property
    def names(self) -> Function | Module:
        """What names are resolved in."""
        return self.module if self.function is None else self.function
