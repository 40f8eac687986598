"""Edited statements that have become too long are broken into lines as a formatter would: as Black and Ruff do.

Only statements that the edits touch, and only where the statement as it was is laid out that way: then the file is
formatted, and stays so. A statement with a comment, a string over several lines or a comma after its last argument
(which keeps arguments on lines of their own) is left as the edits make it.
"""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

from chipmunk.rewrite.source import Edit, Source

_LIMITS = (120, 119, 110, 100, 88)
_OPENING, _CLOSING = "([{", ")]}"
_UNFIT = re.compile(r"#|;|\\|\"\"\"|'''|\b[bru]?f[r]?[\"']|,\s*[)\]}]|\t|\blambda\b", re.IGNORECASE)
_STRING = re.compile(r"[\"'][^\"']{20,}")
"""What no formatter breaks, however long the line."""
_SUM, _PRODUCT = ("+", "-"), ("*", "/", "//", "%", "@")
_OTHERS = {
    "and",
    "or",
    "not",
    "if",
    "in",
    "is",
    "for",
    "await",
    "yield",
    "<",
    ">",
    "==",
    "!=",
    "<=",
    ">=",
    "|",
    "&",
    "^",
}
_INDENT = "    "


def laid_out(source: Source, edits: Collection[Edit], limit: int) -> set[Edit]:
    """The edits, those of a statement that is to be laid out anew as one. limit: the longest line of the file."""
    found = set(edits)
    by_statement: dict[tuple[int, int], list[Edit]] = {}
    for edit in edits:
        span = None if edit.text.endswith("\n") else _statement_at(source, edit)
        if span is not None:
            by_statement.setdefault(span, []).append(edit)
    for (start, end), touching in by_statement.items():
        before = source.text[start:end].decode("utf-8")
        after = _after(before, start, touching)
        if after is None or ("\n" not in before and "\n" not in after and len(after) <= limit):
            continue
        meaning = _meaning(after)
        new = _laid_out(after, limit) if meaning is not None and _laid_out(before, limit) == before else None
        if new is not None and new != after and _meaning(new) == meaning:
            found -= set(touching)
            found.add(Edit(start, end, new))
    return found


Bounds = tuple[float, float]
"""The longest line of a file's statements, and the shortest statement on several lines, had it been on one."""


def limit_of(own: Bounds, others: Iterable[Bounds] = ()) -> int:
    """The longest line that a formatter would leave in this file; 0 if none seems to have been at work.

    It has joined whatever fits on one line, and no other lines are longer. What this file leaves open, `others` may
    tell.
    """
    longest, shortest = own
    for more, less in others:
        if _limit(max(longest, more), min(shortest, less)):
            longest, shortest = max(longest, more), min(shortest, less)
    return _limit(longest, shortest)


def _limit(longest: float, shortest: float) -> int:
    return next((limit for limit in _LIMITS if longest <= limit < shortest), 0)


def bounds_of(source: Source) -> Bounds:
    """What a file tells of the longest line that its formatter leaves."""
    longest, shortest = 0.0, math.inf
    for start, end in _simple_statements(source):
        if end - start <= longest and b"\n" not in source.text[start:end]:
            continue  # tells nothing
        text = source.text[start:end].decode("utf-8")
        if _UNFIT.search(text):
            continue
        longest = max([longest, *(len(line) for line in text.split("\n") if not _STRING.search(line))])
        if "\n" in text:
            shortest = min(shortest, len(_flat(text)))
    return longest, shortest


def _after(before: str, start: int, edits: list[Edit]) -> str | None:
    """The statement after the edits; None where they overlap."""
    text, pieces, at = before.encode("utf-8"), [], 0
    for edit in sorted(edits):
        if edit.start - start < at:
            return None
        pieces += [text[at : edit.start - start], edit.text.encode("utf-8")]
        at = edit.end - start
    return b"".join([*pieces, text[at:]]).decode("utf-8")


def _meaning(text: str) -> str | None:
    """What the text of a statement, or of a compound one's head, says; None for several statements."""
    code = text.lstrip()
    try:
        found = ast.parse(code + " pass" if code.endswith(":") else code).body
    except SyntaxError:
        return None
    return ast.dump(found[0]) if len(found) == 1 else None


# Statements


def _statement_at(source: Source, edit: Edit) -> tuple[int, int] | None:
    """The simple statement around an edit, or the head of a compound one: whole lines without the last line's end."""
    body: list[ast.stmt] = source.outline.body
    while True:
        for statement in body:
            start, end = source.lines(statement)
            if start <= edit.start < end:
                break
        else:
            return None
        inner = _bodies(statement)
        if not inner:
            return _whole(source, start, end, edit)
        first = source.lines(inner[0])[0]
        if edit.start < first:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                start = source.line_start(statement.lineno)
            return _whole(source, start, first, edit) if start <= edit.start else None
        body = inner


