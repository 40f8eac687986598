"""One Python file: parsed once, and changed by splicing text at the byte positions of its nodes.

Nothing is printed again from the tree, so that all that is not edited stays as it was, to the byte.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from chipmunk.rewrite.spans import Printed
from chipmunk.rewrite.syntax import target_names, walk

_Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement

PACKAGE = "chipmunk"
ALIAS = "chipmunk_runtime"


class SourceError(Exception):
    """A file that cannot be read as Python, or would not survive being written again. `step`: `parse` or `read`."""

    def __init__(self, step: str, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason
        self.line = line


class OverlapError(Exception):
    """Two edits want the same bytes."""


@dataclass(frozen=True, order=True)
class Edit:
    """Replace the bytes `start:end` of the file's UTF-8 text by `text`; an insertion where `start == end`."""

    start: int
    end: int
    text: str


class Source:
    """A file of the repository: its tree, byte spans and lines. Raises SourceError where it cannot be parsed."""

    def __init__(self, path: str, content: bytes, module: cst.Module | None = None) -> None:
        """`module`: the tree of `content`, where it is known."""
        self.path = path
        self.content = content
        self._is_edited = module is not None
        self.module = module if module is not None else _parse(content)

    @cached_property
    def text(self) -> bytes:
        """The file's text as UTF-8 without a byte order mark: what spans count in."""
        return self.content.decode(self.module.encoding).encode("utf-8")

    @cached_property
    def newline(self) -> str:
        return self.module.default_newline

    @cached_property
    def _printed(self) -> Printed:
        printed = Printed(self.module)
        if self._is_edited and printed.text.encode("utf-8") != self.text:
            raise SourceError("parse", "the changed statements do not print as they should")
        return printed

    def survives(self) -> bool:
        """Whether the tree, printed again, is the file: only then do the spans hold, and may the file be edited."""
        return self._printed.text.encode("utf-8") == self.text

    @cached_property
    def _line_starts(self) -> list[int]:
        starts, at = [0], self.text.find(b"\n")
        while at >= 0:
            starts.append(at + 1)
            at = self.text.find(b"\n", at + 1)
        return starts

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where the node stands, with its parentheses, without the white space around it."""
        start, end = self._printed.span(node)
        if isinstance(node, cst.Arg):  # LibCST counts the comma in
            end = self.span(node.value)[1]
        if isinstance(node, cst.Param):
            end = self.span(node.default or node.annotation or node.name)[1]
        if isinstance(node, cst.BaseExpression) and node.lpar:
            start, end = self._printed.span(node.lpar[0])[0], self._printed.span(node.rpar[-1])[1]
        return start, end

    def line(self, node: cst.CSTNode) -> int:
        """The line, from 1, on which the node starts."""
        return bisect_right(self._line_starts, self.span(node)[0])

    def code(self, node: cst.CSTNode) -> str:
        """The node's text as it stands in the file."""
        start, end = self.span(node)
        return self.text[start:end].decode("utf-8")

    def summary(self, node: cst.CSTNode, limit: int = 100) -> str:
        """The node's text on one line, cut at `limit` characters."""
        text = " ".join(self.code(node).split())
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def line_at(self, offset: int) -> tuple[int, int]:
        """Where the line around `offset` starts and ends, its newline left out."""
        start = self._line_starts[bisect_right(self._line_starts, offset) - 1]
        end = self.text.find(b"\n", offset)
        end = len(self.text) if end < 0 else end
        return start, end - (self.text[end - 1 : end] == b"\r")

    def indentation(self, node: cst.CSTNode) -> str:
        """The white space before the node on its line."""
        start = self.line_at(self.span(node)[0])[0]
        return self.text[start : self.span(node)[0]].decode("utf-8")

    def starts_line(self, node: cst.CSTNode) -> bool:
        """Whether only white space stands before the node on its line."""
        return not self.indentation(node).strip()

    def apply(self, edits: Collection[Edit]) -> bytes:
        """The file's bytes after the edits, in its own encoding. Raises OverlapError if two of them touch."""
        return self._spliced(edits, 0, len(self.text)).decode("utf-8").encode(self.module.encoding)

    def edited(self, edits: Collection[Edit]) -> Source:
        """The file after the edits, of which only those statements at the top level are parsed that they touch.

        A file is its statements one after the other: text that holds whole ones, parsed by itself, gives the same
        ones as in the file. Raises SourceError and OverlapError.
        """
        content = self.apply(edits)
        old = self.module.body
        cuts = [0, *(self._printed.span(_first_part(statement))[0] for statement in old[1:]), len(self.text)]
        touched: dict[int, list[Edit]] = {}
        for edit in edits:
            place = min(bisect_right(cuts, edit.start), len(old)) - 1
            if place < 0 or edit.end > cuts[place + 1]:
                return Source(self.path, content)
            touched.setdefault(place, []).append(edit)
        body: list[_Statement] = []
        header = self.module.header
        above: list[cst.EmptyLine] = []
        for place, statement in enumerate(old):
            found = [statement]
            lines: list[cst.EmptyLine] = []
            below: list[cst.EmptyLine] = []
            if place in touched:
                try:
                    piece = _parse(self._spliced(touched[place], cuts[place], cuts[place + 1]).decode("utf-8"))
                except SourceError:  # the edit joins it with the next statement, say
                    return Source(self.path, content)
                found, below = [*piece.body], [*piece.footer]
                if not found or not self._is_like(piece):
                    return Source(self.path, content)
                # LibCST takes comments above a file's first statement, and below its last, for the file's own.
                if place == 0:
                    header = piece.header
                else:
                    lines = [*piece.header]
            if above or lines:
                found[0] = found[0].with_changes(leading_lines=[*above, *lines, *found[0].leading_lines])
            body += found
            above = below
        module = self.module.with_changes(header=header, body=body)
        if len(old) - 1 in touched:
            module = module.with_changes(footer=above, has_trailing_newline=piece.has_trailing_newline)
        return Source(self.path, content, module)

    def _is_like(self, piece: cst.Module) -> bool:
        """Whether indentation and line ends that the piece's tree leaves open are the same in this file."""
        indents = any(isinstance(statement, cst.BaseCompoundStatement) for statement in piece.body)
        return piece.default_newline == self.newline and (
            not indents or piece.default_indent == self.module.default_indent
        )

    def _spliced(self, edits: Collection[Edit], start: int, stop: int) -> bytes:
        """The text from `start` to `stop` after the edits."""
        pieces: list[bytes] = []
        at = start
        previous: Edit | None = None
        for edit in sorted(edits):
            if previous is not None and (edit.start < previous.end or edit.start == previous.start):
                raise OverlapError(f"{self.path}: two edits at byte {edit.start}: {previous.text!r} and {edit.text!r}")
            pieces += [self.text[at : edit.start], edit.text.encode("utf-8")]
            at, previous = edit.end, edit
        pieces.append(self.text[at:stop])
        return b"".join(pieces)


