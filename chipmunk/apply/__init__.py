"""From a plan to the disk and back: reading a repository, transaction, journal, diffs, merge, revert."""

from chipmunk.apply.diff import changed_lines, unified
from chipmunk.apply.errors import (
    ApplyError,
    Busy,
    Conflict,
    Interrupted,
    JournalDamaged,
    JournalMissing,
    PatchInvalid,
    Place,
    Refused,
)
from chipmunk.apply.journal import Journal, JournalFile, Store
from chipmunk.apply.repository import Repository, locate, read
from chipmunk.apply.state import FileState, FileStatus, RepositoryStatus, State, status
from chipmunk.apply.transaction import Recovery, commit, recover
from chipmunk.apply.undo import Reverted, plan_revert, revert
from chipmunk.apply.update import Update, carry_out, plan_patch_file, plan_update

__all__ = [
    "ApplyError",
    "Busy",
    "Conflict",
    "FileState",
    "FileStatus",
    "Interrupted",
    "Journal",
    "JournalDamaged",
    "JournalFile",
    "JournalMissing",
    "PatchInvalid",
    "Place",
    "Recovery",
    "Refused",
    "Repository",
    "RepositoryStatus",
    "Reverted",
    "State",
    "Store",
    "Update",
    "carry_out",
    "changed_lines",
    "commit",
    "locate",
    "plan_patch_file",
    "plan_revert",
    "plan_update",
    "read",
    "recover",
    "revert",
    "status",
    "unified",
]