def _whole(source: Source, start: int, end: int, edit: Edit) -> tuple[int, int] | None:
    end = start + len(source.text[start:end].rstrip())
    return (start, end) if edit.end <= end else None


def _bodies(statement: ast.stmt) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for part in getattr(statement, name, ()):
            found += [part] if isinstance(part, ast.stmt) else part.body
    return found


def _simple_statements(source: Source) -> Iterator[tuple[int, int]]:
    pending: list[ast.stmt] = list(source.outline.body)
    while pending:
        statement = pending.pop()
        inner = _bodies(statement)
        pending += inner
        if not inner and not isinstance(statement, (ast.Import, ast.ImportFrom)):
            start, end = source.lines(statement)
            yield start, start + len(source.text[start:end].rstrip())


# Lines


def _laid_out(text: str, limit: int) -> str | None:
    """The statement in as few lines as a formatter makes of it; None if that is not known."""
    if _UNFIT.search(text) or "\r" in text:
        return None
    flat = _flat(text)
    indent = flat[: len(flat) - len(flat.lstrip())]
    lines = _broken(flat.lstrip(), indent, limit)
    return None if lines is None else "\n".join(lines)


def _flat(text: str) -> str:
    """The statement on one line."""
    first, *rest = text.split("\n")
    flat = first.rstrip()
    for line in rest:
        stripped = line.strip()
        glued = flat.endswith(tuple(_OPENING)) or stripped.startswith(tuple(_CLOSING))
        flat += stripped if glued else " " + stripped
    return flat


def _broken(text: str, indent: str, limit: int) -> list[str] | None:
    """One line, or a head that ends with a bracket, what is inside on lines of its own, and the rest."""
    if len(indent) + len(text) <= limit:
        return [indent + text]
    place = _place(text, limit - len(indent))
    if place is None:
        return None
    opened, closed = place
    inside, inner = text[opened + 1 : closed].strip(), indent + _INDENT
    if not inside or len(indent) + len(text[closed:]) > limit:
        return None
    lines, parts = [inner + inside], _separated(inside)
    is_display = re.search(r"[\w)\]]\Z", text[:opened]) is None and len(parts) > 1  # a list, say, one element a line
    if len(lines[0]) > limit or is_display:
        if len(parts) < 2:
            return None
        lines = []
        for part in parts:
            broken = _broken(part + ",", inner, limit)
            if broken is None:
                return None
            lines += broken
    return [indent + text[: opened + 1], *lines, indent + text[closed:]]


def _place(text: str, room: int) -> tuple[int, int] | None:
    """The brackets to break at: a signature's, or the last ones whose head fits, but for calls of methods behind."""
    tokens = _tokens(text)
    if tokens is None:
        return None
    pairs = _pairs(tokens)
    if text.startswith(("def ", "async def ", "class ")):
        return pairs[0] if pairs else None
    if not pairs or not _is_plain(tokens):
        return None
    behind = len(text)
    for opened, closed in reversed(pairs):
        if re.fullmatch(r"[:,]?" if behind == len(text) else r"(\.\w+)*", text[closed + 1 : behind]) is None:
            return None
        if opened + 1 <= room:
            return opened, closed
        behind = opened
    return None


def _tokens(text: str) -> list[tuple[str, int, int]] | None:
    """Each token with its place and how many brackets it is in."""
    found, depth = [], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.start[0] == 1 and token.string.strip():
                depth -= token.string in _CLOSING
                found.append((token.string, token.start[1], depth))
                depth += token.string in _OPENING
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return None
    return found


def _pairs(tokens: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """The outermost brackets."""
    opened = [place for string, place, depth in tokens if depth == 0 and string in _OPENING]
    closed = [place for string, place, depth in tokens if depth == 0 and string in _CLOSING]
    return list(zip(opened, closed, strict=True))


def _is_plain(tokens: list[tuple[str, int, int]]) -> bool:
    """Whether a formatter would not rather put the whole value into parentheses."""
    outer = [string for string, _, depth in tokens if depth == 0]
    equals = [place for place, string in enumerate(outer) if string == "="]
    value = outer[equals[-1] + 1 :] if equals else outer
    value = value[1:] if value[:1] == ["return"] else value
    if value[:1] == ["for"]:
        value = value[value.index("in") + 1 :] if "in" in value else value
    value = value[:-1] if value[-1:] in ([","], [":"]) else value
    if _OTHERS.intersection(value) or "," in value:
        return False
    sums = sum(string in _SUM for string in value)
    return sums < 2 and (sums == 1 or sum(string in _PRODUCT for string in value) < 2)


def _separated(text: str) -> list[str]:
    """What commas outside of brackets separate."""
    tokens = _tokens(text) or []
    cuts = [-1, *(place for string, place, depth in tokens if string == "," and depth == 0), len(text)]
    return [text[start + 1 : end].strip() for start, end in pairwise(cuts)]
