"""Patch, patch again, edit, revert: what is on the disk is never anything but what one would expect."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, MATH, copy, make, patch, rules, rules_2, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipmunk import __version__
from chipmunk.apply import (
    Conflict,
    FileState,
    JournalDamaged,
    JournalMissing,
    Recovery,
    Refused,
    State,
    Store,
    carry_out,
    plan_patch_file,
    plan_revert,
    plan_update,
    recover,
    revert,
    status,
    unified,
)
from chipmunk.apply.merge import merge, merge_python, same_code
from chipmunk.rewrite.plan import FileChange, Plan, SiteStatus

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    make(tmp_path)
    (tmp_path / "src/flux/math.py").chmod(0o755)
    (tmp_path / "src/flux/layers.py").chmod(0o600)
    patch(tmp_path)
    return tmp_path


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


# --- there and back ------------------------------------------------------------------------------------------------


def test_patch_then_revert_is_the_identity(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "src/flux/math.py").chmod(0o755)
    (tmp_path / "src/flux/layers.py").chmod(0o640)
    (tmp_path / "link.py").symlink_to("src/flux/math.py")
    before = snapshot(tmp_path)
    patch(tmp_path)
    after = snapshot(tmp_path)
    assert {p: e[:2] for p, e in after.items() if p in before} == {p: e[:2] for p, e in before.items()}
    assert (tmp_path / "src/flux/dos.py").read_bytes().startswith(b"import chipmunk\r\nimport torch\r\n")
    assert (
        tmp_path / "src/flux/no_end.py"
    ).read_bytes() == b"\xef\xbb\xbfimport chipmunk\nx = 1\ny = chipmunk.sdpa(x, x, x)"
    result = revert(tmp_path)
    assert snapshot(tmp_path) == before
    assert sorted(change.path for change in result.changes) == [p for p in sorted(FILES) if p.startswith("src")]
    again = revert(tmp_path)
    assert again.changes == ()
    assert again.recovery is Recovery.NOTHING
    assert snapshot(tmp_path) == before


some_bytes = st.binary(max_size=60) | st.lists(st.sampled_from([b"a", b"sdpa(", b"\r", b"\xff\x00", b""])).map(
    b"\n".join
)


@few
@given(
    files=st.dictionaries(
        st.sampled_from(["a.py", "b c.py", "d/e.py", "d/é.py", "d/\udcff.py"]),
        st.tuples(some_bytes, some_bytes, st.sampled_from([0o644, 0o755, 0o600, 0o664])),
        min_size=1,
    )
)
def test_any_bytes_there_and_back(tmp_path: Path, files: dict[str, tuple[bytes, bytes, int]]) -> None:
    root = make(Path(tempfile.mkdtemp(dir=tmp_path)), {path: before for path, (before, _, _) in files.items()})
    for path, (_, _, mode) in files.items():
        (root / path).chmod(mode)
    before = snapshot(root)

    def planner(found: dict[str, bytes]) -> Plan:
        return Plan(
            None, tuple(FileChange(p, found[p], after) for p, (_, after, _) in files.items() if found[p] != after), ()
        )

    def go() -> None:
        carry_out(plan_update(root, planner))

    go()
    once = snapshot(root)
    assert {path: (root / path).read_bytes() for path in files} == {
        path: after for path, (_, after, _) in files.items()
    }
    assert {path: once[path][1] for path in files} == {path: before[path][1] for path in files}
    go()
    assert snapshot(root) == once
    revert(root)
    assert snapshot(root) == before


def test_patching_twice_is_patching_once(patched: Path) -> None:
    once = snapshot(patched)
    again = plan_update(patched, rules)
    carry_out(again)
    assert again.changes == ()
    assert {site.status for site in again.plan.sites} == {SiteStatus.ALREADY}
    lines = {site.file: site.line for site in again.plan.sites}
    for path, line in lines.items():
        assert b"chipmunk.sdpa(" in (patched / path).read_bytes().split(b"\n")[line - 1]
    assert snapshot(patched) == once


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path)
    before = snapshot(tmp_path)
    assert len(plan_update(tmp_path, rules).changes) == 4
    assert plan_revert(tmp_path).changes == ()
    status(tmp_path)
    recover(tmp_path)
    assert snapshot(tmp_path) == before


def test_the_folder_explains_itself_and_stays_out_of_commits(patched: Path) -> None:
    folder = patched / ".chipmunk"
    assert (folder / ".gitignore").read_bytes() == b"*\n"
    assert b"revert" in (folder / "README").read_bytes()
    subprocess.run(["git", "init", "-q"], cwd=patched, check=True)
    listed = subprocess.run(["git", "status", "--short", "-uall"], cwd=patched, capture_output=True, check=True).stdout
    assert b".chipmunk" not in listed
    journal = json.loads((folder / "journal.json").read_text())
    assert journal["format"] == 1
    assert journal["body"]["tool"] == __version__
    assert journal["body"]["patches"] == {"attention": "1"}
    modes = {file["path"]: file["mode"] for file in journal["body"]["files"]}
    assert modes["src/flux/math.py"] == 0o755
    assert modes["src/flux/layers.py"] == 0o600
    assert (folder / f"changes-{journal['body']['id']}.diff").read_bytes() == unified(rules(FILES).changes)


def test_the_diff_in_the_journal_undoes_the_patch_without_chipmunk(patched: Path) -> None:
    diff = next((patched / ".chipmunk").glob("changes-*.diff"))
    subprocess.run(["git", "apply", "-R", diff], cwd=patched, check=True)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES
    assert status(patched).state is State.UNPATCHED
    assert revert(patched).changes == ()
    assert not (patched / ".chipmunk").exists()


def test_the_journal_is_as_private_as_the_files(patched: Path) -> None:
    secret = {hashlib.sha256(data).hexdigest() for data in (LAYERS, (patched / "src/flux/layers.py").read_bytes())}
    for path in (patched / ".chipmunk/objects").iterdir():
        assert (path.stat().st_mode & 0o077 == 0) == (path.name in secret)
    assert next((patched / ".chipmunk").glob("changes-*.diff")).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_writes_belongs_to_the_owner_of_the_repository(tmp_path: Path) -> None:
    make(tmp_path)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, 1234, 1235)
    patch(tmp_path)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.rglob("*")} == {(1234, 1235)}
    revert(tmp_path)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.rglob("*")} == {(1234, 1235)}


# --- edited since --------------------------------------------------------------------------------------------------


def test_a_revert_keeps_the_user_s_edits(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"    # both at once\n", b"    # both\n    # at once\n")
    edit(patched / "src/flux/math.py", b"import torch\n", b"import torch\nimport einops\n")
    (patched / "src/flux/math.py").chmod(0o700)
    (patched / "new.py").write_bytes(b"import flux\n")
    assert status(patched).state is State.EDITED
    states = {file.path: file.state for file in status(patched).files}
    assert states.pop("src/flux/math.py") is FileState.EDITED
    assert set(states.values()) == {FileState.PATCHED}
    result = revert(patched)
    assert result.merged == ("src/flux/math.py",)
    assert result.leftovers == ()
    wanted = MATH.replace(b"# both at once", b"# both\n    # at once").replace(
        b"import torch", b"import torch\nimport einops"
    )
    assert (patched / "src/flux/math.py").read_bytes() == wanted
    assert (patched / "src/flux/math.py").stat().st_mode & 0o777 == 0o700
    assert (patched / "src/flux/layers.py").read_bytes() == LAYERS
    assert not (patched / ".chipmunk").exists()


def test_the_user_s_own_calls_of_chipmunk_are_named(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"    return x * pe\n", b"    return chipmunk.sdpa(x) * pe\n")
    result = revert(patched)
    assert [(place.file, place.line) for place in result.leftovers] == [("src/flux/math.py", 16)]


def test_where_edits_overlap_nothing_is_written_and_the_lines_are_named(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"x = chipmunk.sdpa(q, k, v)", b"x = chipmunk.sdpa(q, k, v, 0.5)")
    edit(patched / "src/flux/layers.py", b"return chipmunk.sdpa(", b"return 2 * chipmunk.sdpa(")
    edit(patched / "src/flux/dos.py", b"class Block", b"class Blocks")
    before = snapshot(patched)
    with pytest.raises(Conflict) as caught:
        revert(patched)
    assert caught.value.exit_code == 3
    assert [(place.file, place.line) for place in caught.value.places] == [
        ("src/flux/layers.py", 8),
        ("src/flux/math.py", 7),
    ]
    assert "src/flux/math.py:7: edited since" in str(caught.value)
    assert "next: chipmunk diff" in str(caught.value)
    assert snapshot(patched) == before
    states = {file.path: file.state for file in status(patched).files}
    assert states["src/flux/math.py"] is FileState.OVERLAPPING
    assert states["src/flux/dos.py"] is FileState.EDITED


def told(error: Conflict) -> list[str]:
    """The words of the command that an error names."""
    return shlex.split((error.next_command or "").partition("   (")[0])


def test_a_deleted_file_stops_a_revert(patched: Path) -> None:
    """The journal has its bytes, so it needs no version control, whose bytes may be others."""
    (patched / "src/flux/layers.py").unlink()
    before = snapshot(patched)
    with pytest.raises(Conflict, match=r"src/flux/layers.py: deleted or renamed") as caught:
        revert(patched)
    assert snapshot(patched) == before
    subprocess.run(told(caught.value), check=True)
    revert(patched)
    assert (patched / "src/flux/layers.py").read_bytes() == LAYERS
    assert not (patched / ".chipmunk").exists()


def test_a_renamed_file_is_found(patched: Path) -> None:
    (patched / "src/flux/layers.py").rename(patched / "src/flux/blocks.py")
    assert {file.state for file in status(patched).files} == {FileState.PATCHED, FileState.MISSING}
    with pytest.raises(Conflict, match=r"src/flux/layers.py: renamed to src/flux/blocks.py") as caught:
        revert(patched)
    subprocess.run(told(caught.value), check=True)
    revert(patched)
    assert (patched / "src/flux/layers.py").read_bytes() == LAYERS


def test_files_put_back_by_hand_need_no_revert(patched: Path) -> None:
    make(patched)
    assert status(patched).state is State.UNPATCHED
    assert revert(patched).changes == ()
    assert not (patched / ".chipmunk").exists()


def test_one_file_put_back_by_hand(patched: Path) -> None:
    (patched / "src/flux/math.py").write_bytes(MATH)
    assert status(patched).state is State.EDITED
    update = plan_update(patched, rules)
    assert [change.path for change in update.changes] == ["src/flux/math.py"]
    statuses = {site.file: site.status for site in update.plan.sites}
    assert statuses["src/flux/math.py"] is SiteStatus.PATCHED
    assert statuses["src/flux/layers.py"] is SiteStatus.ALREADY
    carry_out(update)
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


own_lines = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([b"# one", b"x = 2", b"", b"\tpass"])), max_size=5)


@few
@given(added=own_lines)
def test_lines_added_between_hunks_survive_patching_again_and_reverting(
    tmp_path: Path, added: list[tuple[int, bytes]]
) -> None:
    """The user's lines go after lines that Chipmunk left alone, in the original and in the patched file alike."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    lines = [b"line %d" % n for n in range(40)]
    lines[7], lines[25] = b"x = sdpa(q)", b"y = sdpa(k)"
    plain = {"m.py": b"\n".join(lines) + b"\n"}
    make(root, plain)
    patch(root)
    own: dict[bytes, list[bytes]] = {}
    for number, text in added:
        if number < 40 and b"sdpa" not in lines[number]:
            own.setdefault(lines[number], []).append(text)

    def with_own(data: bytes) -> bytes:
        return b"".join(b"\n".join([line, *own.get(line, [])]) + b"\n" for line in data.split(b"\n")[:-1])

    (root / "m.py").write_bytes(with_own((root / "m.py").read_bytes()))
    assert plan_update(root, rules).changes == ()
    carry_out(plan_update(root, rules_2))
    assert (root / "m.py").read_bytes() == rules_2({"m.py": with_own(plain["m.py"])}).changes[0].after
    revert(root)
    assert (root / "m.py").read_bytes() == with_own(plain["m.py"])
    assert not (root / ".chipmunk").exists()


