"""What verify says: one entry a check, with its figures, for people and for `--json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chipmunk.apply.errors import Refused
from chipmunk.rewrite.plan import Site


class VerifyError(Refused):
    """Nothing could be verified: not patched, not importable, or a model that the target cannot build (exit code 2)."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    """`off`, `everything kept`, `coverage`, `parameters`, `sparse error`, `oracle`, or `runs`."""
    holds: bool
    says: str
    """One sentence with the figure that decides."""
    figures: dict[str, Any] = field(default_factory=dict)
    """All figures: errors by scenario and model call, counts by layer."""


@dataclass(frozen=True)
class Unverified:
    """A patched model that could not be run, beside others that were."""

    model: str
    file: str
    reason: str
    next_command: str | None = None
    """What the user can do about it."""


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of one run."""

    root: Path
    target: str | None
    checks: tuple[Check, ...]
    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader should know and no check decides: loops that could not be run, packages that stood empty."""
    environment: dict[str, str] = field(default_factory=dict)
    """Python, torch and device of the two processes."""
    seconds: float = 0.0
    unverified: tuple[Unverified, ...] = ()
    """Models that no check covers."""
    interrupted: bool = False
    """Stopped when some models were verified; the rest is among `unverified`."""

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def exit_code(self) -> int:
        return 1 if not self.holds else 130 if self.interrupted else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "status": "failed" if not self.holds else "interrupted" if self.interrupted else "verified",
            "target": self.target,
            "root": str(self.root),
            "files": sorted({site.file for site in self.sites}),
            "sites": [{**asdict(site), "status": site.status.value} for site in self.sites],
            "checks": [asdict(check) for check in self.checks],
            "unverified": [asdict(each) for each in self.unverified],
            "notes": list(self.notes),
            "environment": self.environment,
            "seconds": round(self.seconds, 2),
        }
