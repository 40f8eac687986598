"""How the files of a patched repository stand: as Chipmunk left them, as they were before, or edited since."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from chipmunk.apply import disk
from chipmunk.apply.errors import Busy, Interrupted, JournalDamaged, Place, quoted
from chipmunk.apply.journal import Journal, JournalFile, Store, sha256
from chipmunk.apply.merge import merge_python
from chipmunk.apply.repository import locate, read

_CALLS_CHIPMUNK = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t]*import chipmunk\b", re.MULTILINE)


class State(str, Enum):
    """How a repository stands."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"
    EDITED = "patched and edited since"
    INTERRUPTED = "interrupted"
    BUSY = "another run is at work"
    DAMAGED = "journal damaged"
    NO_JOURNAL = "patched, but without a journal"


class FileState(str, Enum):
    """How one file of the journal stands."""

    PATCHED = "patched"
    ORIGINAL = "original"
    EDITED = "edited since"
    OVERLAPPING = "edited since, in the lines that Chipmunk changed"
    MISSING = "deleted or renamed since"
    REPLACED = "changed by the interrupted run"
    WAITING = "not yet changed by the interrupted run"


@dataclass(frozen=True)
class FileStatus:
    """One file of the journal, compared with the disk."""

    path: str
    state: FileState
    current: bytes | None
    """What is on the disk."""
    unpatched: bytes | None
    """The file without Chipmunk's change and with the user's edits; None if the two cannot be separated."""
    places: tuple[Place, ...] = ()
    """Where they cannot be separated."""
    now_at: str | None = None
    """Where a file that is missing has gone, if it was only renamed."""


@dataclass(frozen=True)
class RepositoryStatus:
    """How a repository stands, and each file that Chipmunk has changed in it."""

    root: Path
    state: State
    files: tuple[FileStatus, ...] = ()
    journal: Journal | None = None
    message: str | None = None
    """What is wrong, if something is."""
    next_command: str | None = None


def status(root: Path) -> RepositoryStatus:
    """How a repository stands. Changes nothing; reports what others raise. `Refused` only if it is no folder."""
    root = locate(root)
    store = Store(root)
    if disk.is_locked(store.lock):
        busy = disk.busy(root)
        return RepositoryStatus(root, State.BUSY, message=busy.message, next_command=busy.next_command)
    try:
        journal = store.load()
        callers = calls_without_journal(root) if journal is None else []
    except Busy as error:
        return RepositoryStatus(root, State.BUSY, message=error.message, next_command=error.next_command)
    except Interrupted as error:
        files = _half_done(store)
        return RepositoryStatus(root, State.INTERRUPTED, files, message=error.message, next_command=error.next_command)
    except JournalDamaged as error:
        return RepositoryStatus(root, State.DAMAGED, message=error.message, next_command=error.next_command)
    if journal is None:
        if not callers:
            return RepositoryStatus(root, State.UNPATCHED)
        return RepositoryStatus(
            root,
            State.NO_JOURNAL,
            message=f"{callers[0]}, and there is no journal",
            next_command=undo_by_git(root, callers),
        )
    files = examine(root, journal)
    found = {file.state for file in files}
    if found == {FileState.PATCHED}:
        state = State.PATCHED
    elif found == {FileState.ORIGINAL}:
        state = State.UNPATCHED
    else:
        state = State.EDITED
    return RepositoryStatus(root, state, files, journal)


def _half_done(store: Store) -> tuple[FileStatus, ...]:
    """How far the interrupted run came."""
    found = []
    for path, before, after in store.read_transaction(store.underway).files:
        try:
            current = (store.root / path).read_bytes()
        except OSError:
            found.append(FileStatus(path, FileState.MISSING, None, None))
            continue
        states = {before: FileState.WAITING, after: FileState.REPLACED}
        found.append(FileStatus(path, states.get(sha256(current), FileState.EDITED), current, None))
    return tuple(found)


def examine(root: Path, journal: Journal) -> tuple[FileStatus, ...]:
    """Each file of the journal as it stands now."""
    files = tuple(_examine(root, entry) for entry in journal.files)
    if all(file.state is not FileState.MISSING for file in files):
        return files
    elsewhere = {data: path for path, data in read(root).files.items() if data}
    return tuple(_with_new_name(file, journal.file(file.path), elsewhere) for file in files)


def _examine(root: Path, entry: JournalFile) -> FileStatus:
    path = root / entry.path
    try:
        if path.is_symlink():
            raise FileNotFoundError
        current = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        place = Place(entry.path, None, "deleted or renamed since Chipmunk changed it")
        return FileStatus(entry.path, FileState.MISSING, None, None, (place,))
    if current == entry.patched:
        return FileStatus(entry.path, FileState.PATCHED, current, entry.original)
    if current == entry.original:
        return FileStatus(entry.path, FileState.ORIGINAL, current, current)
    merged = merge_python(entry.patched, current, entry.original)
    if merged.data is not None:
        return FileStatus(entry.path, FileState.EDITED, current, merged.data)
    places = tuple(Place(entry.path, line, "edited since, in lines that Chipmunk changed") for line in merged.overlaps)
    return FileStatus(entry.path, FileState.OVERLAPPING, current, None, places)


def _with_new_name(file: FileStatus, entry: JournalFile | None, elsewhere: dict[bytes, str]) -> FileStatus:
    if file.state is not FileState.MISSING or entry is None:
        return file
    found = elsewhere.get(entry.patched) or elsewhere.get(entry.original)
    if found is None:
        return file
    place = Place(file.path, None, f"renamed to {found} since Chipmunk changed it")
    return FileStatus(file.path, file.state, None, None, (place,), found)


def calls_without_journal(root: Path) -> list[Place]:
    """Files that import Chipmunk in a repository that has no journal, each with the line of its first import.

    Raises `Busy` if that is only so because another run is just patching or reverting.
    """
    places = _calls(root)
    if places and (Store(root).load() is not None or _calls(root) != places):
        raise disk.busy(root)
    return places


def _calls(root: Path) -> list[Place]:
    reason = "calls Chipmunk (patched by hand, or on another machine, or the journal was deleted)"
    return [
        Place(path, data.count(b"\n", 0, found.start()) + 1, reason)
        for path, data in read(root).files.items()
        if (found := _CALLS_CHIPMUNK.search(data))
    ]


def undo_by_git(root: Path, places: list[Place]) -> str:
    """What to run where only version control can give the original files back."""
    names = " ".join(quoted(Path(path)) for path in sorted({place.file for place in places}))
    return f"git -C {quoted(root)} checkout -- {names}   (or a commit from before the patch: git checkout COMMIT -- …)"