# --- new rules -----------------------------------------------------------------------------------------------------


def test_new_rules_replace_old_ones_and_the_originals_stay(patched: Path) -> None:
    update = plan_update(patched, rules_2)
    carry_out(update)
    fresh = rules_2({path: data for path, data in FILES.items() if path.endswith(".py")})
    assert {c.path: (patched / c.path).read_bytes() for c in fresh.changes} == {c.path: c.after for c in fresh.changes}
    journal = Store(patched).load()
    assert journal is not None
    assert journal.patches == {"attention": "2"}
    assert {file.path: file.original for file in journal.files} == {c.path: c.before for c in fresh.changes}
    assert journal.file("src/flux/math.py").mode == 0o755  # type: ignore[union-attr]
    assert len(list((patched / ".chipmunk").glob("changes-*.diff"))) == 1
    assert len(list((patched / ".chipmunk/objects").iterdir())) == 8
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_new_rules_after_edits_keep_the_edits_even_through_a_revert(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"# both at once", b"# twice")
    carry_out(plan_update(patched, rules_2))
    assert b"chipmunk.sdpa(None, q, k, v)" in (patched / "src/flux/math.py").read_bytes()
    assert status(patched).state is State.PATCHED
    revert(patched)
    assert (patched / "src/flux/math.py").read_bytes() == MATH.replace(b"# both at once", b"# twice")


