"""What can go wrong between a plan and the disk: each error says what, where, and what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Place:
    """One place that stands in the way."""

    file: str
    """Path relative to the root, with forward slashes."""
    line: int | None
    """1-based, in the file as it is on the disk None for the whole file."""
    reason: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.reason}"


class ApplyError(Exception):
    """Base of every error of this package. Nothing in the user's files was changed, unless the message says so."""

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        places: Sequence[Place] = (),
        next_command: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.places = tuple(places) or ((Place(file, line, message),) if file is not None else ())
        self.file = self.places[0].file if self.places else None
        self.line = self.places[0].line if self.places else None
        self.next_command = next_command

    def __str__(self) -> str:
        lines = [self.message, *(f"  {place}" for place in self.places if place.reason != self.message)]
        if len(self.places) == 1 and self.places[0].reason == self.message:
            lines[0] = str(self.places[0])
        if self.next_command is not None:
            lines.append(f"  next: {self.next_command}")
        return "\n".join(lines)


class Refused(ApplyError):
    """The request cannot be carried out as it stands: a missing path, a read-only file, a full disk."""


class Busy(Refused):
    """Another Chipmunk process is at work on the same repository."""


class Interrupted(Refused):
    """An earlier run was killed half-way; `recover` has to run before anything else."""


class JournalDamaged(Refused):
    """The journal cannot be trusted: a part is missing, altered, or of a format that this version does not know."""


class JournalMissing(Refused):
    """Files call Chipmunk, but no journal says what they were before."""


class PatchInvalid(Refused):
    """A patch file that is malformed, or that touches what it must not touch."""


class Conflict(ApplyError):
    """Someone else's change stands where ours has to go. Nothing was written."""

    exit_code: ClassVar[int] = 3


def quoted(root: Path) -> str:
    """The root as it goes into a command line that is shown to the user."""
    text = str(root)
    return text if all(c.isalnum() or c in "/._-+=:@%\\~" for c in text) else "'" + text.replace("'", "'\\''") + "'"