def _first_part(statement: _Statement) -> cst.CSTNode:
    """What of a statement comes first: a line above it, a decorator, or the statement itself."""
    if statement.leading_lines:
        return statement.leading_lines[0]
    decorators = getattr(statement, "decorators", ())
    return decorators[0] if decorators else statement


def _parse(content: bytes | str) -> cst.Module:
    try:
        return cst.parse_module(content)
    except cst.ParserSyntaxError as error:
        raise SourceError("parse", f"it is not valid Python: {error.message}", error.raw_line) from error
    except (UnicodeDecodeError, LookupError, SyntaxError) as error:
        raise SourceError("read", f"its text cannot be decoded: {error}") from error
    except RecursionError as error:
        raise SourceError("parse", "its expressions are nested too deeply") from error


def runtime_name(source: Source) -> tuple[str, bool]:
    """The name by which the file calls the Chipmunk runtime, and whether it has been imported already."""
    for statement in _import_statements(source.module.body):
        for node in statement.body:
            if isinstance(node, cst.Import):
                for name in node.names:
                    if name.evaluated_name == PACKAGE:
                        return name.evaluated_alias or PACKAGE, True
    taken = PACKAGE.encode() in source.text and _binds(source.module, PACKAGE)
    return (ALIAS if taken else PACKAGE), False