def test_rules_that_leave_a_file_alone_now_give_its_original_back(patched: Path) -> None:
    def fewer(files: dict[str, bytes]) -> Plan:
        plan = rules(files)
        return replace(plan, changes=tuple(change for change in plan.changes if "layers" not in change.path))

    carry_out(plan_update(patched, fewer))
    assert (patched / "src/flux/layers.py").read_bytes() == LAYERS
    assert b"chipmunk" in (patched / "src/flux/math.py").read_bytes()


def test_rules_that_find_nothing_at_all_take_nothing_out(patched: Path) -> None:
    before = snapshot(patched)
    update = plan_update(patched, lambda files: Plan(None, (), ()))
    carry_out(update)
    assert update.changes == ()
    assert snapshot(patched) == before


def test_new_rules_on_overlapping_edits_are_a_conflict_only_if_they_want_that_file(patched: Path) -> None:
    edit(patched / "src/flux/math.py", b"x = chipmunk.sdpa(q, k, v)", b"x = chipmunk.sdpa(q, k, v, 0.5)")
    assert plan_update(patched, rules).changes == ()  # they find it patched already
    with (patched / "src/flux/math.py").open("ab") as file:
        file.write(b"\n\nz = sdpa(1)\n")
    before = snapshot(patched)
    with pytest.raises(Conflict, match=r"src/flux/math.py:7") as caught:
        plan_update(patched, rules)
    assert caught.value.exit_code == 3
    assert snapshot(patched) == before


