"""The configurations that are measured beside one another, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chipmunk import config as configuration


def configurations(paths: Sequence[Path], root: Path) -> dict[str, Path | None]:
    """The files `paths` by their names, or whole paths where names are not enough.

    Without any, the one that applies to the repository at `root`; where there is none, `defaults`, which is no file.
    """
    if not paths:
        found = configuration.find(root)
        if found is None:
            return {"defaults": None}
        paths = (found,)
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))
