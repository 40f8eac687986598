"""All files of a change or none, whatever happens in between.

1. `planned.json` says what is about to happen. Then everything is written under other names: the bytes before and
   after, the diff, the next journal, and beside each file its replacement. A full disk is met here, where nothing of
   the user's has changed, and undoing only removes files.
2. `planned.json` becomes `underway.json` (a rename), and each replacement takes its file's place (renames).
3. The next journal becomes `journal.json` (a rename): the change is committed. What is left over is removed.

`recover` reads where a killed run stopped. Before 2: it removes the leftovers. In 2: if every file is in place it
commits, otherwise it takes the replacements back and renames `underway.json` to `planned.json` again. After 3: it
removes leftovers.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from chipmunk.apply import disk
from chipmunk.apply.diff import unified
from chipmunk.apply.errors import Conflict, Interrupted, Place, Refused, quoted
from chipmunk.apply.journal import (
    README,
    Journal,
    Store,
    Transaction,
    is_inside,
    journal_document,
    sha256,
    transaction_document,
)
from chipmunk.apply.merge import merge_python
from chipmunk.apply.repository import FOLDER, locate
from chipmunk.rewrite.plan import FileChange

_SLACK = 1 << 16
"""Bytes of free space wanted beyond what is written."""


class Recovery(str, Enum):
    """What `recover` did."""

    NOTHING = "nothing to do"
    ROLLED_BACK = "rolled back"
    COMPLETED = "completed"


def commit(root: Path, changes: Sequence[FileChange], journal: Journal, replaces: str | None = None) -> None:
    """Make all changes and put `journal` in force, or change nothing.

    `replaces` is the id of the journal that the change was planned on, None if there was none. A journal without
    files ends the history: `.chipmunk/` disappears. Modes, owners and symbolic links are kept; a link's target is
    what changes.

    Raises `Conflict` if a file or the journal is no longer what it was planned on, `Refused` for paths outside the
    tree, read-only files and a full disk, `Busy` if another run is at work. On these, on any other error and on
    Ctrl-C the files are put back before the error goes on; only if that fails too (`Interrupted`) is it left to
    `recover`.
    """
    root = locate(root)
    store = Store(root)
    changes = [change for change in resolve_links(root, changes) if change.before != change.after]
    for change in changes:
        _check(root, change)
    _check_space(root, changes, journal)
    try:
        with disk.exclusive(store.lock, root):
            try:
                _describe_folder(store)
                _settle(store)
                if store.peek_id() != replaces:
                    raise Conflict(
                        "the repository's journal has changed since this was planned; nothing was changed",
                        next_command=f"chipmunk status {quoted(root)}",
                    )
                _carry_out(store, changes, journal)
            finally:
                _leave(store)
    except OSError as error:
        raise _refused(error, root) from error


def recover(root: Path) -> Recovery:
    """Bring a repository whose last run was killed to the state before or after that run. Harmless at other times.

    Edits that the user has made to the files in between are kept; raises `Conflict` where that is not possible.
    """
    root = locate(root)
    store = Store(root)
    if not os.path.lexists(store.folder):
        return Recovery.NOTHING
    try:
        with disk.exclusive(store.lock, root):
            try:
                return _settle(store)
            finally:
                _leave(store)
    except OSError as error:
        raise _refused(error, root) from error


def resolve_links(root: Path, changes: Sequence[FileChange]) -> list[FileChange]:
    """The same changes, each under its file's real name; a file that has two names is changed once.

    Raises `Refused` if a path leaves the tree or if the two names of a file are to be changed differently.
    """
    resolved: dict[str, FileChange] = {}
    for change in changes:
        try:
            path = (root / change.path).resolve().relative_to(root).as_posix()
        except (ValueError, OSError, RuntimeError):
            path = ".."
        if not is_inside(change.path) or not is_inside(path):
            raise Refused("the path leads outside the repository; nothing was changed", file=change.path)
        other = resolved.setdefault(path, replace(change, path=path))
        if (other.before, other.after) != (change.before, change.after):
            raise Refused(
                f"this is the same file as {other.path}, and the two would be changed differently; nothing was changed",
                file=change.path,
                next_command=f"replace the link {change.path} by a file of its own",
            )
    return list(resolved.values())


def _check(root: Path, change: FileChange) -> None:
    path = root / change.path
    try:
        current = path.read_bytes()
    except FileNotFoundError:
        current = None
    except OSError as error:
        raise Refused(f"the file cannot be read: {error.strerror}; nothing was changed", file=change.path) from error
    if current != change.before:
        what = "changed" if current is not None else "removed or renamed"
        raise Conflict(
            f"the file was {what} while this was being planned; nothing was changed",
            file=change.path,
            next_command=f"chipmunk diff {quoted(root)}   (plans anew)",
        )
    disk.refuse_read_only(path, change.path)


def _check_space(root: Path, changes: Sequence[FileChange], journal: Journal) -> None:
    """An early, kind answer to a full disk; the one that counts comes when all is written beside the files."""
    needed = sum(len(c.before) + 2 * len(c.after) for c in changes) + _SLACK
    needed += sum(len(file.original) + len(file.patched) for file in journal.files)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise Refused(
            f"not enough free disk space: {needed:,} bytes are needed, {free:,} are free; nothing was changed",
            next_command=f"df -h {quoted(root)}",
        )


def _carry_out(store: Store, changes: Sequence[FileChange], journal: Journal) -> None:
    transaction = Transaction(journal.id, tuple((c.path, sha256(c.before), sha256(c.after)) for c in changes))
    next_journal = store.folder / f"journal-{journal.id}.tmp"
    try:
        _write(store.planned, transaction_document(journal.id, changes))
        with suppress(FileExistsError):
            disk.make_folder(store.objects)
        contents = [(c.path, data) for c in changes for data in (c.before, c.after)]
        contents += [(file.path, data) for file in journal.files for data in (file.original, file.patched)]
        for path, data in contents:
            if not store.object(sha256(data)).exists():
                _write(store.object(sha256(data)), data, like=store.root / path)
        files = [store.root / path for path, _ in contents if (store.root / path).exists()]
        most_private = min(files, key=lambda path: stat.S_IMODE(path.stat().st_mode), default=None)
        _write(store.diff(journal.id), unified(journal.changes), like=most_private)
        disk.write_new(next_journal, journal_document(journal))
        for number, change in enumerate(changes):
            target = store.root / change.path
            disk.write_new(_beside(store, transaction, number), change.after, like=target)
        disk.rename(store.planned, store.underway)
        for number, change in enumerate(changes):
            _check(store.root, change)
            disk.rename(_beside(store, transaction, number), store.root / change.path)
        disk.rename(next_journal, store.journal)
    except BaseException as error:
        try:
            outcome = _settle(store, forward=False)
        except BaseException as second:
            raise Interrupted(
                f"{str(error) or type(error).__name__}; and putting the files back failed too ({second}). "
                f"Nothing is lost: {FOLDER}/ holds every byte",
                next_command=f"chipmunk revert {quoted(store.root)}   (puts the files right first)",
            ) from error
        if outcome is not Recovery.COMPLETED or not isinstance(error, OSError):
            raise
    with suppress(OSError):  # the change is made; what cannot be removed now, the next run removes
        _settle(store)


def _settle(store: Store, forward: bool = True) -> Recovery:
    """Finish or take back an unfinished transaction, and remove whatever the journal in force does not need.

    `forward` allows to commit a transaction whose files are all in place; one that is committed is never taken back.
    """
    outcome = Recovery.NOTHING
    unfinished: Transaction | None = None
    if store.underway.exists():
        unfinished = store.read_transaction(store.underway)
        next_journal = store.folder / f"journal-{unfinished.id}.tmp"
        complete = all(_digest(store, path) == after for path, _, after in unfinished.files)
        if store.peek_id() == unfinished.id:
            disk.remove(store.underway)
            outcome = Recovery.COMPLETED
        elif forward and complete and next_journal.exists():
            disk.rename(next_journal, store.journal)
            disk.remove(store.underway)
            outcome = Recovery.COMPLETED
        else:
            _remove_replacements(store, unfinished)  # first of all, as they hold space
            _roll_back(store, unfinished)
            disk.rename(store.underway, store.planned)
            outcome = Recovery.ROLLED_BACK
    if store.planned.exists():
        unfinished = store.read_transaction(store.planned)
    if unfinished is not None:
        _remove_replacements(store, unfinished)
    _tidy(store)
    disk.remove(store.planned)
    return outcome


def _roll_back(store: Store, transaction: Transaction) -> None:
    """Put back what was replaced. An edit made since is kept: it is merged as a revert would."""
    restored: list[tuple[Path, bytes]] = []
    places: list[Place] = []
    for path, before, after in transaction.files:
        digest = _digest(store, path)
        if digest in (before, None):
            continue  # untouched, or removed by the user since
        original, target = store.content(before), store.root / path
        merged = merge_python(store.content(after), target.read_bytes(), original)
        if merged.data is None:
            places += [Place(path, line, "edited where the unfinished run had changed it") for line in merged.overlaps]
        else:
            restored.append((target, merged.data))
    if places:
        raise Conflict(
            f"a run was stopped half-way, and lines that it changed were edited since. Edit these files by hand "
            f"({FOLDER}/objects/ holds their earlier bytes), or put them back from version control",
            places=places,
            next_command=f"chipmunk status {quoted(store.root)}",
        )
    for number, (target, data) in enumerate(restored):
        temporary = target.parent / f".chipmunk-{transaction.id}-{number}.tmp"
        disk.write_new(temporary, data, like=target)
        disk.rename(temporary, target)


def _tidy(store: Store) -> None:
    """Remove what no longer serves. Objects go before `planned.json`: objects without either document mean damage."""
    journal = store.read_journal()
    needed = {sha256(data) for file in journal.files for data in (file.original, file.patched)} if journal else set()
    for name in store.object_names():
        if name not in needed:
            disk.remove(store.object(name))
    wanted = store.diff(journal.id) if journal and needed else None
    for path in sorted(store.folder.iterdir()):
        if path.suffix == ".tmp" or (path.name.startswith("changes-") and path != wanted):
            disk.remove(path)
    if not needed:
        with suppress(OSError):  # somebody else's file in it, such as .DS_Store
            os.rmdir(store.objects)
        disk.remove(store.journal)


def _describe_folder(store: Store) -> None:
    for name, data in ((".gitignore", b"*\n"), ("README", README)):
        if not (store.folder / name).exists():
            _write(store.folder / name, data)


def _leave(store: Store) -> None:
    """Remove the folder if nothing in it matters; the lock goes last."""
    if store.object_names() or any(path.exists() for path in (store.journal, store.planned, store.underway)):
        return
    for name in ("README", ".gitignore", "README.tmp", ".gitignore.tmp", "lock"):
        with suppress(OSError):  # Windows keeps the lock's name while it is held
            disk.remove(store.folder / name)
    with suppress(OSError):
        os.rmdir(store.folder)


def _write(path: Path, data: bytes, like: Path | None = None) -> None:
    """Write a file of the journal; under its own name it is always whole. What is `like` a file is as private as it."""
    temporary = path.with_name(path.name + ".tmp")
    disk.write_new(temporary, data, like if like is not None and like.exists() else None)
    disk.rename(temporary, path)


def _remove_replacements(store: Store, transaction: Transaction) -> None:
    for number in range(len(transaction.files)):
        disk.remove(_beside(store, transaction, number))


def _beside(store: Store, transaction: Transaction, number: int) -> Path:
    """Where a file's replacement waits: in the same folder, so that it can take its place by a rename."""
    return (store.root / transaction.files[number][0]).parent / f".chipmunk-{transaction.id}-{number}.tmp"


def _digest(store: Store, path: str) -> str | None:
    try:
        if not stat.S_ISREG(os.stat(store.root / path, follow_symlinks=False).st_mode):
            return None
        return sha256((store.root / path).read_bytes())
    except FileNotFoundError:
        return None


def _refused(error: OSError, root: Path) -> Refused:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Refused(
        f"the disk is full ({error.strerror}); nothing was changed" if full else f"{error}; nothing was changed",
        next_command=f"df -h {quoted(root)}" if full else f"ls -ld {quoted(root)}",
    )
