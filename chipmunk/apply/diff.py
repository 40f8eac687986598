"""Unified diffs, exact to the byte, as `git apply` takes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from chipmunk.apply.merge import Edit, Lines, line_edits, split_lines
from chipmunk.rewrite.plan import FileChange

_CONTEXT = 3
_NO_NEWLINE = b"\n\\ No newline at end of file\n"
_ESCAPES = {7: b"\\a", 8: b"\\b", 9: b"\\t", 10: b"\\n", 11: b"\\v", 12: b"\\f", 13: b"\\r", 34: b'\\"', 92: b"\\\\"}


def unified(changes: Iterable[FileChange]) -> bytes:
    """One git-style diff of all changes, sorted by path; empty if nothing differs."""
    return b"".join(
        _file_diff(change) for change in sorted(changes, key=lambda c: c.path) if change.before != change.after
    )


def changed_lines(change: FileChange) -> tuple[int, int]:
    """How many lines a change adds and removes."""
    found = line_edits(change.before, change.after)
    return sum(e.new_stop - e.new_start for e in found), sum(e.stop - e.start for e in found)


def _file_diff(change: FileChange) -> bytes:
    old, new = split_lines(change.before), split_lines(change.after)
    a, b = _name(b"a/", change.path), _name(b"b/", change.path)
    # git ends a name that holds a space with a tab, so that it cannot be taken for a name and a date
    end = b"\t\n" if b" " in a and not a.startswith(b'"') else b"\n"
    parts = [b"diff --git " + a + b" " + b + b"\n", b"--- " + a + end, b"+++ " + b + end]
    for group in _groups(line_edits(change.before, change.after)):
        parts += _hunk(old, new, group)
    return b"".join(parts)


def _groups(found: Sequence[Edit]) -> Iterator[list[Edit]]:
    """Edits whose contexts touch share a hunk."""
    group: list[Edit] = []
    for edit in found:
        if group and edit.start - group[-1].stop > 2 * _CONTEXT:
            yield group
            group = []
        group.append(edit)
    if group:
        yield group


def _hunk(old: Lines, new: Lines, group: list[Edit]) -> Iterator[bytes]:
    start, stop = max(group[0].start - _CONTEXT, 0), min(group[-1].stop + _CONTEXT, len(old))
    new_start = group[0].new_start - (group[0].start - start)
    new_stop = group[-1].new_stop + (stop - group[-1].stop)
    yield b"@@ -%s +%s @@\n" % (_range(start, stop), _range(new_start, new_stop))
    position = start
    for edit in group:
        yield from (_line(b" ", line) for line in old[position : edit.start])
        yield from (_line(b"-", line) for line in old[edit.start : edit.stop])
        yield from (_line(b"+", line) for line in new[edit.new_start : edit.new_stop])
        position = edit.stop
    yield from (_line(b" ", line) for line in old[position:stop])


def _range(start: int, stop: int) -> bytes:
    if stop - start == 1:
        return b"%d" % (start + 1)
    return b"%d,%d" % (start + (stop > start), stop - start)


def _line(sign: bytes, line: bytes) -> bytes:
    return sign + line if line.endswith(b"\n") else sign + line + _NO_NEWLINE


def _name(prefix: bytes, path: str) -> bytes:
    raw = prefix + os.fsencode(path)
    if all(32 <= c < 127 and c not in b'"\\' for c in raw):
        return raw
    return b'"' + b"".join(_ESCAPES.get(c) or (bytes([c]) if 32 <= c < 127 else b"\\%03o" % c) for c in raw) + b'"'
