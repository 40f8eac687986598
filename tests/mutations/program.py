"""A repository that is being rewritten: its files, and what in them is the model."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import libcst as cst

from chipmunk.registry import load
from chipmunk.rewrite import ModelFacts, Plan, SiteStatus, plan_repository, repository, source

REGISTRY = load()
parsed = lru_cache(400)(cst.parse_module)

Files = dict[str, str]
Body = Sequence[cst.BaseStatement]


_shared_source = lru_cache(400)(source.Source)


@contextmanager
def _trees_shared() -> Iterator[None]:
    """Mutants share most of their files, and parsing is most of the time. Trees are never changed."""
    own, repository.Source = repository.Source, _shared_source  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        repository.Source = own  # type: ignore[misc]


def planned(files: dict[str, bytes]) -> Plan:
    with _trees_shared():
        return plan_repository(files, REGISTRY)


def plan_of(files: Files) -> Plan:
    return planned({path: text.encode() for path, text in files.items()})


@dataclass(frozen=True, order=True)
class Place:
    """A function: its file, its class if it is a method, its name."""

    path: str
    owner: str | None
    name: str


@dataclass
class Program:
    """Files of a repository, by path, with the facts that the tool finds in them."""

    files: Files
    plan: Plan

    @classmethod
    def of(cls, files: Files) -> Program:
        return cls(files, plan_of(files))

    def with_files(self, changed: Files) -> Program:
        return replace(self, files={**self.files, **changed})

    @property
    def models(self) -> tuple[ModelFacts, ...]:
        return self.plan.models

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """File and name of each block class, each once."""
        found = [(b.file, b.name) for m in self.models for b in (m.double_block, m.single_block)]
        return list(dict.fromkeys(found))

    def places(self, patch: str, *, methods: bool | None = None) -> list[Place]:
        """The innermost functions that hold a site of the patch."""
        found = []
        for site in self.plan.sites:
            if site.patch == patch and site.status is SiteStatus.PATCHED:
                place = function_at(site.file, self.files[site.file], site.line)
                if place is not None and methods in (None, place.owner is not None):
                    found.append(place)
        return list(dict.fromkeys(found))

    @cached_property
    def forwards(self) -> list[Place]:
        """The methods that do the blocks' work: of the blocks, their sub-modules and processors."""
        patches = ("attention", "double-mlp", "single-mlp")
        return list(dict.fromkeys(place for patch in patches for place in self.places(patch, methods=True)))

    @cached_property
    def kernels(self) -> list[Place]:
        """The functions outside classes that compute attention."""
        return self.places("attention", methods=False)

    @cached_property
    def model_forwards(self) -> list[Place]:
        return self.places("model-forward")

    @cached_property
    def loops(self) -> list[Place]:
        return [
            Place(loop.file, *(owner_and_name(loop.function)))
            for loop in dict.fromkeys(loop for model in self.models for loop in model.loops)
            if not loop.function.startswith("<")
        ]

    @cached_property
    def core(self) -> list[str]:
        """The files of models, blocks, attention and loops."""
        places = [*self.forwards, *self.kernels, *self.model_forwards, *self.loops]
        return sorted({place.path for place in places})

    def module_of(self, path: str) -> str:
        """The dotted name under which the repository imports the file."""
        parts = path.removesuffix(".py").split("/")
        folders = range(len(parts))
        start = next((i for i in folders if "/".join([*parts[: i + 1], "__init__.py"]) in self.files), len(parts) - 1)
        return ".".join(parts[start:])


def owner_and_name(function: str) -> tuple[str | None, str]:
    owner, _, name = function.rpartition(".")
    return owner or None, name


def function_at(path: str, text: str, line: int) -> Place | None:
    """The innermost function around a line (decorators and nested functions count for the outermost function)."""
    for owner, node in functions(ast.parse(text)):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if first <= line <= (node.end_lineno or 0):
            return Place(path, owner, node.name)
    return None


def functions(tree: ast.Module) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield node.name, part


class _Editor(cst.CSTTransformer):
    def __init__(self, place: Place, change: Callable[[cst.FunctionDef], cst.FunctionDef | None]) -> None:
        super().__init__()
        self.place, self.change = place, change
        self.path: list[str] = []
        self.done = False

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.path.append(node.name.value)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        self.path.pop()
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self.path.append(node.name.value)

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        wanted = [part for part in (self.place.owner, self.place.name) if part is not None]
        here = self.path == wanted
        self.path.pop()
        changed = self.change(updated_node) if here else None
        self.done = self.done or changed is not None
        return changed if changed is not None else updated_node


def edit(files: Files, place: Place, change: Callable[[cst.FunctionDef], cst.FunctionDef | None]) -> bool:
    """Change one function of `files` in place; False if `change` has nothing to do there."""
    if place.path not in files:
        return False
    editor = _Editor(place, change)
    module = parsed(files[place.path]).visit(editor)
    if editor.done:
        files[place.path] = module.code
    return editor.done


def function_of(files: Files, place: Place) -> cst.FunctionDef | None:
    found: list[cst.FunctionDef] = []
    edit(files, place, lambda node: found.append(node))  # type: ignore[func-returns-value]
    return found[0] if found else None


def insert_top(text: str, lines: str) -> str:
    """`lines` after the file's imports (and constants between them)."""
    tree = ast.parse(text)
    last = 0
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or is_docstring:
            last = node.end_lineno or last
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
    parts = text.splitlines(keepends=True)
    return "".join([*parts[:last], lines, *parts[last:]])


def add_method(text: str, owner: str, method: str) -> str:
    """`method` (its source, unindented) at the end of a class."""
    module = cst.parse_module(text)
    new = cst.parse_module(f"class _:\n{_indent(method)}").body[0]
    assert isinstance(new, cst.ClassDef)

    class Add(cst.CSTTransformer):
        def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
            if updated_node.name.value != owner:
                return updated_node
            assert isinstance(updated_node.body, cst.IndentedBlock)
            block = updated_node.body
            return updated_node.with_changes(body=block.with_changes(body=[*block.body, *new.body.body]))

    return module.visit(Add()).code


def _indent(text: str) -> str:
    return "".join("    " + line if line.strip() else line for line in text.splitlines(keepends=True))
