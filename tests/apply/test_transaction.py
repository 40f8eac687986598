"""All files or none: whatever stops a run, the tree is whole, or the next command makes it so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, copy, make, patch, rules, rules_2, snapshot

from chipmunk.apply import (
    Busy,
    Conflict,
    FileState,
    Interrupted,
    Journal,
    Recovery,
    Refused,
    Repository,
    State,
    Store,
    carry_out,
    commit,
    plan_update,
    read,
    recover,
    revert,
    status,
)
from chipmunk.apply import disk as disk_module
from chipmunk.rewrite.plan import FileChange, Plan

CALLS = [
    "write",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "fchmod",
    "fchown",
    "open",
]
"""Every `os` function through which this package changes the disk, or could."""
SMALL = {path: FILES[path] for path in ("src/flux/math.py", "src/flux/layers.py")}
Action = Callable[[Path], object]


def _stop_at(number: int, how: Callable[[str], None], for_good: bool = False) -> list[str]:
    """From now on, count this process's calls that change the disk; at call `number`, do `how` before it.

    A write is cut in two first, so that half of it is done. With -1, nothing is stopped; the calls are listed. With
    `for_good`, every later call is stopped too.
    """
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if name == "open" and not int(args[1]) & os.O_CREAT:  # type: ignore[call-overload]
                return real(*args, **kwargs)
            seen.append(name)
            if len(seen) - 1 == number or (for_good and len(seen) > number):
                if name == "write":
                    real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[call-overload]
                how(name)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return seen


def _in_child(action: Action, root: Path, number: int, how: Callable[[str], None], for_good: bool = False) -> int:
    """Run an action in a process of its own, stopped at a call; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            _stop_at(number, how, for_good)
            action(root)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except Interrupted:
            code = 4
        except Conflict:
            code = 3
        except Refused as error:
            code = 2 if "nothing was changed" in str(error) and error.next_command else 98
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _calls(action: Action, root: Path) -> list[str]:
    """What an action calls, run to its end in this process."""
    real = {name: getattr(os, name) for name in CALLS}
    try:
        seen = _stop_at(-1, lambda name: None)
        action(root)
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    return seen


