"""The journal: what Chipmunk changed in a repository, and what it was before.

    .chipmunk/
        README          one line for whoever finds the folder
        .gitignore      `*`: nothing of this ever enters the user's commits
        lock            held while a run changes files
        journal.json    the change in force: files, their bytes before and after (by SHA-256), modes, rules, versions
        objects/        those bytes, each under its SHA-256
        changes-ID.diff the same change for people; `git apply -R` undoes it without Chipmunk
        planned.json    a transaction that has touched none of the user's files (any more); see `transaction`
        underway.json   a transaction whose files are being replaced

The journal holds one net change: what a file would be had Chipmunk never touched it (`original`), and what Chipmunk
made of it (`patched`). Every document carries a format number and its own checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from chipmunk import __version__
from chipmunk.apply import disk
from chipmunk.apply.errors import Interrupted, JournalDamaged, Refused, quoted
from chipmunk.apply.repository import FOLDER
from chipmunk.rewrite.plan import FileChange, Site, SiteStatus

FORMAT = 1
_OBJECT = re.compile(r"[0-9a-f]{64}(\.tmp)?")
README = (
    b"Chipmunk's journal: the original bytes of the files that `chipmunk patch` changed. `chipmunk revert` needs it, "
    b"and removes it; `git apply -R .chipmunk/changes-*.diff`, run in the folder above, undoes the same by hand.\n"
)


@dataclass(frozen=True)
class JournalFile:
    """One file that Chipmunk changed."""

    path: str
    """Relative to the root, with forward slashes; never a symbolic link."""
    original: bytes
    """What the file would be had Chipmunk never touched it; with the user's later edits if it was patched again."""
    patched: bytes
    """What Chipmunk wrote."""
    mode: int
    """Permission bits when it was first changed."""


@dataclass(frozen=True)
class Journal:
    """The net change that is in force in a repository; without files, none is."""

    files: tuple[JournalFile, ...] = ()
    target: str | None = None
    """Name of the target that was recognised, None for a patch file."""
    patches: dict[str, str] = field(default_factory=dict)
    """Rules that were used, by name, with their versions."""
    sites: tuple[Site, ...] = ()
    tool: str = __version__
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def changes(self) -> tuple[FileChange, ...]:
        """The whole change, from the originals to the patched files."""
        return tuple(FileChange(file.path, file.original, file.patched) for file in self.files)

    def file(self, path: str) -> JournalFile | None:
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True)
class Transaction:
    """What a run is about to do, or was doing when it was killed."""

    id: str
    """Of the journal that is in force once it is committed."""
    files: tuple[tuple[str, str, str], ...]
    """Path, SHA-256 before, SHA-256 after."""


