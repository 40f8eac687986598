"""The starter repository, plain and patched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import chipmunk

from chipmunk.registry import data_path


@pytest.fixture(scope="session")
def _starters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The starter repository, as it is and patched."""
    folder = tmp_path_factory.mktemp("starters")
    plain, patched = folder / "plain", folder / "patched"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(data_path("templates") / "flux-starter", plain, ignore=ignored)
    shutil.copytree(plain, patched)
    assert chipmunk("patch", patched).code == 0
    return plain, patched


@pytest.fixture
def starter(_starters: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the starter repository, unpatched."""
    return Path(shutil.copytree(_starters[0], tmp_path / "starter"))


@pytest.fixture
def patched(_starters: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the starter repository, patched."""
    return Path(shutil.copytree(_starters[1], tmp_path / "patched"))


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes."""

    def take(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return take
