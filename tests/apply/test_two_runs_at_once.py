"""Two runs on one repository at the same time: one of them waits, is refused, or notices."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apply_toys import FILES, SMALL, make, patch, rules, snapshot, user_files

from chipmunk.apply import (
    Busy,
    Conflict,
    Interrupted,
    Repository,
    State,
    carry_out,
    plan_update,
    read,
    recover,
    revert,
    status,
)
from chipmunk.apply import disk as disk_module
from chipmunk.rewrite.plan import Plan

HOLD = """
import sys, time
from pathlib import Path
from chipmunk.apply import disk
with disk.exclusive(Path(sys.argv[1]) / ".chipmunk" / "lock", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_that_the_first_is_at_work(tmp_path: Path) -> None:
    make(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert status(tmp_path).state is State.BUSY
            assert status(tmp_path).next_command is not None
            for action in (patch, recover):
                with pytest.raises(Busy, match="another chipmunk run") as caught:
                    action(tmp_path)
                assert caught.value.exit_code == 2
            assert all((tmp_path / path).read_bytes() == data for path, data in FILES.items())
        finally:
            holder.kill()
    assert status(tmp_path).state is State.UNPATCHED
    patch(tmp_path)  # the lock went with the process that held it
    assert status(tmp_path).state is State.PATCHED


def test_many_runs_at_once_patch_and_revert_one_tree(tmp_path: Path) -> None:
    """Processes that patch and revert as fast as they can: each run succeeds or is refused, and the tree is whole."""
    make(tmp_path, SMALL)
    pristine = snapshot(tmp_path)
    patched = _user_files_of_patched(tmp_path)
    children = []
    for worker in range(3):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                deadline = time.monotonic() + 1.5
                done = 0
                while time.monotonic() < deadline:
                    try:
                        (patch if (done + worker) % 2 else revert)(tmp_path)
                        done += 1
                    except (Busy, Conflict, Interrupted):
                        pass
                code = 0 if done else 98
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert user_files(tmp_path) in (pristine, patched)
    revert(tmp_path)
    assert snapshot(tmp_path) == pristine


def _user_files_of_patched(root: Path) -> dict[str, tuple[str, int, str]]:
    patch(root)
    found = user_files(root)
    revert(root)
    return found


def test_a_lock_that_is_removed_while_it_is_awaited_is_not_taken(tmp_path: Path) -> None:
    lock = tmp_path / ".chipmunk" / "lock"
    with disk_module.exclusive(lock, tmp_path):
        assert not disk_module.is_locked(tmp_path / "other")
        lock.unlink()
        with disk_module.exclusive(lock, tmp_path):  # a new file, a new lock
            assert lock.exists()


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_another_run_tidies_away_meanwhile_is_made_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".chipmunk" / "lock"
    if call == "open":
        lock.parent.mkdir()
    real = getattr(os, call)

    def then_tidied_away(path: Path, *rest: int) -> object:
        monkeypatch.undo()
        result = real(path, *rest)
        lock.unlink(missing_ok=True)
        lock.parent.rmdir()
        return result

    monkeypatch.setattr(disk_module.os, call, then_tidied_away)
    with disk_module.exclusive(lock, tmp_path):
        assert disk_module.is_locked(lock)


def test_a_run_that_finishes_between_reading_and_planning_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is no longer what is there: neither nothing to do, nor a plan on old bytes."""
    make(tmp_path, SMALL)

    def read_and_then_the_other_run(root: Path) -> Repository:
        repository = read(root)
        monkeypatch.undo()
        patch(root)
        return repository

    monkeypatch.setattr("chipmunk.apply.update.read", read_and_then_the_other_run)
    with pytest.raises(Busy) as refused:
        plan_update(tmp_path, rules)
    assert refused.value.next_command is not None
    assert status(tmp_path).state is State.PATCHED


def test_a_run_that_finishes_while_rules_are_planning_is_noticed(tmp_path: Path) -> None:
    """Not taken for a repository in which there is nothing to do."""
    make(tmp_path, SMALL)

    def rules_and_the_other_run(files: dict[str, bytes]) -> Plan:
        patch(tmp_path)
        return rules(files)

    update = plan_update(tmp_path, rules_and_the_other_run)
    after = snapshot(tmp_path)
    assert update.changes
    with pytest.raises(Conflict) as refused:
        carry_out(update)
    assert refused.value.next_command is not None
    assert snapshot(tmp_path) == after
