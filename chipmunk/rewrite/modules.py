"""One file's functions, classes and imports. What is not asked of their trees is told without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst

from chipmunk.rewrite.flow import Scope
from chipmunk.rewrite.outlines import Outline
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.statements import Assignment, Statements

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOP = re.compile(rb"^[ \t]*(?:async[ \t]+)?for\b", re.MULTILINE)
# A pattern that begins with plain text is found several times as fast as one with a word before it.
_ALIAS = re.compile(rb"as(?<=\sas)\s+(\w+)")
_LAST_WORD = re.compile(rb"\w+\Z")
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

    @cached_property
    def statements(self) -> Statements:
        """What `scope` tells, without its tree."""
        return Statements(self.outline)

    @cached_property
    def text(self) -> bytes:
        return self.source.text_of(self.outline)

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name that occurs in it, and what else looks like one."""
        return _words(self.text)

    @cached_property
    def values(self) -> Outline:
        return Outline(self.statements, self.outline)

    @property
    def signature(self) -> list[ast.arg]:
        """The parameters with a name."""
        given = self.outline.args
        return [*given.posonlyargs, *given.args, *given.kwonlyargs]

    @cached_property
    def parameters(self) -> list[str]:
        """Their names, as `scope.parameters` has them; told without its tree."""
        return [parameter.arg for parameter in self.signature]

    @property
    def receiver(self) -> str:
        """The name of the first parameter, `self` in a method."""
        return self.parameters[0] if self.parameters else "self"

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

    def __init__(self, source: Source, before: Module | None = None) -> None:
        """`before`: the file before an edit, of which what is known serves again."""
        self.source = source
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, Class] = {}
        self.duplicates: list[Class] = []
        """Classes that a later class of the same name replaces: dead code."""
        self.imports: dict[str, tuple[str, str | None]] = {}
        """Name → (module, name in it or None for the module itself); leading dots for relative ones."""
        self.stars: list[str] = []
        self._read(source.outline.body)
        if before is not None:
            self._take_over(before)

    @property
    def path(self) -> str:
        return self.source.path

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What `as` renames anywhere in the file: new name → old name."""
        found: dict[str, str] = {}
        for alias in _ALIAS.finditer(self.source.content):
            before = _LAST_WORD.search(self.source.content[max(alias.start() - 100, 0) : alias.start()].rstrip())
            if before is not None:
                found[alias[1].decode("utf-8", "replace")] = before[0].decode("utf-8", "replace")
        return found

    @cached_property
    def renamed(self) -> frozenset[str]:
        """The old names of the aliases."""
        return frozenset(self.aliases.values())

    @cached_property
    def scope(self) -> Scope:
        """The statements outside functions and classes."""
        return Scope(cst.Module(body=self.source.statements))

    @cached_property
    def statements(self) -> Statements:
        """What `scope` tells, without its trees."""
        return Statements(self.source.outline)

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name that occurs in them, and what else looks like one."""
        return _words(self.source.plain_text)

    @cached_property
    def values(self) -> Outline:
        return Outline(self.statements, None)

    def bindings(self, name: str) -> list[Assignment]:
        """What the statements outside functions and classes bind the name to."""
        return self.statements.bindings.get(name, []) if name in self.words else []

    def all_functions(self) -> list[Function]:
        """Functions and methods, live ones only."""
        methods = [method for owner in self.classes.values() for method in owner.methods.values()]
        return [*self.functions.values(), *methods]

    def _take_over(self, before: Module) -> None:
        """What is known of functions with the same text, and does not hang on where in the file they stand."""
        known = {(function.name, function.text): vars(function) for function in before.all_functions()}
        for function in self.all_functions():
            same = known.get((function.name, function.text), {})
            vars(function).update({name: same[name] for name in ("words", "values") if name in same})

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
        self.imports |= imported_names(statement)
        if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
            self.stars.append(_origin(statement))


def _words(text: bytes) -> frozenset[str]:
    return frozenset(b"\n".join({*_WORD.findall(text)}).decode("utf-8", "replace").split("\n"))


def imported_names(statement: ast.stmt) -> dict[str, tuple[str, str | None]]:
    """What an import statement binds."""
    found: dict[str, tuple[str, str | None]] = {}
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            first = alias.name.split(".")[0]
            found[alias.asname or first] = (alias.name if alias.asname else first, None)
    elif isinstance(statement, ast.ImportFrom):
        for alias in [alias for alias in statement.names if alias.name != "*"]:
            found[alias.asname or alias.name] = (_origin(statement), alias.name)
    return found


def _origin(statement: ast.ImportFrom) -> str:
    return "." * statement.level + (statement.module or "")


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
        aliases = self.module.aliases
        meant = {aliases[word] for word in aliases if word in words}
        return words | meant if meant else words

    def says(self, words: Collection[str]) -> bool:
        """Whether one of a few words is among `words`: most places say none of them anywhere."""
        text = self.module.source.plain_text if self.function is None else self.function.text
        if self.module.renamed.isdisjoint(words) and not any(word.encode() in text for word in words):
            return False
        return not self.words.isdisjoint(words)

    @cached_property
    def loops(self) -> bool:
        """Whether it has a `for` statement; told without its tree."""
        text = self.module.source.plain_text if self.function is None else self.function.text
        return _LOOP.search(text) is not None

    @property
    def statements(self) -> Statements:
        return self.module.statements if self.function is None else self.function.statements

    @property
    def outline(self) -> Outline:
        return self.module.values if self.function is None else self.function.values

    @property
    def body(self) -> list[ast.stmt]:
        if self.function is not None:
            return self.function.outline.body
        return [part for part in self.module.source.outline.body if not isinstance(part, _DEFINITIONS)]

    @property
    def name(self) -> str:
        return "<module>" if self.function is None else self.function.name

    @property
    def names(self) -> Function | Module:
        """What names are resolved in."""
        return self.module if self.function is None else self.function
