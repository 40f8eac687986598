"""One Python file: its outline, the trees of those parts of it that are asked for, and edits spliced into its text.

Building a LibCST tree takes seven times as long as the standard library's `ast`, and of a large repository few
functions matter. So `ast` tells where things stand in a file, and LibCST parses single functions and statements, each
when it is first asked for. Nothing is printed again from a tree: all that is not edited stays as it was, to the byte.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import warnings
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import libcst as cst

from chipmunk.rewrite import positions
from chipmunk.rewrite.parts import Part, Written

Node = cst.CSTNode | ast.expr | ast.stmt
"""What has a place in the text: of a tree that was asked for, or of the outline."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NEWLINE = re.compile(rb"\r\n?|\n")


class SourceError(Exception):
    """A file that cannot be read as Python, or would not survive being written again. `step`: `parse` or `read`."""

    def __init__(self, path: str, step: str, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.path = path
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
    """A file of the repository. Raises SourceError where it cannot be parsed; so does asking for a part of it."""

    def __init__(self, path: str, content: bytes, before: Source | None = None) -> None:
        """`before`: the file before an edit, whose parts serve again where their text is the same."""
        self.path = path
        self.content = content
        try:
            self._encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
            text = content.decode(self._encoding)
        except (UnicodeDecodeError, LookupError, SyntaxError) as error:
            raise SourceError(path, "read", f"its text cannot be decoded: {error}") from error
        self.text = text.encode("utf-8")
        """What spans count in: the file's text as UTF-8 without a byte order mark."""
        self.outline = self._outline(text)
        self._parts: dict[int, Part] = {}
        """By the byte at which they start."""
        self._before: dict[bytes, Part] = {}
        self._edited: dict[str, list[tuple[Part, Written]]] = {}
        """Functions before the edit, by name."""
        if before is not None:
            self._before = {part.text: part for part in before._parts.values()}
            for name, part, written in before._functions():
                if part.text not in self.text:
                    self._edited.setdefault(name, []).append((part, written))

    def _outline(self, text: str) -> ast.Module:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the file's own, about escapes in its strings, say
                return ast.parse(text)
        except SyntaxError as error:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            reason = f"Python {version}, which chipmunk runs on, cannot read it: {error.msg}"
            raise SourceError(self.path, "parse", reason, error.lineno or 1) from error
        except ValueError as error:
            raise SourceError(self.path, "parse", f"it is not valid Python: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise SourceError(self.path, "parse", "its expressions are nested too deeply") from error

    # Parts

    def definition(self, outline: Definition) -> cst.FunctionDef | cst.ClassDef:
        """The tree of a function or class of the outline."""
        start, end = self.lines(outline)
        head = f"if 1:{self.newline}".encode() if self.text[start : start + 1] in (b" ", b"\t") else b""
        found = self._part(start, end, head, outline).statements[0]
        assert isinstance(found, (cst.FunctionDef, cst.ClassDef))
        return found

    def text_of(self, outline: Definition) -> bytes:
        """The lines of a function or class of the outline."""
        start, end = self.lines(outline)
        return self.text[start:end]

    @cached_property
    def statements(self) -> list[_Statement]:
        """The trees of all statements at the top level but functions and classes."""
        return [statement for start, end in self._plain for statement in self._part(start, end).module.body]

    @cached_property
    def plain_text(self) -> bytes:
        """The lines at the top level around functions and classes."""
        return b"".join(self.text[start:end] for start, end in self._plain)

    @cached_property
    def _plain(self) -> list[tuple[int, int]]:
        """From where to where there are statements that are neither functions nor classes."""
        found: list[tuple[int, int]] = []
        at, goes_on = 0, False
        for statement in self.outline.body:
            end = self.lines(statement)[1]
            is_plain = not isinstance(statement, _DEFINITIONS)
            if is_plain and goes_on:
                found[-1] = (found[-1][0], end)
            elif is_plain:
                found.append((at, end))
            at, goes_on = end, is_plain
        return found

    def line_start(self, line: int) -> int:
        """Where a line, counted from 1, starts."""
        return self._rows[line - 1]

    def lines(self, statement: ast.stmt) -> tuple[int, int]:
        """Where the lines of a statement start and end."""
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        if isinstance(statement, _DEFINITIONS) and statement.decorator_list:
            first = min(first, *(decorator.lineno for decorator in statement.decorator_list))
        ends = self._rows
        return ends[first - 1], ends[last] if last < len(ends) else len(self.text)

    def has_comment_above(self, statement: ast.stmt) -> bool:
        """Whether a comment stands between the statement and the one before it."""
        start = self.lines(statement)[0]
        before = [end for other in self.outline.body if (end := self.lines(other)[1]) <= start]
        return bool(before) and b"#" in self.text[max(before) : start]

    def _functions(self) -> Iterator[tuple[str, Part, Written]]:
        """The functions and methods whose trees were asked for."""
        classes = (statement for statement in self.outline.body if isinstance(statement, ast.ClassDef))
        for outline in (*self.outline.body, *(statement for owner in classes for statement in owner.body)):
            if isinstance(outline, (ast.FunctionDef, ast.AsyncFunctionDef)):
                part = self._parts.get(self.lines(outline)[0])
                if part is not None:
                    yield outline.name, part, self._written(outline)

    def _written(self, outline: Definition) -> Written:
        return Written(outline, self.text, self.lines, self.newline, self.lines(outline)[0])

    def _mended(self, outline: Definition, head: bytes) -> Part | None:
        """An edited function of which only what was edited is parsed; None where that is not possible."""
        if not isinstance(outline, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return None
        new = self._written(outline)
        texts = {each.text for each in new.body or ()}
        known = [pair for pair in self._edited.get(outline.name, ()) if pair[0].head == head and pair[0].survives]
        if not known:
            return None
        before, old = max(known, key=lambda pair: len(texts & {each.text for each in pair[1].body or ()}))
        found = Part.mended(before, old, new)
        if found is not None:
            self._edited[outline.name].remove((before, old))  # no two functions share a tree
        return found

    def _part(self, start: int, end: int, head: bytes = b"", outline: Definition | None = None) -> Part:
        if start not in self._parts:
            text = self.text[start:end]
            try:
                # taken out: of two functions with the same text, each has its own tree
                found = self._before.pop(text, None)
                if found is None and outline is not None and self._edited:
                    found = self._mended(outline, head)
                self._parts[start] = found or Part(text, head)
            except cst.ParserSyntaxError as error:
                line = bisect_right(self._rows, start) + error.raw_line - (2 if head else 1)
                raise SourceError(self.path, "parse", f"LibCST cannot parse it: {error.message}", line) from error
            except RecursionError as error:
                raise SourceError(self.path, "parse", "its expressions are nested too deeply") from error
        return self._parts[start]

    def survives(self) -> bool:
        """Whether the trees, printed again, are the file: only then do the spans hold, and may the file be edited."""
        return all(part.survives for part in self._parts.values())

    # Places

    @cached_property
    def newline(self) -> str:
        """The file's first line end."""
        found = _NEWLINE.search(self.text)
        return found[0].decode() if found is not None else "\n"

    @cached_property
    def _rows(self) -> list[int]:
        """Where lines start, as Python counts them: a single carriage return ends one too."""
        if b"\r" not in self.text:
            return self._line_starts
        return [0, *(found.end() for found in _NEWLINE.finditer(self.text))]

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *accumulate(len(line) + 1 for line in self.text.split(b"\n")[:-1])]

    def _printed_span(self, node: cst.CSTNode) -> tuple[int, int]:
        for at, part in self._parts.items():
            if node in part.printed:
                start, end = part.printed.span(node)
                return at + start - len(part.head), at + end - len(part.head)
        raise KeyError(node)

    def span(self, node: Node) -> tuple[int, int]:
        """Where the node stands, with its parentheses, without the white space around it."""
        if isinstance(node, (ast.expr, ast.stmt)):
            return positions.span(node, self.text, self.line_start)
        start, end = self._printed_span(node)
        if isinstance(node, cst.Arg):  # LibCST counts the comma in
            end = self.span(node.value)[1]
        if isinstance(node, cst.Param):
            end = self.span(node.default or node.annotation or node.name)[1]
        if isinstance(node, cst.BaseExpression) and node.lpar:
            start, end = self._printed_span(node.lpar[0])[0], self._printed_span(node.rpar[-1])[1]
        return start, end

    def line(self, node: Node) -> int:
        """The line, from 1, on which the node starts."""
        return bisect_right(self._line_starts, self.span(node)[0])

    def code(self, node: Node) -> str:
        """The node's text as it stands in the file."""
        start, end = self.span(node)
        return self.text[start:end].decode("utf-8")

    def summary(self, node: Node, limit: int = 100) -> str:
        """The node's text on one line, cut at `limit` characters."""
        text = " ".join(self.code(node).split())
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def line_at(self, offset: int) -> tuple[int, int]:
        """Where the line around `offset` starts and ends, its newline left out."""
        start = self._line_starts[bisect_right(self._line_starts, offset) - 1]
        end = self.text.find(b"\n", offset)
        end = len(self.text) if end < 0 else end
        return start, end - (self.text[end - 1 : end] == b"\r")

    def indentation(self, node: Node) -> str:
        """The white space before the node on its line."""
        start = self.line_at(self.span(node)[0])[0]
        return self.text[start : self.span(node)[0]].decode("utf-8")

    def starts_line(self, node: Node) -> bool:
        """Whether only white space stands before the node on its line."""
        return not self.indentation(node).strip()

    def apply(self, edits: Collection[Edit]) -> bytes:
        """The file's bytes after the edits, in its own encoding. Raises OverlapError if two of them touch."""
        return self._spliced(edits).decode("utf-8").encode(self._encoding)

    def edited(self, edits: Collection[Edit]) -> Source:
        """The file after the edits; parts that they leave as they are, are not parsed again."""
        return Source(self.path, self.apply(edits), self)

    def _spliced(self, edits: Collection[Edit]) -> bytes:
        pieces: list[bytes] = []
        at = 0
        previous: Edit | None = None
        for edit in sorted(edits):
            if previous is not None and (edit.start < previous.end or edit.start == previous.start):
                raise OverlapError(f"{self.path}: two edits at byte {edit.start}: {previous.text!r} and {edit.text!r}")
            pieces += [self.text[at : edit.start], edit.text.encode("utf-8")]
            at, previous = edit.end, edit
        pieces.append(self.text[at:])
        return b"".join(pieces)
