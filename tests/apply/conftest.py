"""Where the tests of this folder work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from apply_toys import make, patch


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: a thousand runs, each of which waits for the disk twenty times, take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """The small repository, patched, with files of different modes."""
    make(tmp_path)
    (tmp_path / "src/flux/math.py").chmod(0o755)
    (tmp_path / "src/flux/layers.py").chmod(0o600)
    patch(tmp_path)
    return tmp_path