@dataclass(frozen=True)
class Store:
    """The `.chipmunk` folder of one root. Reads; `transaction` writes."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    @property
    def journal(self) -> Path:
        return self.folder / "journal.json"

    @property
    def planned(self) -> Path:
        return self.folder / "planned.json"

    @property
    def underway(self) -> Path:
        return self.folder / "underway.json"

    @property
    def objects(self) -> Path:
        return self.folder / "objects"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    def object(self, digest: str) -> Path:
        return self.objects / digest

    def object_names(self) -> list[str]:
        """Objects, and beginnings of objects that a killed run left."""
        return sorted(path.name for path in self.objects.glob("*") if _OBJECT.fullmatch(path.name))

    def diff(self, id: str) -> Path:
        return self.folder / f"changes-{id}.diff"

    def load(self) -> Journal | None:
        """The change in force; None if the repository is not patched. Changes nothing.

        Raises `Interrupted` if a run was killed half-way, `JournalDamaged` if the journal cannot be trusted, `Busy` if
        it is being written.
        """
        for _ in range(3):
            try:
                return self._load()
            except (Interrupted, JournalDamaged):
                if disk.is_locked(self.lock):
                    raise disk.busy(self.root) from None
        return self._load()  # the same again, although nobody is at work

    def _load(self) -> Journal | None:
        if self.underway.exists() and (self.peek_id() != self.read_transaction(self.underway).id):
            raise Interrupted(
                "an earlier run was stopped half-way; the next patch or revert first puts the files right",
                next_command=f"chipmunk revert {quoted(self.root)}",
            )
        journal = self.read_journal()
        return journal if journal is not None and journal.files else None

    def peek_id(self) -> str | None:
        """Id of the journal in force, if there is one."""
        return str(self._document(self.journal)["id"]) if self.journal.exists() else None

    def read_journal(self) -> Journal | None:
        if self.objects.is_symlink():
            raise self.damaged("objects is a link")
        if not self.journal.exists():
            unfinished = self.planned.exists() or self.underway.exists()
            if not unfinished and self.object_names():
                raise self.damaged("journal.json is missing")
            return None
        body = self._document(self.journal)
        try:
            files = tuple(
                JournalFile(
                    self.safe_path(file["path"]),
                    self.content(file["original"]),
                    self.content(file["patched"]),
                    int(file["mode"]),
                )
                for file in body["files"]
            )
            sites = tuple(Site(**{**site, "status": SiteStatus(site["status"])}) for site in body["sites"])
            return Journal(
                files, body["target"], body["patches"], sites, body["tool"], _id(body["id"]), body["created"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(f"journal.json has no valid {error}") from error

    def read_transaction(self, document: Path) -> Transaction:
        body = self._document(document)
        try:
            return Transaction(
                _id(body["id"]), tuple((self.safe_path(path), before, after) for path, before, after in body["files"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(f"{document.name} has no valid {error}") from error

    def content(self, digest: str) -> bytes:
        """Bytes of an object, checked against its name."""
        if not (isinstance(digest, str) and len(digest) == 64 and _OBJECT.fullmatch(digest)):
            raise self.damaged("an object's name is not a SHA-256")
        try:
            data = self.object(digest).read_bytes()
        except OSError as error:
            raise self.damaged(f"objects/{digest} cannot be read: {error.strerror}") from error
        if sha256(data) != digest:
            raise self.damaged(f"objects/{digest} was altered")
        return data

    def safe_path(self, path: str) -> str:
        """A path from a document, if it stays inside the tree: a journal may have come from a stranger."""
        try:
            inside = is_inside(path) and (self.root / path).parent.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError, TypeError):
            inside = False
        if not inside:
            raise self.damaged(f"it names a path outside the repository, {path!r}")
        return path

    def damaged(self, what: str) -> JournalDamaged:
        paths = self._paths_for_a_hint()
        if (self.root / ".git").exists():
            undo = f"git -C {quoted(self.root)} checkout -- {' '.join(quoted(Path(path)) for path in paths) or 'FILES'}"
        else:
            undo = f"cd {quoted(self.root)} && git apply -R {FOLDER}/changes-*.diff"
        return JournalDamaged(
            f"the journal in {FOLDER}/ is damaged ({what}); nothing was changed. Put the original files back with the "
            f"command below or from a backup, and then remove {FOLDER}/",
            file=f"{FOLDER}/journal.json",
            next_command=undo,
        )

    def _paths_for_a_hint(self) -> list[str]:
        try:
            files = json.loads(self.journal.read_bytes())["body"]["files"]
            return [file["path"] for file in files if is_inside(file["path"])]
        except Exception:  # whatever is wrong with it, it is only a hint
            return []

    def _document(self, path: Path) -> dict[str, Any]:
        try:
            outer = json.loads(path.read_bytes())
            if not isinstance(outer, dict) or not isinstance(outer.get("format"), int):
                raise ValueError("no format")
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged(f"{path.name} cannot be read: {error}") from error
        if outer["format"] > FORMAT:
            raise Refused(
                f"the journal was written by a newer Chipmunk (format {outer['format']}; this one knows {FORMAT})",
                file=f"{FOLDER}/{path.name}",
                next_command="pip install --upgrade chipmunk-flux",
            )
        body = outer.get("body")
        if not isinstance(body, dict) or outer.get("checksum") != sha256(_canonical(body)):
            raise self.damaged(f"the checksum of {path.name} does not hold")
        return body


def journal_document(journal: Journal) -> bytes:
    body = asdict(replace(journal, files=()))
    body["files"] = [
        {"path": file.path, "original": sha256(file.original), "patched": sha256(file.patched), "mode": file.mode}
        for file in journal.files
    ]
    return _sealed(body)


def transaction_document(id: str, changes: Sequence[FileChange]) -> bytes:
    return _sealed(
        {"id": id, "files": [[change.path, sha256(change.before), sha256(change.after)] for change in changes]}
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_inside(path: str) -> bool:
    """Whether a path is relative, stays below the root, and keeps out of version control and of the journal."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and not path.startswith("/")
        and "\0" not in path
        and not (os.name == "nt" and set("\\:") & set(path))
        and not {"..", ".git", FOLDER} & {part.lower() for part in parts}
    )


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _sealed(body: Mapping[str, Any]) -> bytes:
    text = json.dumps({"format": FORMAT, "checksum": sha256(_canonical(body)), "body": body}, indent=1)
    return text.encode() + b"\n"


def _id(text: str) -> str:
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise ValueError("id")
    return text
