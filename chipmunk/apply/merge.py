"""Three-way merge of files by lines.

Own code rather than `git merge-file`, so that the same repository reverts the same way on a machine without git, and
on bytes that git takes for binary; the tests hold it against `git merge-file`. It is conservative: two edits of the
same line, and two insertions at the same place, overlap unless they are equal.
"""

from __future__ import annotations

import ast
import difflib
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Lines = list[bytes]
_TOKEN = re.compile(
    rb'''"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*|\w+|[^\w\s]''',
    re.DOTALL,
)
_NAME = re.compile(rb"(?!(?:%s)$)[^\W\d]\w*" % "|".join(keyword.kwlist).encode())
_EXACT_UP_TO = 4000
"""Lines that differ in the middle of two files, above which difflib may ignore very frequent lines."""


@dataclass(frozen=True)
class Edit:
    """Lines `start` to `stop` (0-based, half-open) of the base are replaced by lines `new_start` to `new_stop`."""

    start: int
    stop: int
    new_start: int
    new_stop: int


@dataclass(frozen=True)
class Merged:
    """Outcome of a merge."""

    data: bytes | None
    """The merged bytes, None if edits overlap."""
    overlaps: tuple[int, ...] = ()
    """1-based lines of `ours` where edits overlap."""


def split_lines(data: bytes) -> Lines:
    """Lines with their ends. Only a line feed ends a line, as in git; a carriage return is part of the line."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]] + ([last] if (last := data.rpartition(b"\n")[2]) else [])


def edits(base: Sequence[bytes], new: Sequence[bytes]) -> list[Edit]:
    """What turns `base` into `new`, in order, with at least one common line between any two edits."""
    head = 0
    while head < min(len(base), len(new)) and base[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(base), len(new)) - head and base[-1 - tail] == new[-1 - tail]:
        tail += 1
    a, b = base[head : len(base) - tail], new[head : len(new) - tail]
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=max(len(a), len(b)) > _EXACT_UP_TO)
    return [
        Edit(head + i1, head + i2, head + j1, head + j2)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes()
        if tag != "equal"
    ]


@lru_cache(maxsize=256)
def line_edits(before: bytes, after: bytes) -> tuple[Edit, ...]:
    """What turns the lines of one text into those of another; a change is counted, shown and written."""
    return tuple(edits(split_lines(before), split_lines(after)))


def merge(base: bytes, ours: bytes, theirs: bytes, same: Callable[[bytes, bytes], bool] | None = None) -> Merged:
    """Apply to `base` both what leads to `ours` and what leads to `theirs`.

    Where the two overlap, and what `ours` makes of the lines is the `same` as they were in `base`, `theirs` wins.
    """
    if ours == theirs or theirs == base:
        return Merged(ours)
    if ours == base:
        return Merged(theirs)
    old, mine, yours = split_lines(base), split_lines(ours), split_lines(theirs)
    result: Lines = []
    overlaps: list[int] = []
    done = 0
    for start, stop, my_edits, your_edits in _clusters(edits(old, mine), edits(old, yours)):
        result += old[done:start]
        done = stop
        my_text, your_text = _replay(old, mine, my_edits, start, stop), _replay(old, yours, your_edits, start, stop)
        if not your_edits or my_text == your_text:
            result += my_text
        elif not my_edits or (same is not None and same(b"".join(old[start:stop]), b"".join(my_text))):
            result += your_text
        else:
            overlaps.append(my_edits[0].new_start + 1)
    result += old[done:]
    if overlaps:
        return Merged(None, tuple(overlaps))
    if any(not line.endswith(b"\n") for line in result[:-1]):  # a final line without its newline is no longer final
        return Merged(None, (len(mine),))
    return Merged(b"".join(result))


def merge_python(base: bytes, ours: bytes, theirs: bytes) -> Merged:
    """`merge` for Python: what a formatter did to the lines that `theirs` replaces does not count as an edit of them,
    and if `ours` and `theirs` are valid Python, so must the result be. Where lines cannot be told apart in a file that
    nothing but a formatter has changed, the result is `theirs`.
    """
    merged = merge(base, ours, theirs, same_code)
    if merged.data is None and same_program(base, ours):
        return Merged(theirs)
    if merged.data is None or merged.data in (ours, theirs):
        return merged
    line = _syntax_error(merged.data)
    if line is None or _syntax_error(ours) is not None or _syntax_error(theirs) is not None:
        return merged
    return Merged(None, (map_line(merged.data, ours, line),))


def same_code(one: bytes, other: bytes) -> bool:
    """Whether two pieces of Python differ only as a formatter makes them differ: in spaces and line breaks (though not
    in the first line's indentation), in a comma before a closing bracket that means nothing, and in the kind of quotes.
    """
    return _indentation(one) == _indentation(other) and _tokens(one) == _tokens(other)


def same_program(one: bytes, other: bytes) -> bool:
    """Whether two files have the same syntax tree and the same comments in the same order: only the layout differs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return same and _comments(one) == _comments(other)


def _comments(source: bytes) -> list[str]:
    found = tokenize.tokenize(io.BytesIO(source).readline)
    return [token.string.lstrip("# ").rstrip() for token in found if token.type == tokenize.COMMENT]


def map_line(old: bytes, new: bytes, line: int) -> int:
    """The line of `new` (1-based) that corresponds to a line of `old`; for a changed line, the one most like it."""
    index = line - 1
    shift = 0
    old_lines, new_lines = split_lines(old), split_lines(new)
    for edit in edits(old_lines, new_lines):
        if index < edit.start:
            break
        if index < edit.stop:
            changed = range(edit.new_start, edit.new_stop) or [min(edit.new_start, max(len(new_lines) - 1, 0))]
            return max(changed, key=lambda at: _likeness(old_lines[index], new_lines[at : at + 1])) + 1
        shift = edit.new_stop - edit.stop
    return index + shift + 1


def _tokens(source: bytes) -> list[bytes]:
    """Strings, comments, words and signs; works on any piece of a file, as the standard tokenizer does not."""
    found: list[bytes] = []
    opened: list[tuple[bool, int]] = []  # for each open bracket: whether one comma means nothing in it; commas so far
    for token in _TOKEN.findall(source):
        if token in b"([{":
            after_value = bool(found) and (found[-1] in b")]" or _NAME.fullmatch(found[-1]) is not None)
            opened.append((token == b"{" or after_value == (token == b"("), 0))
        elif token == b"," and opened:
            opened[-1] = (opened[-1][0], opened[-1][1] + 1)
        elif token in b")]}" and opened:
            free, commas = opened.pop()
            if found[-1] == b"," and (free or commas > 1):
                del found[-1]
        plain = token[-1:] in b"\"'" and not any(sign in token[1:-1] for sign in b"\"'\\")
        found.append(token.replace(b"'", b'"') if plain else token.rstrip())
    return found


def _indentation(source: bytes) -> bytes:
    first = source.lstrip(b"\r\n")
    return first[: len(first) - len(first.lstrip())]


def _likeness(line: bytes, others: Lines) -> float:
    return max((difflib.SequenceMatcher(None, line, other).ratio() for other in others), default=0.0)


def _clusters(mine: list[Edit], yours: list[Edit]) -> list[tuple[int, int, list[Edit], list[Edit]]]:
    """Edits of both sides, in order, those that overlap taken together, with the lines of the base that they span."""
    clusters: list[tuple[int, int, list[Edit], list[Edit]]] = []
    both = sorted(
        [(e.start, e.stop, 0, e) for e in mine] + [(e.start, e.stop, 1, e) for e in yours], key=lambda t: t[:3]
    )
    for start, stop, side, edit in both:
        if clusters:
            first, last, *sides = clusters[-1]
            same_place = start == stop == first == last
            if start < last or same_place:
                sides[side].append(edit)
                clusters[-1] = (first, max(last, stop), sides[0], sides[1])
                continue
        clusters.append((start, stop, [] if side else [edit], [edit] if side else []))
    return clusters


def _replay(base: Lines, new: Lines, some: list[Edit], start: int, stop: int) -> Lines:
    """Lines `start` to `stop` of the base, with some edits made."""
    result: Lines = []
    for edit in some:
        result += base[start : edit.start] + new[edit.new_start : edit.new_stop]
        start = edit.stop
    return result + base[start:stop]


def _syntax_error(source: bytes) -> int | None:
    """Line of the first syntax error, None if there is none. Parses only; nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None