def together(files: dict[str, bytes]) -> Plan:
    """Rules that patch other files only where math.py holds the call that these lead to."""
    plan = rules(files)
    if any(site.file == "src/flux/math.py" for site in plan.sites):
        return plan
    return replace(plan, changes=plan.changes[-1:], sites=plan.sites[-1:])  # of setup.py and its like


@pytest.mark.parametrize("how", ["the call deleted", "the file deleted"])
def test_a_patch_is_not_taken_out_because_lines_of_it_were_deleted_elsewhere(patched: Path, how: str) -> None:
    """As where the attention function goes: the calls in the blocks would silently lose what leads to it."""
    if how == "the call deleted":
        edit(
            patched / "src/flux/math.py",
            b"    x = chipmunk.sdpa(q, k, v)\n    return x\n",
            b"    return flash(q, k, v)\n",
        )
    else:
        (patched / "src/flux/math.py").unlink()
    before = snapshot(patched)
    with pytest.raises(Conflict, match=r"would take attention out of .*src/flux/layers.py") as caught:
        plan_update(patched, together)
    assert [place.file for place in caught.value.places] == ["src/flux/math.py"]
    assert snapshot(patched) == before


def test_a_patch_that_is_no_longer_asked_for_is_taken_out_all_the_same(patched: Path) -> None:
    edit(
        patched / "src/flux/math.py", b"    x = chipmunk.sdpa(q, k, v)\n    return x\n", b"    return flash(q, k, v)\n"
    )
    update = plan_update(patched, lambda files: replace(together(files), patches={"mlp": "1"}))
    assert "src/flux/layers.py" in {change.path for change in update.changes}


