"""All files or none: whatever stops a run, the tree is whole, or the next command makes it so."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from apply_toys import LAYERS, SMALL, copy, make, patch, rules, rules_2, snapshot, user_files
from stopped_runs import Action, calls_of, ctrl_c, die, disk_full, in_child, io_error

from chipmunk.apply import (
    Conflict,
    FileState,
    Interrupted,
    Journal,
    Recovery,
    State,
    Store,
    carry_out,
    plan_update,
    recover,
    revert,
    status,
)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small repository untouched, patched, and patched and edited since."""
    base = tmp_path_factory.mktemp("trees")
    plain = make(base / "plain", SMALL)
    patched = copy(plain, base / "patched")
    patch(patched)
    edited = copy(patched, base / "edited")
    with (edited / "src/flux/math.py").open("ab") as file:
        file.write(b"\n\nmore = 1\n")
    return {"plain": plain, "patched": patched, "edited": edited}


def upgrade(root: Path) -> None:
    carry_out(plan_update(root, rules_2))


STEPS = [("plain", patch), ("patched", revert), ("edited", revert), ("edited", upgrade)]
every_step = pytest.mark.parametrize(("start", "action"), STEPS, ids=["patch", "revert", "revert-edited", "upgrade"])


def _check_whole(
    work: Path, before: Path, after: dict[str, tuple[str, int, str]], journal_before: Journal | None
) -> bool:
    """After recovery the tree is exactly that before, with its journal, or exactly that after; tells whether before."""
    found = user_files(work)
    assert not [path for path in snapshot(work) if path.endswith(".tmp")]
    if found == user_files(before) and found != after:
        assert Store(work).load() == journal_before
        assert journal_before is not None or snapshot(work) == snapshot(before)
        return True
    assert found == after
    return False


@every_step
def test_killed_at_every_call_the_next_command_restores(
    trees: dict[str, Path], tmp_path: Path, start: str, action: Action
) -> None:
    before = trees[start]
    journal = Store(before).load()
    done = copy(before, tmp_path / "done")
    total = len(calls_of(action, done))
    after = user_files(done)
    states = set()
    for number in range(total):
        work = copy(before, tmp_path / "work")
        assert in_child(action, work, number, die) == -signal.SIGKILL
        states.add(status(work).state)
        outcome = recover(work)
        was_before = _check_whole(work, before, after, journal)
        states.add((outcome, was_before))
        assert recover(work) is Recovery.NOTHING
        action(work)
        assert user_files(work) == after
    assert in_child(action, copy(before, tmp_path / "work"), total, die) == 0  # so every call was tried
    assert {State.INTERRUPTED, (Recovery.NOTHING, True), (Recovery.ROLLED_BACK, True)} <= states
    assert {(Recovery.COMPLETED, False), (Recovery.NOTHING, False)} <= states


