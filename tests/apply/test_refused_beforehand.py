"""What a run refuses before it writes anything, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from apply_toys import FILES, make, patch, rules, snapshot

from chipmunk.apply import Conflict, Journal, Refused, carry_out, commit, plan_update
from chipmunk.rewrite.plan import FileChange


def test_a_file_that_changed_since_planning_is_a_conflict(tmp_path: Path) -> None:
    update = plan_update(make(tmp_path), rules)
    (tmp_path / "src/flux/math.py").write_bytes(b"other\n")
    before = snapshot(tmp_path)
    with pytest.raises(Conflict, match=r"src/flux/math.py: the file was changed") as caught:
        carry_out(update)
    assert caught.value.exit_code == 3
    assert snapshot(tmp_path) == before


def test_a_file_removed_since_planning_is_a_conflict(tmp_path: Path) -> None:
    update = plan_update(make(tmp_path), rules)
    (tmp_path / "src/flux/math.py").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(Conflict, match="removed"):
        carry_out(update)
    assert snapshot(tmp_path) == before


def test_two_plans_made_at_once_cannot_both_be_carried_out(tmp_path: Path) -> None:
    make(tmp_path)
    one, two = plan_update(tmp_path, rules), plan_update(tmp_path, rules)
    carry_out(one)
    before = snapshot(tmp_path)
    with pytest.raises(Conflict):
        carry_out(two)
    only_journal = [FileChange("setup.py", FILES["setup.py"], b"x\n")]
    with pytest.raises(Conflict, match="journal has changed"):
        commit(tmp_path, only_journal, Journal())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["src/flux/math.py", "src/flux"])
def test_read_only_is_refused(tmp_path: Path, what: str) -> None:
    make(tmp_path)
    mode = (tmp_path / what).stat().st_mode
    (tmp_path / what).chmod(mode & ~0o222)
    before = snapshot(tmp_path)
    try:
        with pytest.raises(Refused, match="read-only") as caught:
            patch(tmp_path)
        assert caught.value.file == what
        assert "chmod u+w" in str(caught.value)
        assert snapshot(tmp_path) == before
    finally:
        (tmp_path / what).chmod(mode)


@pytest.mark.parametrize(
    "path", ["../out.py", "/etc/out.py", ".git/hooks/x.py", ".chipmunk/journal.json", "link/out.py"]
)
def test_a_path_outside_the_tree_is_refused(tmp_path: Path, path: str) -> None:
    root = make(tmp_path / "root")
    make(tmp_path, {"out.py": b"a\n"})
    (root / "link").symlink_to(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(Refused, match="outside"):
        commit(root, [FileChange(path, b"a\n", b"b\n")], Journal())
    assert snapshot(tmp_path) == before


def test_too_little_free_space_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(Refused, match="not enough free disk space"):
        patch(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_chipmunk_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    root, elsewhere = make(tmp_path / "root"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / ".chipmunk").symlink_to(elsewhere)
    with pytest.raises(Refused, match="not a link"):
        patch(root)
    assert not list(elsewhere.iterdir())