def test_what_is_taken_out_is_told(patched: Path) -> None:
    def careful(files: dict[str, bytes]) -> Plan:
        """Rules that leave a call alone where a comment asks for it."""
        plan = rules(files)
        changes = tuple(change for change in plan.changes if b"# dense" not in change.before)
        changed = {change.path for change in changes}
        dense = {"status": SiteStatus.LEFT_DENSE, "reason": "a comment asks for it"}
        return replace(
            plan, changes=changes, sites=tuple(s if s.file in changed else replace(s, **dense) for s in plan.sites)
        )

    edit(patched / "src/flux/layers.py", b"class Block:", b"class Block:  # dense")
    update = plan_update(patched, careful)
    (site,) = [site for site in update.plan.sites if "layers" in site.file]
    assert site.reason == "a comment asks for it; what Chipmunk had changed here is taken out"
    assert (site.status, site.line) == (SiteStatus.LEFT_DENSE, 8)  # a line further down than without the import
    carry_out(update)
    (site,) = [site for site in plan_update(patched, careful).plan.sites if "layers" in site.file]
    assert site.reason == "a comment asks for it"


def test_code_that_moved_to_another_file_keeps_the_patch(patched: Path) -> None:
    edit(
        patched / "src/flux/math.py", b"    x = chipmunk.sdpa(q, k, v)\n    return x\n", b"    return other(q, k, v)\n"
    )
    (patched / "src/flux/other.py").write_bytes(
        b"import chipmunk\n\n\ndef other(q, k, v):\n    return chipmunk.sdpa(q, k, v)\n"
    )
    assert plan_update(patched, rules).changes == ()


def test_a_file_that_came_since_is_patched_and_joins_the_journal(patched: Path) -> None:
    make(patched, {"src/flux/new.py": LAYERS})
    update = plan_update(patched, rules)
    assert [change.path for change in update.changes] == ["src/flux/new.py"]
    carry_out(update)
    revert(patched)
    assert (patched / "src/flux/new.py").read_bytes() == LAYERS
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_two_names_of_a_file_that_would_differ_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "link.py").symlink_to("src/flux/math.py")

    def planner(files: dict[str, bytes]) -> Plan:
        changes = [FileChange(path, files[path], path.encode()) for path in ("link.py", "src/flux/math.py")]
        return Plan(None, tuple(changes), ())

    with pytest.raises(Refused, match="the same file"):
        plan_update(tmp_path, planner)


# --- a journal that is damaged, deleted, or a stranger's ------------------------------------------------------------


