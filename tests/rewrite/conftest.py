from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where no configuration of the checkout's is found."""
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
