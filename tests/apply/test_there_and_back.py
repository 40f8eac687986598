"""Patch, patch again, revert: every byte, mode and link is what it was, and the folder explains itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, few, make, patch, rules, snapshot
from hypothesis import given
from hypothesis import strategies as st

from chipmunk import __version__
from chipmunk.apply import Recovery, State, carry_out, plan_revert, plan_update, recover, revert, status, unified
from chipmunk.rewrite.plan import FileChange, Plan, SiteStatus


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
