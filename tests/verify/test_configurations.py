"""Which configurations are measured, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk.verify.configurations import configurations


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)


def test_files_go_by_their_names_unless_two_have_one(tmp_path: Path) -> None:
    one, two, other = tmp_path / "a" / "fast.yml", tmp_path / "b" / "fast.yml", tmp_path / "b" / "slow.yml"
    assert configurations([one, other], tmp_path) == {"fast": one, "slow": other}
    assert configurations([one, two], tmp_path) == {str(one): one, str(two): two}


def test_without_files_the_one_that_applies_or_the_defaults(tmp_path: Path) -> None:
    assert configurations([], tmp_path) == {"defaults": None}
    (tmp_path / "chipmunk-config.yml").write_text("min_steps: 1\n")
    assert configurations([], tmp_path) == {"chipmunk-config": tmp_path / "chipmunk-config.yml"}