def _die(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full(name: str) -> None:
    if name in ("write", "open", "mkdir"):  # renaming over a file and removing need no space
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _broken(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _interrupt(name: str) -> None:
    raise KeyboardInterrupt


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


def _user_files(root: Path) -> dict[str, tuple[str, int, str]]:
    return {path: entry for path, entry in snapshot(root).items() if not path.startswith(".chipmunk")}


def _check_whole(
    work: Path, before: Path, after: dict[str, tuple[str, int, str]], journal_before: Journal | None
) -> bool:
    """After recovery the tree is exactly that before, with its journal, or exactly that after; tells whether before."""
    found = _user_files(work)
    assert not [path for path in snapshot(work) if path.endswith(".tmp")]
    if found == _user_files(before) and found != after:
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
    total = len(_calls(action, done))
    after = _user_files(done)
    states = set()
    for number in range(total):
        work = copy(before, tmp_path / "work")
        assert _in_child(action, work, number, _die) == -signal.SIGKILL
        states.add(status(work).state)
        outcome = recover(work)
        was_before = _check_whole(work, before, after, journal)
        states.add((outcome, was_before))
        assert recover(work) is Recovery.NOTHING
        action(work)
        assert _user_files(work) == after
    assert _in_child(action, copy(before, tmp_path / "work"), total, _die) == 0  # so every call was tried
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
    counted = _calls(patch, work) + _calls(revert, work)
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
    calls = _calls(action, done)
    after = _user_files(done)
    renames = [number for number, name in enumerate(calls) if name == "replace"]
    for number in renames[-3:]:  # the user's files, and the commit
        first = copy(before, tmp_path / "first")
        assert _in_child(action, first, number, _die) == -signal.SIGKILL
        assert status(first).state is State.INTERRUPTED
        total = len(_calls(recover, copy(first, tmp_path / "work")))
        for again in range(total):
            work = copy(first, tmp_path / "work")
            assert _in_child(recover, work, again, _die) == -signal.SIGKILL
            recover(work)
            _check_whole(work, before, after, journal)


@every_step
def test_full_disk_changes_nothing(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    """No space from some call on: either the change was made, or it is refused and every byte is as before."""
    before = trees[start]
    done = copy(before, tmp_path / "done")
    total = len(_calls(action, done))
    codes = []
    for number in range(total):
        work = copy(before, tmp_path / "work")
        codes.append(_in_child(action, work, number, _full, for_good=True))
        if codes[-1] == 2:
            assert snapshot(work) == snapshot(before)
        else:
            assert _user_files(work) == _user_files(done)
    assert set(codes) == {0, 2}
    assert codes == sorted(codes, reverse=True)


@every_step
def test_a_failing_call_changes_nothing(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    """An input/output error at one call: refused with nothing changed, or the change was made already."""
    before = trees[start]
    done = copy(before, tmp_path / "done")
    total = len(_calls(action, done))
    codes = set()
    for number in range(total):
        work = copy(before, tmp_path / "work")
        code = _in_child(action, work, number, _broken)
        codes.add(code)
        assert code in (0, 2)
        assert _user_files(work) == _user_files(before if code == 2 else done)
        recover(work)
        assert _user_files(work) == _user_files(before if code == 2 else done)
    assert codes == {0, 2}


@every_step
def test_ctrl_c_at_every_call(trees: dict[str, Path], tmp_path: Path, start: str, action: Action) -> None:
    before = trees[start]
    done = copy(before, tmp_path / "done")
    calls = _calls(action, done)
    commit_point = max(number for number, name in enumerate(calls) if name == "replace")
    for number in range(len(calls)):
        work = copy(before, tmp_path / "work")
        assert _in_child(action, work, number, _interrupt) == 130
        if number <= commit_point:
            assert _user_files(work) == _user_files(before)
            assert status(work).state == status(before).state
        else:
            assert _user_files(work) == _user_files(done)
        recover(work)
        assert _user_files(work) == _user_files(before if number <= commit_point else done)


def test_a_disk_that_fails_for_good_half_way_is_left_to_recover(trees: dict[str, Path], tmp_path: Path) -> None:
    calls = _calls(patch, copy(trees["plain"], tmp_path / "work"))
    second_file = [number for number, name in enumerate(calls) if name == "replace"][-2]
    work = copy(trees["plain"], tmp_path / "work")
    assert _in_child(patch, work, second_file, _broken, for_good=True) == 4
    assert status(work).state is State.INTERRUPTED
    with pytest.raises(Interrupted, match="stopped half-way") as caught:
        plan_update(work, rules)
    assert caught.value.exit_code == 2
    assert recover(work) is Recovery.ROLLED_BACK
    assert snapshot(work) == snapshot(trees["plain"])


@pytest.fixture
def half_patched(trees: dict[str, Path], tmp_path: Path) -> Path:
    """Killed between the two files: layers.py is patched, math.py is not."""
    calls = _calls(patch, copy(trees["plain"], tmp_path / "work"))
    second_file = [number for number, name in enumerate(calls) if name == "replace"][-2]
    work = copy(trees["plain"], tmp_path / "work")
    assert _in_child(patch, work, second_file, _die) == -signal.SIGKILL
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
    before = _user_files(half_patched)
    with pytest.raises(Conflict, match=r"src/flux/layers.py:8") as caught:
        recover(half_patched)
    assert caught.value.exit_code == 3
    assert {path: entry for path, entry in before.items() if not path.endswith(".tmp")} == _user_files(half_patched)
    layers.write_bytes(LAYERS)
    assert recover(half_patched) is Recovery.ROLLED_BACK
    assert not (half_patched / ".chipmunk").exists()


def test_a_file_deleted_after_the_kill_stays_deleted(half_patched: Path) -> None:
    (half_patched / "src/flux/layers.py").unlink()
    assert recover(half_patched) is Recovery.ROLLED_BACK
    assert sorted(_user_files(half_patched)) == ["src", "src/flux", "src/flux/math.py"]


# --- what is refused before anything is written --------------------------------------------------------------------


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


# --- two runs at once ----------------------------------------------------------------------------------------------

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
    assert _user_files(tmp_path) in (pristine, patched)
    revert(tmp_path)
    assert snapshot(tmp_path) == pristine


def _user_files_of_patched(root: Path) -> dict[str, tuple[str, int, str]]:
    patch(root)
    found = _user_files(root)
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


def test_a_chipmunk_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    root, elsewhere = make(tmp_path / "root"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / ".chipmunk").symlink_to(elsewhere)
    with pytest.raises(Refused, match="not a link"):
        patch(root)
    assert not list(elsewhere.iterdir())


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