def _damage(store: Store, how: str) -> None:
    text = store.journal.read_text()
    journal = Store(store.root).load()
    assert journal is not None
    first = next(store.folder.glob("objects/*"))
    match how:
        case "cut short":
            store.journal.write_text(text[: len(text) // 2])
        case "emptied":
            store.journal.write_text("")
        case "not an object":
            store.journal.write_text("[]")
        case "a path altered":
            store.journal.write_text(text.replace("layers.py", "other.py"))
        case "a hash altered":
            store.journal.write_text(text.replace('"original": "', '"original": "0', 1))
        case "journal deleted":
            store.journal.unlink()
        case "object deleted":
            first.unlink()
        case "object altered":
            first.write_bytes(b"x" + first.read_bytes())
        case "object emptied":
            first.write_bytes(b"")
        case "all objects deleted":
            for path in store.folder.glob("objects/*"):
                path.unlink()


@pytest.mark.parametrize(
    "how",
    [
        *["cut short", "emptied", "not an object", "a path altered", "a hash altered", "journal deleted"],
        *["object deleted", "object altered", "object emptied", "all objects deleted"],
    ],
)
@pytest.mark.parametrize("git", [False, True])
def test_a_damaged_journal_is_noticed_and_nothing_is_lost(patched: Path, how: str, git: bool) -> None:
    if git:
        (patched / ".git").mkdir()
    _damage(Store(patched), how)
    before = snapshot(patched)
    found = status(patched)
    assert found.state is State.DAMAGED
    assert found.message is not None
    for action in (revert, patch, recover):
        with pytest.raises(JournalDamaged, match="damaged") as caught:
            action(patched)
        assert caught.value.exit_code == 2
        assert ("checkout" if git else "git apply -R") in str(caught.value.next_command)
        assert {p: e for p, e in snapshot(patched).items() if p != ".chipmunk/lock"} == {
            p: e for p, e in before.items() if p != ".chipmunk/lock"
        }


def test_a_deleted_chipmunk_folder_is_noticed(patched: Path) -> None:
    copy(patched / ".chipmunk", patched / "elsewhere")
    shutil.rmtree(patched / ".chipmunk")
    before = snapshot(patched)
    assert status(patched).state is State.NO_JOURNAL
    with pytest.raises(JournalMissing, match="no journal") as caught:
        revert(patched)
    assert caught.value.exit_code == 2
    assert {place.file for place in caught.value.places} == {path for path in FILES if path.startswith("src")}
    assert "checkout --" in str(caught.value)
    assert snapshot(patched) == before
    assert plan_update(patched, rules).changes == ()
    copy(patched / "elsewhere", patched / ".chipmunk")
    shutil.rmtree(patched / "elsewhere")
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_code_that_only_mentions_chipmunk_is_not_taken_for_patched(tmp_path: Path) -> None:
    make(tmp_path, {"zoo.py": b"# import chipmunk\nimport chipmunks\nx = 'import chipmunk'\n"})
    assert status(tmp_path).state is State.UNPATCHED
    assert revert(tmp_path).changes == ()


def test_somebody_else_s_file_in_the_folder_is_left_alone(patched: Path) -> None:
    for folder in (".chipmunk", ".chipmunk/objects"):
        (patched / folder / ".DS_Store").write_bytes(b"x")
    revert(patched)
    assert status(patched).state is State.UNPATCHED
    assert sorted(str(p.relative_to(patched)) for p in (patched / ".chipmunk").rglob("*")) == [
        ".chipmunk/.DS_Store",
        ".chipmunk/objects",
        ".chipmunk/objects/.DS_Store",
    ]
    patch(patched)
    assert status(patched).state is State.PATCHED
    revert(patched)
    assert {path: (patched / path).read_bytes() for path in FILES} == FILES


def test_a_newer_journal_is_refused(patched: Path) -> None:
    store = Store(patched)
    outer = json.loads(store.journal.read_text())
    store.journal.write_text(json.dumps({**outer, "format": 2}))
    with pytest.raises(Refused, match="newer Chipmunk") as caught:
        revert(patched)
    assert "pip install --upgrade" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../victim.py", "/tmp/victim.py", ".git/config", "a/../../victim.py", ".chipmunk/lock"]
)
def test_a_stranger_s_journal_cannot_reach_outside(tmp_path: Path, path: str) -> None:
    """A repository may be cloned together with a `.chipmunk` folder made to do harm: sums right, paths wrong."""
    from chipmunk.apply.journal import Journal, JournalFile, journal_document, transaction_document

    root = make(tmp_path / "root")
    patch(root)
    store = Store(root)
    journal = store.load()
    assert journal is not None
    hostile = replace(journal, files=(JournalFile(path, MATH, MATH + b"#\n", 0o644), *journal.files))
    store.journal.write_bytes(journal_document(hostile))
    with pytest.raises(JournalDamaged, match="outside the repository"):
        revert(root)
    store.journal.write_bytes(journal_document(Journal()))
    store.underway.write_bytes(transaction_document("0" * 16, [FileChange(path, MATH, LAYERS)]))
    with pytest.raises(JournalDamaged, match="outside the repository"):
        recover(root)


@pytest.mark.parametrize("through", ["a folder", "the objects"])
def test_a_stranger_s_links_cannot_reach_outside(tmp_path: Path, through: str) -> None:
    from chipmunk.apply.journal import transaction_document

    root, outside = make(tmp_path / "root"), make(tmp_path / "outside", {"victim.py": MATH, "a" * 64: b"dear"})
    patch(root)
    before = snapshot(outside)
    store = Store(root)
    if through == "a folder":
        (root / "link").symlink_to(outside)
        store.underway.write_bytes(transaction_document("0" * 16, [FileChange("link/victim.py", LAYERS, MATH)]))
        for data in (MATH, LAYERS):
            store.object(hashlib.sha256(data).hexdigest()).write_bytes(data)
    else:
        shutil.rmtree(store.folder / "objects")
        (store.folder / "objects").symlink_to(outside)
    for action in (recover, revert, patch):
        with pytest.raises(JournalDamaged):
            action(root)
    assert snapshot(outside) == before


def test_sites_in_the_journal_are_told_from_the_originals(patched: Path) -> None:
    first = Store(patched).load()
    assert first is not None
    carry_out(plan_update(patched, rules_2))
    second = Store(patched).load()
    assert second is not None
    assert second.sites == first.sites
    for site in second.sites:
        assert b"sdpa(" in FILES[site.file].split(b"\n")[site.line - 1]
    layers = (patched / "src/flux/layers.py").read_bytes()
    saved = unified([FileChange("src/flux/layers.py", layers, layers.replace(b"class Block", b"class Blocks"))])
    carry_out(plan_patch_file(patched, saved))
    third = Store(patched).load()
    assert third is not None
    assert [site.line for site in third.sites if site.patch == "apply"] == [5]
    assert LAYERS.split(b"\n")[4] == b"class Block:"


# --- merging -------------------------------------------------------------------------------------------------------


def _variant(base: list[bytes], changes: list[tuple[int, str, bytes]]) -> bytes:
    lines = [[line] for line in base]
    for number, how, text in changes:
        new = {"replace": [text], "delete": [], "insert": [text, base[number]], "append": [base[number], text]}[how]
        lines[number] = new
    return b"".join(line + b"\n" for group in lines for line in group)


changes_of_lines = st.lists(
    st.tuples(
        st.integers(0, 11), st.sampled_from(["replace", "delete", "insert", "append"]), st.sampled_from([b"X", b"Y"])
    ),
    max_size=3,
    unique_by=lambda change: change[0],
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mine=changes_of_lines, yours=changes_of_lines)
def test_merging_agrees_with_git(
    tmp_path: Path, mine: list[tuple[int, str, bytes]], yours: list[tuple[int, str, bytes]]
) -> None:
    """Where both merge, the results are equal; where this overlaps, git conflicts (as it does at neighbours, too)."""
    base = [b"line %d" % number for number in range(12)]
    texts = {"base": _variant(base, []), "mine": _variant(base, mine), "yours": _variant(base, yours)}
    make(tmp_path, texts)
    git = subprocess.run(
        ["git", "merge-file", "-p", "mine", "base", "yours"], cwd=tmp_path, capture_output=True, check=False
    )
    merged = merge(texts["base"], texts["mine"], texts["yours"])
    if merged.data is None:
        assert git.returncode > 0
        assert merged.overlaps
    elif git.returncode == 0:
        assert merged.data == git.stdout
    assert merge(texts["base"], texts["yours"], texts["mine"]).data == merged.data


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "wanted"),
    [
        (b"a\nb\nc\n", b"a\nB\nc\n", b"a\nb\nc\n", b"a\nB\nc\n"),
        (b"a\nb\nc\n", b"A\nb\nc\n", b"a\nb\nC\n", b"A\nb\nC\n"),
        (b"a\nb\n", b"A\nb\n", b"a\nB\n", b"A\nB\n"),  # neighbours
        (b"a\nb\n", b"A\nb\n", b"A\nb\n", b"A\nb\n"),  # the same
        (b"a\nb\n", b"A\nb\n", b"Z\nb\n", None),  # the same line
        (b"a\n", b"a\nx\n", b"a\ny\n", None),  # the same place
        (b"a\n", b"x\na\n", b"y\na\n", None),
        (b"a\nb\nc\nd\n", b"a\nd\n", b"a\nb\nX\nc\nd\n", None),  # an insertion inside what was deleted
        (b"a\nb\n", b"a\nb\nc", b"A\nb\n", b"A\nb\nc"),
        (b"a\nb", b"a\nb\n", b"A\nb", b"A\nb\n"),
        (b"a\nb", b"a\nb\nc", b"a\nb\n", None),
        (b"a\r\nb\r\n", b"a\r\nB\r\n", b"A\r\nb\r\n", b"A\r\nB\r\n"),
        (b"a\r\nb\r\n", b"a\nb\n", b"A\r\nb\r\n", None),  # line ends changed everywhere
        (b"", b"a\n", b"", b"a\n"),
        (b"a\n", b"", b"b\n", None),
    ],
)
def test_merging_near_misses(base: bytes, ours: bytes, theirs: bytes, wanted: bytes | None) -> None:
    assert merge(base, ours, theirs).data == wanted


