"""No configuration of the checkout, the machine or an earlier test may turn Chipmunk on here."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
