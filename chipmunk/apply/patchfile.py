"""Saved patch files: read exactly, and applied to another copy of the repository, whose lines may have moved.

Own parser rather than `unidiff`, which decodes patches to text and splits lines at more than line feeds; what must come
out here is the same bytes. A hunk is applied only where every one of its lines is found exactly: never with fuzz, and
never at a guess between two places.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from chipmunk.apply.errors import Conflict, PatchInvalid, Place, quoted
from chipmunk.apply.journal import is_inside
from chipmunk.apply.merge import Lines, split_lines
from chipmunk.rewrite.plan import FileChange, Site, SiteStatus

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_NOT_TAKEN = {
    b"new file mode": "it creates a file",
    b"deleted file mode": "it deletes a file",
    b"old mode": "it changes a file's mode",
    b"rename ": "it renames a file",
    b"copy ": "it copies a file",
    b"GIT binary patch": "it is a binary patch",
    b"Binary files": "it is a binary patch",
}
_ESCAPE = re.compile(rb'\\([0-7]{3}|[abtnvfr"\\])')
_UNESCAPED = {b"a": 7, b"b": 8, b"t": 9, b"n": 10, b"v": 11, b"f": 12, b"r": 13, b'"': 34, b"\\": 92}


@dataclass(frozen=True)
class Hunk:
    """Consecutive lines before and after."""

    line: int
    """1-based line in the patch file."""
    start: int
    """0-based line in the file that the patch was made from."""
    new_start: int
    """0-based line in the file that the patch led to."""
    before: tuple[bytes, ...]
    after: tuple[bytes, ...]
    first_change: int
    """Number of unchanged lines at the start."""
    at_end: bool
    """No unchanged line follows the last change: the hunk reaches to the end of the file."""

    def reversed(self) -> Hunk:
        return replace(self, start=self.new_start, new_start=self.start, before=self.after, after=self.before)


@dataclass(frozen=True)
class FilePatch:
    """All hunks of one file."""

    path: str
    line: int
    """1-based line in the patch file."""
    hunks: tuple[Hunk, ...]


def parse(data: bytes) -> tuple[FilePatch, ...]:
    """The files of a git-style unified diff, in order. Text around the diffs is ignored.

    Raises `PatchInvalid`, with the line of the patch file, if it is malformed, does anything but change the text of
    existing files, or names a path outside the repository.
    """
    lines = split_lines(data)
    files: dict[str, FilePatch] = {}
    index = 0
    while index < len(lines):
        for start, what in _NOT_TAKEN.items():
            if lines[index].startswith(start) and _in_header(lines, index):
                raise _invalid(f"{what}, and Chipmunk's patches only change the text of existing files", index)
        if not (lines[index].startswith(b"--- ") and lines[index + 1 : index + 2] and lines[index + 1][:4] == b"+++ "):
            if _HUNK.match(lines[index]):
                raise _invalid("a hunk without the name of its file", index)
            index += 1
            continue
        at = index
        path = _path(lines, index)
        hunks: list[Hunk] = []
        index += 2
        while index < len(lines) and lines[index].startswith(b"@@ "):
            hunk, index = _hunk(lines, index)
            if hunks and hunk.start < hunks[-1].start + len(hunks[-1].before):
                raise _invalid("hunks overlap or are out of order", hunk.line - 1)
            hunks.append(hunk)
        if not hunks:
            raise _invalid("a file without a hunk", at)
        if path in files:
            raise _invalid(f"{path} appears twice", at)
        files[path] = FilePatch(path, at + 1, tuple(hunks))
    if not files:
        raise _invalid("no change in it", max(len(lines) - 1, 0))
    return tuple(files.values())


def apply_patch(root: Path, patch: bytes) -> tuple[tuple[FileChange, ...], tuple[Site, ...]]:
    """What a patch file changes in a copy of the repository, and one site a hunk. Changes nothing.

    Lines may have moved: a hunk is looked for where it should be, and then everywhere, and has to be found exactly
    once. A file that has the change already is left as it is. Raises `PatchInvalid`, and `Conflict` with every hunk
    that does not fit.
    """
    changes: list[FileChange] = []
    sites: list[Site] = []
    misfits: list[Place] = []
    for file in parse(patch):
        current = _read(root, file, misfits)
        if current is None:
            continue
        lines = split_lines(current)
        places, missed = _locate(lines, file.hunks)
        undone = tuple(hunk.reversed() for hunk in file.hunks)
        done_at, not_done = _locate(lines, undone)
        # Both may fit, if a hunk begins with its change; then the one that is closer to where the patch says is true.
        if not not_done and (missed or _moved(undone, done_at) <= _moved(file.hunks, places)):
            sites += [_site(file, hunk, at, SiteStatus.ALREADY) for hunk, at in zip(file.hunks, done_at, strict=True)]
            continue
        if missed:
            misfits += [Place(file.path, hunk.start + hunk.first_change + 1, why) for hunk, why in missed]
            continue
        result: Lines = []
        done = 0
        for hunk, at in zip(file.hunks, places, strict=True):
            result += [*lines[done:at], *hunk.after]
            done = at + len(hunk.before)
            sites.append(_site(file, hunk, at, SiteStatus.PATCHED))
        changes.append(FileChange(file.path, current, b"".join([*result, *lines[done:]])))
    if misfits:
        raise Conflict(
            "the patch does not fit this copy of the repository; nothing was changed",
            places=misfits,
            next_command=f"chipmunk patch {quoted(root)}   (plans from the code that is there)",
        )
    return tuple(changes), tuple(sites)


def _locate(lines: Lines, hunks: tuple[Hunk, ...]) -> tuple[list[int], list[tuple[Hunk, str]]]:
    """Where each hunk goes, and those that go nowhere, with the reason."""
    places: list[int] = []
    missed: list[tuple[Hunk, str]] = []
    earliest = shift = 0
    for hunk in hunks:
        expected = hunk.start + shift  # as far away as the one before
        fitting = [at for at in range(earliest, len(lines) - len(hunk.before) + 1) if _fits(lines, hunk, at)]
        if expected in fitting:
            at = expected
        elif len(fitting) == 1:
            at = fitting[0]
        else:
            found = ", ".join(str(at + 1) for at in fitting[:5])
            why = f"lines {found} would all do" if fitting else "the lines that the patch changes are not there"
            missed.append((hunk, f"{why} (line {hunk.line} of the patch)"))
            continue
        places.append(at)
        earliest, shift = at + len(hunk.before), at - hunk.start
    return places, missed


def _moved(hunks: tuple[Hunk, ...], places: list[int]) -> int:
    """How far all hunks together are from where the patch says."""
    return sum(abs(at - hunk.start) for hunk, at in zip(hunks, places, strict=True))


def _fits(lines: Lines, hunk: Hunk, at: int) -> bool:
    end = at + len(hunk.before)
    if hunk.at_end and end != len(lines):
        return False
    if not hunk.before:
        return not lines
    return lines[at] == hunk.before[0] and lines[at:end] == list(hunk.before)


def _site(file: FilePatch, hunk: Hunk, at: int, status: SiteStatus) -> Site:
    old = next((line for line in hunk.before[hunk.first_change :]), b"")
    moved = at - hunk.start
    where = (
        "where the patch says" if not moved else f"{abs(moved)} lines {'further down' if moved > 0 else 'further up'}"
    )
    reason = f"found {where}" if status is SiteStatus.PATCHED else "the change is there already"
    matched = old.decode(errors="replace").strip()
    return Site(file.path, at + hunk.first_change + 1, "apply", status, matched, reason)


def _read(root: Path, file: FilePatch, misfits: list[Place]) -> bytes | None:
    for parent in [PurePosixPath(file.path), *PurePosixPath(file.path).parents][:-1]:
        if (root / parent).is_symlink():
            raise PatchInvalid(
                "the path goes through a symbolic link; nothing was changed",
                places=[Place(file.path, None, f"{parent} is a link")],
                next_command=f"ls -l {quoted(root / parent)}",
            )
    path = root / file.path
    if not path.is_file():
        misfits.append(Place(file.path, None, "there is no such file"))
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        misfits.append(Place(file.path, None, f"the file cannot be read: {error.strerror}"))
        return None


def _hunk(lines: Lines, index: int) -> tuple[Hunk, int]:
    """The hunk whose header is line `index`, and the index after it."""
    header = _HUNK.match(lines[index])
    if header is None:
        raise _invalid("a malformed hunk header", index)
    at = index
    start, old_count, new_start, new_count = (int(number) if number is not None else 1 for number in header.groups())
    before: list[bytes] = []
    after: list[bytes] = []
    signs: list[bytes] = []
    index += 1
    while len(before) < old_count or len(after) < new_count or _is_no_newline(lines, index):
        if index >= len(lines):
            raise _invalid("the patch ends in the middle of a hunk", len(lines) - 1)
        sign, text = lines[index][:1], lines[index][1:]
        if sign == b"\\":
            if not signs:
                raise _invalid("a hunk that begins with the end of a file", index)
            for side in [before] * (signs[-1] in b" -") + [after] * (signs[-1] in b" +"):
                side[-1] = side[-1].removesuffix(b"\n")
        elif sign in (b" ", b"-", b"+"):
            before += [text] * (sign in b" -")
            after += [text] * (sign in b" +")
            signs.append(sign)
        elif lines[index] == b"\n":  # some mail programs strip the blank that stands for an empty line
            before.append(text or b"\n")
            after.append(text or b"\n")
            signs.append(b" ")
        else:
            raise _invalid("a hunk is shorter than its header says", index)
        index += 1
    if len(before) != old_count or len(after) != new_count:
        raise _invalid("a hunk's lines do not agree with its header", at)
    if not {b"-", b"+"} & set(signs):
        raise _invalid("a hunk that changes nothing", at)
    first_change = next(number for number, sign in enumerate(signs) if sign != b" ")
    starts = start - (old_count > 0), new_start - (new_count > 0)
    return Hunk(at + 1, *starts, tuple(before), tuple(after), first_change, at_end=signs[-1] != b" "), index


def _is_no_newline(lines: Lines, index: int) -> bool:
    return index < len(lines) and lines[index].startswith(b"\\ ")


def _in_header(lines: Lines, index: int) -> bool:
    """Whether a line that looks like an extended header stands where git puts one: after a `diff --git` line."""
    while index > 0:
        index -= 1
        if lines[index].startswith(b"diff --git "):
            return True
        if lines[index].startswith((b"@@ ", b"+++ ")) or lines[index] == b"\n":
            return False
    return False


def _path(lines: Lines, index: int) -> str:
    """The file that a pair of `---` and `+++` lines names."""
    old, new = _name(lines[index][4:], index), _name(lines[index + 1][4:], index + 1)
    if b"/dev/null" in (old, new):
        what = "creates" if old == b"/dev/null" else "deletes"
        raise _invalid(f"it {what} a file, and Chipmunk's patches only change existing files", index)
    if not old.startswith(b"a/") or not new.startswith(b"b/"):
        raise _invalid("names must begin with a/ and b/, as git writes them", index)
    if old[2:] != new[2:]:
        raise _invalid("it renames a file, and Chipmunk's patches only change existing files", index)
    path = os.fsdecode(old[2:])
    if not is_inside(path) or path != str(PurePosixPath(path)):
        raise _invalid(f"the path {path!r} leads outside the repository or into its administration", index)
    return path


def _name(raw: bytes, index: int) -> bytes:
    raw = raw.rstrip(b"\r\n")
    if not raw.startswith(b'"'):
        return raw.partition(b"\t")[0]
    body, quote, rest = raw[1:].rpartition(b'"')
    if not quote or rest.strip():
        raise _invalid("a malformed name", index)

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([_UNESCAPED[code] if code in _UNESCAPED else int(code, 8) & 255])

    return _ESCAPE.sub(plain, body)


def _invalid(what: str, index: int) -> PatchInvalid:
    return PatchInvalid(
        f"line {index + 1} of the patch: {what}; nothing was changed", next_command="git apply --check PATCH"
    )
