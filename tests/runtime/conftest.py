"""What tests of the runtime start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No configuration of the checkout, the machine or an earlier test may turn Chipmunk on here."""
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For the tests of a file that asks for it: with autograd on, every call runs dense."""
    with torch.no_grad():
        yield
