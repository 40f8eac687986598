"""The repository as it was before Chipmunk, rebuilt beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath


def rebuild(root: Path, originals: Mapping[str, bytes], folder: Path) -> Path:
    """Make a copy of `root` in `folder` in which the files `originals` have those bytes; returns its path.

    Only the folders that lead to a changed file are real; everything else in the copy is a link into `root`, so that
    weights and data are found where they were.
    """
    folders = {parent for path in originals for parent in PurePosixPath(path).parents}
    for inside in sorted(folders | {PurePosixPath(".")}):
        copy = folder / inside
        copy.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(root / inside):
            path = inside / entry.name
            if path in folders or path.as_posix() in originals or entry.name in ("__pycache__", ".chipmunk"):
                continue
            (copy / entry.name).symlink_to(entry.path)
    for name, data in originals.items():
        (folder / name).write_bytes(data)
    return folder
