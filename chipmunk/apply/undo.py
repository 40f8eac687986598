"""Takes Chipmunk's change out of a repository: to the byte if nothing else changed, else around the user's edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chipmunk.apply.errors import Conflict, JournalMissing, Place, quoted
from chipmunk.apply.journal import Journal, Store, sha256
from chipmunk.apply.merge import split_lines
from chipmunk.apply.repository import locate
from chipmunk.apply.state import FileState, FileStatus, calls_without_journal, examine, undo_by_git
from chipmunk.apply.transaction import Recovery, commit, recover
from chipmunk.rewrite.plan import FileChange

_MENTIONS = re.compile(rb"\bchipmunk\s*\.")


@dataclass(frozen=True)
class Reverted:
    """What a revert did, or would do."""

    changes: tuple[FileChange, ...]
    """Files from what is on the disk to what they are without Chipmunk; empty if there was nothing to revert."""
    merged: tuple[str, ...] = ()
    """Those of them that keep edits which the user made after patching."""
    leftovers: tuple[Place, ...] = ()
    """Lines of the user's own that call Chipmunk and are left for the user to remove."""
    replaces: str | None = None
    """Id of the journal that ends with it, None if there is none."""
    recovery: Recovery = Recovery.NOTHING
    """What an earlier run that was killed needed first."""


def plan_revert(root: Path) -> Reverted:
    """What `revert` would do. Changes nothing.

    Raises `Conflict` where the user's edits overlap with Chipmunk's, or a file is gone; `JournalMissing` if files call
    Chipmunk but nothing says what they were; `JournalDamaged`, `Interrupted`.
    """
    root = locate(root)
    journal = Store(root).load()
    if journal is None:
        callers = calls_without_journal(root)
        if callers:
            raise JournalMissing(
                "there is no journal to revert from, but these files call Chipmunk; nothing was changed",
                places=callers,
                next_command=undo_by_git(root, callers),
            )
        return Reverted(())
    files = examine(root, journal)
    if places := [place for file in files for place in file.places]:
        raise Conflict(
            "these places were changed after patching and stand in the way of reverting; nothing was changed. "
            "Put them back as Chipmunk left them, or take Chipmunk's lines out by hand, and revert again",
            places=places,
            next_command=_remedy(root, journal, files),
        )
    changes, merged, leftovers = [], [], []
    for file in files:
        if file.current is None or file.unpatched is None or file.current == file.unpatched:
            continue
        changes.append(FileChange(file.path, file.current, file.unpatched))
        entry = journal.file(file.path)
        if file.state is FileState.EDITED and (entry is None or file.unpatched != entry.original):
            merged.append(file.path)
            leftovers += [
                Place(file.path, number, "still calls Chipmunk, in a line of your own")
                for number, line in enumerate(split_lines(file.unpatched), 1)
                if _MENTIONS.search(line)
            ]
    return Reverted(tuple(changes), tuple(merged), tuple(leftovers), journal.id)


def _remedy(root: Path, journal: Journal, files: Sequence[FileStatus]) -> str:
    """What to run first where files stand in the way of a revert: put back the first that is gone, if one is."""
    for file in files:
        entry = journal.file(file.path)
        if file.state is not FileState.MISSING or entry is None:
            continue
        path = quoted(root / file.path)
        if file.now_at is not None:
            return f"mv {quoted(root / file.now_at)} {path}"
        folder = "" if (root / file.path).parent.is_dir() else f"mkdir -p {quoted((root / file.path).parent)} && "
        return f"{folder}cp {quoted(Store(root).object(sha256(entry.original)))} {path}   (as it was before Chipmunk)"
    return f"chipmunk diff {quoted(root)}"


def revert(root: Path) -> Reverted:
    """Revert a repository, all files or none, and end its journal. Reverting twice does nothing the second time.

    An interrupted run is put right first. Raises what `plan_revert` and `commit` raise.
    """
    root = locate(root)
    recovery = recover(root)
    planned = replace(plan_revert(root), recovery=recovery)
    if planned.replaces is not None:
        commit(root, planned.changes, Journal(), replaces=planned.replaces)
    return planned
