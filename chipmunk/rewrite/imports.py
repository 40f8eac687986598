"""The import of the runtime: what a file calls it, and where a new one stands."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence

from chipmunk.rewrite.source import Edit, Source

PACKAGE = "chipmunk"
ALIAS = "chipmunk_runtime"
_Import = ast.Import | ast.ImportFrom


def runtime_name(source: Source) -> tuple[str, bool]:
    """The name by which the file calls the Chipmunk runtime, and whether it has been imported already."""
    if PACKAGE.encode() not in source.text:
        return PACKAGE, False
    for statement in _top_imports(source.outline.body):
        for alias in statement.names:
            if alias.name == PACKAGE:
                return alias.asname or PACKAGE, True
    taken = any(_bound_by(node) == PACKAGE for node in ast.walk(source.outline))
    return (ALIAS if taken else PACKAGE), False


def import_edit(source: Source, name: str, own_modules: set[str]) -> Edit:
    """The edit that imports the runtime as `name`, beside the file's third-party imports.

    `own_modules`: the top-level names of the repository's own modules, which are no third party.
    """
    line = f"import {PACKAGE}" if name == PACKAGE else f"import {PACKAGE} as {name}"
    statements: list[ast.stmt] = []
    for statement in source.outline.body:
        if not statements or statement.lineno > (statements[-1].end_lineno or 0):  # the first on its line
            statements.append(statement)
    if not statements:
        return Edit(len(source.text), len(source.text), line + source.newline)
    start = 0
    if _is_docstring(statements[0]):
        start = 1
    while start < len(statements) and _module_of(statements[start]) == "__future__":
        start += 1
    region: list[_Import] = []
    for statement in statements[start:]:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            region.append(statement)
        elif not isinstance(statement, (ast.Try, ast.If)):
            break

    third_party = [s for s in region if _is_third_party(s, own_modules)]
    plain = [s for s in third_party if isinstance(s, ast.Import)]
    later = [s for s in plain if _module_of(s) > PACKAGE and not source.has_comment_above(s)]
    earlier = [s for s in plain if _module_of(s) < PACKAGE]
    if earlier:
        return _after(source, earlier[-1], line)
    if later:
        return _before(source, later[0], line)
    if third_party and not source.has_comment_above(third_party[0]):
        return _before(source, third_party[0], line)
    if third_party:
        return _after(source, third_party[-1], line)
    standard = [s for s in region if _module_of(s).split(".")[0] in sys.stdlib_module_names]
    if standard:
        return _after(source, standard[-1], line, blank=True)
    if region and not source.has_comment_above(region[0]):
        return _before(source, region[0], line + source.newline)
    if region:
        return _after(source, region[-1], line)
    if start:
        return _after(source, statements[start - 1], line, blank=True)
    # A file without imports: leading `try:` blocks that only import stay first.
    leading = [s for s in statements[:1] if isinstance(s, ast.Try)]
    if leading:
        return _after(source, leading[-1], line, blank=True)
    return _before(source, statements[0], line + source.newline)


def _after(source: Source, statement: ast.stmt, line: str, *, blank: bool = False) -> Edit:
    at = source.line_at(max(source.lines(statement)[1] - 1, 0))[1]
    return Edit(at, at, source.newline * (2 if blank else 1) + line)


def _before(source: Source, statement: ast.stmt, line: str) -> Edit:
    at = source.lines(statement)[0]
    return Edit(at, at, line + source.newline)


def _top_imports(body: Sequence[ast.stmt]) -> Iterator[ast.Import]:
    """`import` statements at the top level, also those under a top-level `try:`."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield statement
        elif isinstance(statement, ast.Try):
            yield from _top_imports(statement.body)


def _is_docstring(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _module_of(statement: ast.stmt) -> str:
    """`torch.nn` for `import torch.nn` and `from torch.nn import functional`; empty for a relative import."""
    if isinstance(statement, ast.Import):
        return statement.names[0].name
    return statement.module or "" if isinstance(statement, ast.ImportFrom) and not statement.level else ""


def _is_third_party(statement: _Import, own_modules: set[str]) -> bool:
    top = _module_of(statement).split(".")[0]
    return bool(top) and top not in sys.stdlib_module_names and top not in own_modules


def _bound_by(node: ast.AST) -> str:
    """The name that this very node binds; empty if none."""
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else ""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
        return node.name or ""
    if isinstance(node, ast.alias):
        return node.asname or node.name.split(".")[0]
    return node.arg if isinstance(node, ast.arg) else ""
