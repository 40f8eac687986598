"""Reads the Python files of a repository. Nothing in it is imported, run, or asked for settings."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from chipmunk.apply.errors import Refused, quoted
from chipmunk.rewrite.plan import Site, SiteStatus

FOLDER = ".chipmunk"
"""Where the journal lives, at the root of a patched repository."""

_NOT_SOURCE = {
    ".git", ".hg", ".svn", FOLDER, "node_modules", "build", "dist", "site-packages", "__pycache__",
    ".tox", ".nox", ".eggs", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints",
}  # fmt: skip
_ENVIRONMENT = {"pyvenv.cfg", "conda-meta"}
"""A folder that holds one of these is a virtual environment."""


@dataclass(frozen=True)
class Repository:
    """The Python files below a folder, as they are on the disk."""

    root: Path
    """Absolute, without symbolic links."""
    files: dict[str, bytes]
    """Bytes by path relative to the root, with forward slashes, in sorted order."""
    problems: tuple[Site, ...]
    """What was left out although its name says that it is source, and why."""
    links: dict[str, str]
    """Files that are symbolic links, and the file inside the tree that each leads to."""


def locate(root: Path) -> Path:
    """The repository's root, resolved; raises `Refused` if there is none there or if it is part of a patched one."""
    try:
        resolved = root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise Refused(
            f"{root}: there is no such folder", next_command="chipmunk patch PATH-OF-YOUR-FLUX-REPOSITORY"
        ) from error
    if not resolved.is_dir():
        raise Refused(
            f"{root} is a file; give the folder it is in", next_command=f"chipmunk patch {quoted(root.parent)}"
        )
    if not has_journal(resolved):
        for parent in resolved.parents:
            if has_journal(parent):
                raise Refused(
                    f"{root} belongs to {parent}, which Chipmunk has patched as a whole",
                    next_command=f"chipmunk status {quoted(parent)}",
                )
    return resolved


def has_journal(folder: Path) -> bool:
    """Whether the folder is the root of a patched repository, or was about to become one."""
    return any(os.path.lexists(folder / FOLDER / name) for name in ("journal.json", "underway.json"))


def read(root: Path) -> Repository:
    """Read all `*.py` files below `root`.

    Left out without a word: version control, virtual environments, installed packages, build folders and caches.
    Links to folders are not followed (what they lead to inside the tree is read where it is). A link to a file inside
    the tree is read under both names. What is left out although it looks like source is listed in `problems`.

    Raises `Refused` if `root` is not a folder, or part of (or around) another patched repository.
    """
    root = locate(root)
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    problems: list[Site] = []

    def left_out(path: str, reason: str) -> None:
        problems.append(Site(path, 1, "read", SiteStatus.REFUSED, PurePosixPath(path).name, reason))

    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = list(listing)
        except OSError as error:
            left_out(folder.rstrip("/") or ".", f"the folder cannot be read: {error.strerror}")
            continue
        if folder and any(entry.name in _ENVIRONMENT for entry in entries):
            continue
        for entry in entries:
            path = folder + entry.name
            is_python = entry.name.endswith(".py")
            if entry.is_dir(follow_symlinks=False):
                if folder and entry.name == FOLDER and has_journal(root / folder):
                    raise Refused(
                        f"{folder} inside {root} was patched on its own",
                        next_command=f"chipmunk revert {quoted(root / folder)}",
                    )
                if entry.name not in _NOT_SOURCE and not entry.name.endswith(".egg-info"):
                    folders.append(path + "/")
            elif entry.is_symlink():
                target = _link_target(root, path)
                if os.path.isdir(entry.path):
                    if target is None and _holds_python(entry.path):
                        left_out(path, "the link leads to a folder outside the repository, which is not touched")
                    elif target == "." or (target is not None and (path + "/").startswith(target + "/")):
                        left_out(path, "the link leads back to a folder that it is in")
                elif not is_python:
                    continue
                elif target is None:
                    exists = os.path.exists(entry.path)
                    where = "outside the repository, which is not touched" if exists else "nowhere"
                    left_out(path, f"the link leads {where}")
                else:
                    links[path] = target
                    _read_into(files, root, path, left_out)
            elif is_python:
                _read_into(files, root, path, left_out)
    for path in [path for path in links if path not in files]:
        del links[path]
    return Repository(root, dict(sorted(files.items())), tuple(sorted(problems, key=lambda site: site.file)), links)


def _read_into(files: dict[str, bytes], root: Path, path: str, left_out: Callable[[str, str], None]) -> None:
    try:
        place = os.path.join(root, path)  # there may be thousands: `Path` takes longer than reading one
        if not stat.S_ISREG(os.stat(place).st_mode):
            return left_out(path, "not a regular file")
        with open(place, "rb") as file:
            files[path] = file.read()
    except OSError as error:
        left_out(path, f"the file cannot be read: {error.strerror}")


def _link_target(root: Path, path: str) -> str | None:
    """Where a link leads, relative to the root; None if that is outside, or nowhere."""
    try:
        target = (root / path).resolve(strict=True)
        return target.relative_to(root).as_posix()
    except (OSError, RuntimeError, ValueError):
        return None


def _holds_python(folder: str) -> bool:
    """Whether Python files lie directly in a folder; a link to a folder of weights or pictures is nobody's concern."""
    try:
        with os.scandir(folder) as listing:
            return any(entry.name.endswith(".py") for entry in listing)
    except OSError:
        return False
