"""Whole lines of a file, parsed by LibCST by themselves, and what of them an edit leaves as it was.

Of an edited function only the statements that are not the same are parsed again: of a compound one, its head, and the
same way what stands in it. The trees of all others serve once more, in a tree that is proven to print as the new text.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import libcst as cst

from chipmunk.rewrite.spans import Kept, Printed

Lines = Callable[[ast.stmt], tuple[int, int]]
"""Where the lines of a statement start and end."""
_Body = cst.FunctionDef | cst.For | cst.While | cst.With | cst.If
_BODIES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.If)


class Part:
    """Whole lines of a file, parsed by themselves. Raises cst.ParserSyntaxError."""

    def __init__(self, text: bytes, head: bytes) -> None:
        """`head`: a line that makes an indented definition a file."""
        self.text = text
        self.head = head
        self.module = parse((head + text).decode("utf-8"))

    @property
    def statements(self) -> Sequence[cst.BaseStatement]:
        if not self.head:
            return self.module.body
        return _block(self.module.body[0]).body

    @cached_property
    def printed(self) -> Printed:
        return Printed(self.module)

    @cached_property
    def survives(self) -> bool:
        """Whether the tree, printed again, is the text."""
        return self.printed.text.encode("utf-8") == self.head + self.text

    @classmethod
    def mended(cls, before: Part, old: Written, new: Written) -> Part | None:
        """The part after an edit inside its function; None where that is better parsed as a whole."""
        if not _share(old, new):
            return None
        mending = _Mending(before.printed, new.newline)
        try:
            statement, outline = mending.statement(before.statements[0], old, new, [""] if before.head else [])
        except (_Misfit, cst.ParserSyntaxError):  # what is no Python is told by parsing all of it, with the right line
            return None
        found = cls.__new__(cls)
        found.text, found.head = new.text, before.head
        found.module, skeleton = (_around(before, inner) for inner in (statement, outline))
        # Every statement that is kept prints as it did, which the skeleton takes for granted, if it stands as deep.
        if mending.kept == 0 or Printed(skeleton).text.encode("utf-8") != found.head + found.text:
            return None
        found.survives = True
        return found


@dataclass(frozen=True)
class Written:
    """A statement and its lines in a file's text."""

    node: ast.stmt
    source: bytes
    lines: Lines
    newline: str
    start: int

    @property
    def end(self) -> int:
        return self.lines(self.node)[1]

    @property
    def text(self) -> bytes:
        """Its lines, and those of the comments above it."""
        return self.source[self.start : self.end]

    @property
    def body(self) -> list[Written] | None:
        """The statements in it; None if there is more than one block, or two of them share a line."""
        if not isinstance(self.node, _BODIES) or getattr(self.node, "orelse", None):
            return None
        at = self._head_end
        found: list[Written] = []
        for statement in self.node.body:
            if self.lines(statement)[0] < at:
                return None
            found.append(Written(statement, self.source, self.lines, self.newline, at))
            at = found[-1].end
        return found

    @property
    def head(self) -> bytes:
        """The lines before its block."""
        return self.source[self.start : self._head_end]

    @property
    def _head_end(self) -> int:
        assert isinstance(self.node, _BODIES)
        end = self.lines(self.node.body[0])[0]
        lines = self.source[self.start : end].splitlines(keepends=True)
        while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith(b"#")):
            end -= len(lines.pop())
        return end

    @property
    def margin(self) -> str:
        """The white space before it."""
        line = self.source[self.lines(self.node)[0] : self.end]
        return line[: len(line) - len(line.lstrip(b" \t"))].decode()


class _Misfit(Exception):
    """The statement cannot be put together from parts."""


class _Mending:
    def __init__(self, printed: Printed, newline: str) -> None:
        self._printed = printed
        self._newline = newline
        self.kept = 0

    def statement(
        self, tree: cst.BaseStatement, old: Written, new: Written, margins: list[str]
    ) -> tuple[cst.BaseStatement, cst.BaseStatement]:
        """The tree of an edited statement, and the same with what is kept of the old tree as text.

        margins: the white space before each statement around it.
        """
        inside, before = new.body, old.body
        if inside is None or before is None or type(new.node) is not type(old.node):
            return self._parsed(new.text, margins)
        head = outline = tree
        if old.head != new.head:
            text = new.head + f"{inside[0].margin}pass{self._newline}".encode()
            head, _ = self._parsed(text, margins)
            outline = head
        block, trees = _block(head), _block(tree)
        if len(trees.body) != len(before):
            raise _Misfit
        known: dict[bytes, list[tuple[Written, cst.BaseStatement]]] = {}
        for written, part in zip(before, trees.body, strict=True):
            assert isinstance(part, cst.BaseStatement)
            known.setdefault(written.text, []).append((written, part))
        same = [known[each.text].pop(0)[1] if known.get(each.text) else None for each in inside]
        rest = sorted((left for found in known.values() for left in found), key=lambda left: left[0].start)
        matched = len(rest) == same.count(None)
        found: list[cst.BaseStatement] = []
        texts: list[cst.BaseStatement] = []
        for each, kept in zip(inside, same, strict=True):
            if kept is not None:
                self.kept += 1
                pair: tuple[cst.BaseStatement, cst.BaseStatement] = kept, Kept(*self._printed.whole(kept))
            elif matched:
                written, part = rest.pop(0)
                pair = self.statement(part, written, each, [*margins, new.margin])
            else:
                pair = self._parsed(each.text, [*margins, new.margin])
            found.append(pair[0])
            texts.append(pair[1])
        changed = {"indent": trees.indent, "footer": trees.footer}
        return (
            head.with_changes(body=block.with_changes(body=found, **changed)),
            outline.with_changes(body=block.with_changes(body=texts, **changed)),
        )

    def _parsed(self, text: bytes, margins: list[str]) -> tuple[cst.BaseStatement, cst.BaseStatement]:
        """As deep as it stands in the function, so that what is the file's own indentation is so in every part."""
        module = parse("".join(f"{margin}if 1:{self._newline}" for margin in margins) + text.decode("utf-8"))
        body: Sequence[cst.BaseStatement | cst.BaseSmallStatement] = module.body
        for _ in margins:
            body = _block(body[0]).body
        if len(body) != 1 or not isinstance(body[0], cst.BaseStatement):
            raise _Misfit
        return body[0], body[0]


def _share(old: Written, new: Written) -> bool:
    """Whether any statement in one is in the other as it was: else there is nothing to keep."""
    before, inside = old.body or [], new.body or []
    if not {each.text for each in before}.isdisjoint({each.text for each in inside}):
        return True
    return len(before) == len(inside) and any(_share(*pair) for pair in zip(before, inside, strict=True))


def _around(before: Part, statement: cst.BaseStatement) -> cst.Module:
    """The file that stands for a part, with another statement in it."""
    if before.head:
        outer = before.module.body[0]
        statement = outer.with_changes(body=_block(outer).with_changes(body=[statement]))
    return before.module.with_changes(body=[statement])


def _block(node: cst.CSTNode) -> cst.IndentedBlock:
    body = getattr(node, "body", None)
    if not isinstance(body, cst.IndentedBlock):
        raise _Misfit
    return body


def parse(text: str) -> cst.Module:
    return cst.parse_module(text)