def test_every_way_to_the_disk_is_one_that_the_kills_stop_at(trees: dict[str, Path], tmp_path: Path) -> None:
    """Python announces every file that is opened for writing, renamed or removed; all of them go through `os`."""
    announced: list[str] = []

    def hear(event: str, args: tuple[object, ...]) -> None:
        if not recording:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in (
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.truncate",
            "os.link",
            "os.symlink",
        ):
            announced.append(event)

    recording = True
    work = copy(trees["plain"], tmp_path / "work")
    sys.addaudithook(hear)
    counted = calls_of(patch, work) + calls_of(revert, work)
    recording = False
    stops = [name for name in counted if name in ("open", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")]
    assert len(announced) == len(stops)


@every_step
def test_nothing_takes_its_name_before_it_is_on_the_disk(
    trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, action: Action
) -> None:
    """For a power failure: a file is synchronised after its last write and before its rename, its folder after it."""
    work = copy(trees[start], tmp_path / "work")
    unsynchronised: set[str] = set()
    renamed_in: set[str] = set()
    checked = 0
    write, fsync, replace = os.write, os.fsync, os.replace

    def path_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def watched_write(fd: int, data: bytes) -> int:
        unsynchronised.add(path_of(fd))
        return write(fd, data)

    def watched_fsync(fd: int) -> None:
        unsynchronised.discard(path_of(fd))
        renamed_in.discard(path_of(fd))
        fsync(fd)

    def watched_replace(source: Path, target: Path) -> None:
        nonlocal checked
        assert str(source) not in unsynchronised
        assert not renamed_in, "an earlier rename is not on the disk yet"
        checked += 1
        renamed_in.add(str(target.parent))
        replace(source, target)

    monkeypatch.setattr(os, "write", watched_write)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    action(work)
    assert checked >= 5
    assert not renamed_in


@every_step
def test_killed_again_while_recovering(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    before = trees[start]
    journal = Store(before).load()
    done = copy(before, tmp_path / "done")
    calls = calls_of(action, done)
    after = user_files(done)
    renames = [number for number, name in enumerate(calls) if name == "replace"]
    for number in renames[-3:]:  # the user's files, and the commit
        first = copy(before, tmp_path / "first")
        assert in_child(action, first, number, die) == -signal.SIGKILL
        assert status(first).state is State.INTERRUPTED
        total = len(calls_of(recover, copy(first, tmp_path / "work")))
        for again in range(total):
            work = copy(first, tmp_path / "work")
            assert in_child(recover, work, again, die) == -signal.SIGKILL
            recover(work)
            _check_whole(work, before, after, journal)


@every_step
def test_full_disk_changes_nothing(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    """No space from some call on: either the change was made, or it is refused and every byte is as before."""
    before = trees[start]
    done = copy(before, tmp_path / "done")
    total = len(calls_of(action, done))
    codes = []
    for number in range(total):
        work = copy(before, tmp_path / "work")
        codes.append(in_child(action, work, number, disk_full, for_good=True))
        if codes[-1] == 2:
            assert snapshot(work) == snapshot(before)
        else:
            assert user_files(work) == user_files(done)
    assert set(codes) == {0, 2}
    assert codes == sorted(codes, reverse=True)


@every_step
def test_a_failing_call_changes_nothing(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    """An input/output error at one call: refused with nothing changed, or the change was made already."""
    before = trees[start]
    done = copy(before, tmp_path / "done")
    total = len(calls_of(action, done))
    codes = set()
    for number in range(total):
        work = copy(before, tmp_path / "work")
        code = in_child(action, work, number, io_error)
        codes.add(code)
        assert code in (0, 2)
        assert user_files(work) == user_files(before if code == 2 else done)
        recover(work)
        assert user_files(work) == user_files(before if code == 2 else done)
    assert codes == {0, 2}


@every_step
def test_ctrl_c_at_every_call(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    before = trees[start]
    done = copy(before, tmp_path / "done")
    calls = calls_of(action, done)
    commit_point = max(number for number, name in enumerate(calls) if name == "replace")
    for number in range(len(calls)):
        work = copy(before, tmp_path / "work")
        assert in_child(action, work, number, ctrl_c) == 130
        if number <= commit_point:
            assert user_files(work) == user_files(before)
            assert status(work).state == status(before).state
        else:
            assert user_files(work) == user_files(done)
        recover(work)
        assert user_files(work) == user_files(before if number <= commit_point else done)


def test_a_disk_that_fails_for_good_half_way_is_left_to_recover(trees: dict[str, Path], tmp_path: Path) -> None:
    calls = calls_of(patch, copy(trees["plain"], tmp_path / "work"))
    second_file = [number for number, name in enumerate(calls) if name == "replace"][-2]
    work = copy(trees["plain"], tmp_path / "work")
    assert in_child(patch, work, second_file, io_error, for_good=True) == 4
    assert status(work).state is State.INTERRUPTED
    with pytest.raises(Interrupted, match="stopped half-way") as caught:
        plan_update(work, rules)
    assert caught.value.exit_code == 2
    assert recover(work) is Recovery.ROLLED_BACK
    assert snapshot(work) == snapshot(trees["plain"])


@pytest.fixture
def half_patched(trees: dict[str, Path], tmp_path: Path) -> Path:
    """Killed between the two files: layers.py is patched, math.py is not."""
    calls = calls_of(patch, copy(trees["plain"], tmp_path / "work"))
    second_file = [number for number, name in enumerate(calls) if name == "replace"][-2]
    work = copy(trees["plain"], tmp_path / "work")
    assert in_child(patch, work, second_file, die) == -signal.SIGKILL
    assert b"chipmunk" in (work / "src/flux/layers.py").read_bytes()
    assert b"chipmunk" not in (work / "src/flux/math.py").read_bytes()
    return work


def test_the_status_says_how_far_a_killed_run_came(half_patched: Path) -> None:
    found = status(half_patched)
    assert found.state is State.INTERRUPTED
    assert {file.path: file.state for file in found.files} == {
        "src/flux/layers.py": FileState.REPLACED,
        "src/flux/math.py": FileState.WAITING,
    }
    assert found.next_command == f"chipmunk revert {half_patched}"


def test_edits_made_after_the_kill_are_kept(half_patched: Path) -> None:
    for name in ("layers", "math"):
        with (half_patched / f"src/flux/{name}.py").open("ab") as file:
            file.write(b"# mine\n")
    assert revert(half_patched).recovery is Recovery.ROLLED_BACK
    assert (half_patched / "src/flux/layers.py").read_bytes() == LAYERS + b"# mine\n"
    assert (half_patched / "src/flux/math.py").read_bytes() == SMALL["src/flux/math.py"] + b"# mine\n"
    assert not (half_patched / ".chipmunk").exists()


def test_edits_of_the_same_lines_after_the_kill_stop_the_recovery(half_patched: Path) -> None:
    layers = half_patched / "src/flux/layers.py"
    layers.write_bytes(layers.read_bytes().replace(b"chipmunk.sdpa(q, k, v)", b"chipmunk.sdpa(q, k, v) * 2"))
    before = user_files(half_patched)
    with pytest.raises(Conflict, match=r"src/flux/layers.py:8") as caught:
        recover(half_patched)
    assert caught.value.exit_code == 3
    assert {path: entry for path, entry in before.items() if not path.endswith(".tmp")} == user_files(half_patched)
    layers.write_bytes(LAYERS)
    assert recover(half_patched) is Recovery.ROLLED_BACK
    assert not (half_patched / ".chipmunk").exists()


def test_a_file_deleted_after_the_kill_stays_deleted(half_patched: Path) -> None:
    (half_patched / "src/flux/layers.py").unlink()
    assert recover(half_patched) is Recovery.ROLLED_BACK
    assert sorted(user_files(half_patched)) == ["src", "src/flux", "src/flux/math.py"]