def test_a_merge_that_breaks_the_code_is_an_overlap() -> None:
    base = b"import chipmunk\nx = chipmunk.f(\n    1,\n)\ny = 1\n"
    ours = b"import chipmunk\nx = chipmunk.f(\n    1,\n) + g(2,\n  3)\ny = 1\n"
    theirs = b"x = f(1)\ny = 1\n"
    assert merge_python(base, ours, theirs).data is None
    base, ours, theirs = b"if a:\n    f()\ng()\n", b"if a:\n    f()\n    h()\ng()\n", b"f()\ng()\n"
    assert merge(base, ours, theirs).data == b"f()\n    h()\ng()\n"
    assert merge_python(base, ours, theirs).overlaps == (3,)


def test_a_formatter_s_work_on_patched_lines_is_no_edit(tmp_path: Path) -> None:
    """As a formatter leaves a whole repository, Chipmunk's lines and others: still patched, and still revertible."""
    other = b"    return  x + [1,\n        2]\n"
    plain = b"def forward(self, q):\n    x = sdpa(q, 'a b')\n    y = 1\n" + other
    make(tmp_path, {"m.py": plain})
    patch(tmp_path)
    edit(tmp_path / "m.py", b"chipmunk.sdpa(q, 'a b')", b'chipmunk.sdpa(\n        q,\n        "a b",\n    )')
    edit(tmp_path / "m.py", other, b"    return x + [1, 2]\n")
    edit(tmp_path / "m.py", b"import chipmunk\n", b"import chipmunk\n\n\n")
    before = snapshot(tmp_path)
    carry_out(plan_update(tmp_path, rules))
    assert snapshot(tmp_path) == before
    revert(tmp_path)
    assert (tmp_path / "m.py").read_bytes().lstrip() == plain.replace(other, b"    return x + [1, 2]\n")