def import_edit(source: Source, name: str, own_modules: set[str]) -> Edit:
    """The edit that imports the runtime as `name`, beside the file's third-party imports.

    `own_modules`: the top-level names of the repository's own modules, which are no third party.
    """
    line = f"import {PACKAGE}" if name == PACKAGE else f"import {PACKAGE} as {name}"
    statements = list(source.module.body)
    start = 0
    if statements and _is_docstring(statements[0]):
        start = 1
    while start < len(statements) and _imports_from(statements[start], "__future__"):
        start += 1
    region: list[cst.SimpleStatementLine] = []
    for statement in statements[start:]:
        if _is_import(statement):
            assert isinstance(statement, cst.SimpleStatementLine)
            region.append(statement)
        elif not isinstance(statement, (cst.Try, cst.If)):
            break

    third_party = [s for s in region if _is_third_party(s, own_modules)]
    plain = [s for s in third_party if isinstance(s.body[0], cst.Import)]
    later = [s for s in plain if _module_of(s) > PACKAGE and not _comment_above(s)]
    earlier = [s for s in plain if _module_of(s) < PACKAGE]
    if earlier:
        return _after(source, earlier[-1], line)
    if later:
        return _before(source, later[0], line)
    if third_party and not _comment_above(third_party[0]):
        return _before(source, third_party[0], line)
    if third_party:
        return _after(source, third_party[-1], line)
    standard = [s for s in region if _module_of(s).split(".")[0] in sys.stdlib_module_names]
    if standard:
        return _after(source, standard[-1], line, blank=True)
    if region and not _comment_above(region[0]):
        return _before(source, region[0], line + source.newline)
    if region:
        return _after(source, region[-1], line)
    if start:
        return _after(source, statements[start - 1], line, blank=True)
    # A file without imports: leading `try:` blocks that only import stay first.
    leading = [s for s in statements[:1] if isinstance(s, cst.Try)]
    if leading:
        return _after(source, leading[-1], line, blank=True)
    if not statements:
        return Edit(len(source.text), len(source.text), line + source.newline)
    at = source.line_at(source.span(statements[0])[0])[0]
    return Edit(at, at, line + 2 * source.newline)


def _after(source: Source, statement: cst.CSTNode, line: str, *, blank: bool = False) -> Edit:
    at = source.line_at(max(source.span(statement)[1] - 1, 0))[1]
    if not isinstance(statement, cst.SimpleStatementLine):
        at = _last_code_end(source, statement)
    return Edit(at, at, source.newline * (2 if blank else 1) + line)


def _before(source: Source, statement: cst.CSTNode, line: str) -> Edit:
    at = source.span(statement)[0]
    return Edit(at, at, line + source.newline)


def _last_code_end(source: Source, statement: cst.CSTNode) -> int:
    last = max((source.span(n)[1] for n in walk(statement) if isinstance(n, cst.SimpleStatementLine)), default=0)
    return source.line_at(max(last - 1, 0))[1]


def _import_statements(body: object) -> list[cst.SimpleStatementLine]:
    """Import statements at the top level; also those under a top-level `try:`."""
    found: list[cst.SimpleStatementLine] = []
    for statement in body if isinstance(body, (list, tuple)) else ():
        if _is_import(statement):
            found.append(statement)
        elif isinstance(statement, cst.Try):
            found += _import_statements(statement.body.body)
    return found


def _is_import(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(
        statement.body[0] if statement.body else None, (cst.Import, cst.ImportFrom)
    )


def _is_docstring(statement: cst.CSTNode) -> bool:
    return (
        isinstance(statement, cst.SimpleStatementLine)
        and isinstance(statement.body[0], cst.Expr)
        and isinstance(statement.body[0].value, (cst.SimpleString, cst.ConcatenatedString))
    )


def _imports_from(statement: cst.CSTNode, module: str) -> bool:
    return _is_import(statement) and _module_of(statement) == module


def _module_of(statement: cst.CSTNode) -> str:
    """`torch.nn` for `import torch.nn` and `from torch.nn import functional`; empty for a relative import."""
    first = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    if isinstance(first, cst.Import):
        return first.names[0].evaluated_name
    if isinstance(first, cst.ImportFrom) and first.module is not None and not first.relative:
        return cst.Module([]).code_for_node(first.module)
    return ""


def _is_third_party(statement: cst.CSTNode, own_modules: set[str]) -> bool:
    top = _module_of(statement).split(".")[0]
    return bool(top) and top not in sys.stdlib_module_names and top not in own_modules


def _comment_above(statement: cst.SimpleStatementLine) -> bool:
    return any(line.comment is not None for line in statement.leading_lines)


def _binds(module: cst.Module, name: str) -> bool:
    """Whether the file gives `name` a meaning of its own anywhere."""
    return any(name in _bound_by(node) for node in walk(module))


def _bound_by(node: cst.CSTNode) -> set[str]:
    """The names that this very node binds."""
    if isinstance(node, (cst.FunctionDef, cst.ClassDef, cst.Param)):
        return {node.name.value}
    if isinstance(node, (cst.AssignTarget, cst.AnnAssign, cst.AugAssign, cst.For, cst.NamedExpr)):
        return {name for name, _ in target_names(node.target)}
    if isinstance(node, cst.AsName):
        return {name for name, _ in target_names(node.name)}
    if isinstance(node, cst.ImportAlias) and node.asname is None:
        return {node.evaluated_name.split(".")[0]}
    return set()