@pytest.mark.parametrize(
    ("formatted", "goes_back"),
    [
        (b"import chipmunk\n\nx = chipmunk.sdpa(\n    q\n) + (\n    a  # one\n    + b\n)\n", True),
        (b"import chipmunk\n\nx = chipmunk.sdpa(\n    q\n) + (\n    a  # two\n    + b\n)\n", False),
        (b"import chipmunk\n\nx = chipmunk.sdpa(\n    q\n) + (\n    a  # one\n    - b\n)\n", False),
    ],
    ids=["layout", "comment", "code"],
)
def test_a_file_that_only_a_formatter_changed_goes_back_even_where_its_lines_overlap(
    formatted: bytes, goes_back: bool, tmp_path: Path
) -> None:
    make(tmp_path, {"m.py": b"x = sdpa(q) + (a + b) # one\n"})
    before = snapshot(tmp_path)
    patch(tmp_path)
    (tmp_path / "m.py").write_bytes(formatted)
    if goes_back:
        assert plan_update(tmp_path, rules).changes == ()
        assert revert(tmp_path).merged == ()  # to the byte
        assert snapshot(tmp_path) == before
    else:
        with pytest.raises(Conflict):
            revert(tmp_path)
        assert (tmp_path / "m.py").read_bytes() == formatted


def test_code_moved_out_of_a_branch_is_an_edit_though_its_words_are_the_same(tmp_path: Path) -> None:
    make(tmp_path, {"m.py": b"if a:\n    x = sdpa(q)\n    y = 1\n"})
    patch(tmp_path)
    moved = b"import chipmunk\nif a:\n    x = (\n        chipmunk.sdpa(q))\ny = 1\n"
    (tmp_path / "m.py").write_bytes(moved)
    with pytest.raises(Conflict):
        revert(tmp_path)
    assert (tmp_path / "m.py").read_bytes() == moved


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b"  f(a, b)\n", b"  f(\n    a,\n    b,\n  )\n", True),
        (b"f(a)\n", b"f(\n  a,\n)\n", True),
        (b"x = [a]\n", b"x = [\n  a,\n]\n", True),
        (b"f('a')\n", b'f("a")\n', True),
        (b"x = 1  # one\n", b"x = 1 # one \n", True),
        (b"f(a)\n", b"  f(a)\n", False),  # moved into a branch
        (b"f('a b')\n", b"f('ab')\n", False),
        (b"f('a\"')\n", b'f("a\'")\n', False),
        (b'f("""a\n b""")\n', b'f("""a\nb""")\n', False),
        (b"f(a, b)\n", b"f(a, c)\n", False),
        (b"x = not y\n", b"x = noty\n", False),
        (b"x = 1\n", b"x = 1  # one\n", False),
        (b"x = (a)\n", b"x = (a,)\n", False),  # a tuple
        (b"return (a)\n", b"return (a,)\n", False),
        (b"x = y[a]\n", b"x = y[a,]\n", False),
        (b"x = (a, b)\n", b"x = (\n  a,\n  b,\n)\n", True),
    ],
)
def test_what_counts_as_formatting(one: bytes, other: bytes, same: bool) -> None:
    assert same_code(one, other) is same
    assert same_code(other, one) is same
