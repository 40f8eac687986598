"""Diffs are exact to the byte, and what they say can be read and applied again, here and by git."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, MATH, make, patch, rules, snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chipmunk.apply import (
    Conflict,
    PatchInvalid,
    Refused,
    State,
    carry_out,
    plan_patch_file,
    plan_update,
    revert,
    status,
    unified,
)
from chipmunk.apply.merge import edits, map_line, split_lines
from chipmunk.apply.patchfile import apply_patch, parse
from chipmunk.rewrite.plan import FileChange, SiteStatus

line = st.sampled_from(
    [b"a", b"b", b"", b"\r", b"\x00\xff", b"- a", b"+b", b"\\ x", b"@@ -1 +1 @@", b"--- a/x", b"\x0c\x1c"]
)
text = st.builds(lambda lines, end: b"\n".join(lines) + end, st.lists(line, max_size=14), st.sampled_from([b"", b"\n"]))
name = st.sampled_from(["x.py", "d/é.py", "a b.py", 'q"uo\\te.py', "tab\t.py", "b/x.py", "new\nline.py"])
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(files=st.dictionaries(name, st.tuples(text, text), min_size=1, max_size=3))
@example(files={"x.py": (b"", b"a")})
@example(files={"x.py": (b"a\n", b"")})
@example(files={"x.py": (b"a", b"a\n")})
@example(files={"x.py": (b"a\r\nb", b"a\nb\r\n")})
@example(files={"x.py": (b"\n" * 9, b"\n" * 10)})
def test_git_applies_every_diff_exactly(tmp_path: Path, files: dict[str, tuple[bytes, bytes]]) -> None:
    changes = [FileChange(path, before, after) for path, (before, after) in files.items()]
    diff = unified(changes)
    make(tmp_path, {path: before for path, (before, _) in files.items()})
    if not diff:
        assert all(before == after for before, after in files.values())
        return
    (tmp_path / "x.diff").write_bytes(diff)
    for step, wanted in ((["--check"], 0), ([], 1), (["-R"], 0)):
        subprocess.run(["git", "apply", "--whitespace=nowarn", *step, "x.diff"], cwd=tmp_path, check=True)
        assert {path: (tmp_path / path).read_bytes() for path in files} == {
            p: both[wanted] for p, both in files.items()
        }


@few
@given(files=st.dictionaries(name, st.tuples(text, text), min_size=1, max_size=3))
@example(files={"x.py": (b"", b"a")})
@example(files={"x.py": (b"a\n", b"")})
@example(files={"x.py": (b"a", b"a\n")})
def test_what_is_written_is_read_again(files: dict[str, tuple[bytes, bytes]]) -> None:
    changes = [FileChange(path, before, after) for path, (before, after) in files.items() if before != after]
    if not changes:
        return
    read = {file.path: file for file in parse(b"A letter.\n---\n x | 2 +-\n\n" + unified(changes) + b"-- \n2.39\n")}
    assert set(read) == {change.path for change in changes}
    for change in changes:
        old, new = split_lines(change.before), split_lines(change.after)
        shift = 0
        for hunk in read[change.path].hunks:
            at = hunk.start + shift
            assert old[hunk.start : hunk.start + len(hunk.before)] == list(hunk.before)
            assert new[at : at + len(hunk.after)] == list(hunk.after)
            shift += len(hunk.after) - len(hunk.before)


@few
@given(old=text, new=text)
def test_edits_lead_from_one_text_to_the_other(old: bytes, new: bytes) -> None:
    a, b = split_lines(old), split_lines(new)
    assert b"".join(a) == old
    result, done = [], 0
    for edit in edits(a, b):
        result += a[done : edit.start] + b[edit.new_start : edit.new_stop]
        done = edit.stop
    assert result + a[done:] == b


def test_a_line_is_followed_through_a_change() -> None:
    assert [map_line(b"a\nb\nc\n", b"x\na\nB\nc\n", n) for n in (1, 2, 3)] == [2, 3, 4]
    assert map_line(b"x = 1\ny = f(x)", b"import a\nx = 1 \ny = a.f(x)", 2) == 3
    assert map_line(b"a\n", b"", 1) == 1


def test_a_diff_looks_like_git_s(tmp_path: Path) -> None:
    before, after = MATH, rules({"m.py": MATH}).changes[0].after
    make(tmp_path, {"a/m.py": before, "b/m.py": after})
    out = subprocess.run(
        ["git", "diff", "--no-index", "a/m.py", "b/m.py"], cwd=tmp_path, capture_output=True, check=False
    )
    git = [part for part in out.stdout.split(b"\n") if part[:1] in b" +-" and part[:4] not in (b"--- ", b"+++ ")]
    ours = [
        part
        for part in unified([FileChange("m.py", before, after)]).split(b"\n")
        if part[:1] in b" +-" and part[:4] not in (b"--- ", b"+++ ")
    ]
    assert ours == git


# --- saved patches on another copy ---------------------------------------------------------------------------------


@pytest.fixture
def saved() -> bytes:
    """What `chipmunk diff --output` writes for the toy repository."""
    return unified(rules(FILES).changes)


def test_a_saved_patch_gives_what_patching_gives_and_reverts(tmp_path: Path, saved: bytes) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    pristine = snapshot(two)
    patch(one)
    carry_out(plan_patch_file(two, saved))
    assert {p: (one / p).read_bytes() for p in FILES} == {p: (two / p).read_bytes() for p in FILES}
    assert status(two).state is State.PATCHED
    revert(two)
    assert snapshot(two) == pristine


def test_patching_after_a_saved_patch_has_nothing_to_do(tmp_path: Path, saved: bytes) -> None:
    make(tmp_path)
    carry_out(plan_patch_file(tmp_path, saved))
    assert plan_update(tmp_path, rules).changes == ()


def test_applying_a_patch_twice_is_applying_it_once(tmp_path: Path, saved: bytes) -> None:
    make(tmp_path)
    carry_out(plan_patch_file(tmp_path, saved))
    once = snapshot(tmp_path)
    again = plan_patch_file(tmp_path, saved)
    assert again.changes == ()
    assert {site.status for site in again.plan.sites} == {SiteStatus.ALREADY}
    carry_out(again)
    assert snapshot(tmp_path) == once


def test_lines_that_have_moved_are_found(tmp_path: Path) -> None:
    body = b"def f():\n    a = 1\n    b = sdpa(a)\n    c = 3\n    return c\n"
    gap = b"".join(b"# %d\n" % n for n in range(20))
    saved = unified(rules({"m.py": body + gap + body.replace(b"f", b"g")}).changes)
    assert saved.count(b"@@ -") == 2
    copy = (
        b"# licence\n"
        + body
        + gap.replace(b"# 9\n", b"# 9\n# more\n# and more\n")
        + body.replace(b"f", b"g")
        + b"\nx = 1\n"
    )
    make(tmp_path, {"m.py": copy})
    update = plan_patch_file(tmp_path, saved)
    wanted = b"# licence\nimport chipmunk\n" + copy.removeprefix(b"# licence\n").replace(b"sdpa", b"chipmunk.sdpa")
    assert update.changes[0].after == wanted
    assert [site.line for site in update.plan.sites] == [2, 31]
    assert [site.reason for site in update.plan.sites] == ["found 1 lines further down", "found 3 lines further down"]


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(
    ("before", "after"), [(b"a\nb\nc\nd\n", b"new\na\nb\nc\nd\n"), (b"x\na\nb\nc\nd\n", b"a\nb\nc\nd\n")]
)
def test_a_change_of_the_first_line_is_told_from_one_that_is_there_already(
    tmp_path: Path, before: bytes, after: bytes, shift: int
) -> None:
    saved = unified([FileChange("m.py", before, after)])
    make(tmp_path, {"m.py": b"#\n" * shift + before})
    assert [change.after for change in apply_patch(tmp_path, saved)[0]] == [b"#\n" * shift + after]
    make(tmp_path, {"m.py": b"#\n" * shift + after})
    assert apply_patch(tmp_path, saved)[0] == ()


@few
@given(before=text, after=text)
def test_any_patch_applied_twice_is_applied_once(tmp_path: Path, before: bytes, after: bytes) -> None:
    if before == after:
        return
    saved = unified([FileChange("m.py", before, after)])
    make(tmp_path, {"m.py": before})
    assert [change.after for change in apply_patch(tmp_path, saved)[0]] == [after]
    make(tmp_path, {"m.py": after})
    assert apply_patch(tmp_path, saved)[0] == ()


@pytest.mark.parametrize(
    ("path", "change", "why"),
    [
        ("src/flux/math.py", (b"x = sdpa(q, k, v)", b"x = sdpa(q, k,  v)"), "are not there"),
        ("src/flux/math.py", (b"    return x\n", b"    return  x\n"), "are not there"),  # context must fit exactly too
        ("src/flux/dos.py", (b"\r\n", b"\n"), "are not there"),
        ("src/flux/no_end.py", (b"x, x, x)", b"x, x, x)\n"), "are not there"),
    ],
)
def test_a_patch_that_does_not_fit_changes_nothing(
    tmp_path: Path, saved: bytes, path: str, change: tuple[bytes, bytes], why: str
) -> None:
    make(tmp_path, {**FILES, path: FILES[path].replace(*change)})
    before = snapshot(tmp_path)
    with pytest.raises(Conflict, match=why) as caught:
        plan_patch_file(tmp_path, saved)
    assert caught.value.exit_code == 3
    assert caught.value.file == path
    assert caught.value.line is not None
    assert snapshot(tmp_path) == before


def test_a_patch_never_guesses_between_two_places(tmp_path: Path) -> None:
    body = b"def f():\n    a = 1\n    b = sdpa(a)\n    c = 3\n    return c\n\n\n"
    diff = unified([FileChange("m.py", b"#\n" * 9 + body, b"#\n" * 9 + body.replace(b"sdpa", b"x.sdpa"))])
    diff = diff.replace(b" #\n", b"").replace(b"@@ -9,7 +9,7 @@", b"@@ -10,6 +10,6 @@")
    assert apply_patch(make(tmp_path, {"m.py": body}), diff)[0][0].after == body.replace(b"sdpa", b"x.sdpa")
    make(tmp_path, {"m.py": body + body})
    with pytest.raises(Conflict, match=r"lines 1, 8 would all do"):
        apply_patch(tmp_path, diff)


def test_a_missing_file_is_named(tmp_path: Path, saved: bytes) -> None:
    make(tmp_path)
    (tmp_path / "src/flux/layers.py").unlink()
    with pytest.raises(Conflict, match=r"src/flux/layers.py: there is no such file"):
        plan_patch_file(tmp_path, saved)


def _with_path(path: str) -> bytes:
    return unified([FileChange("PATH", b"a\n", b"b\n")]).replace(b"PATH", path.encode())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_with_path("../evil.py"), "outside"),
        (_with_path("x/../../evil.py"), "outside"),
        (_with_path("x/./m.py"), "outside"),
        (_with_path("/etc/evil.py"), "outside"),
        (_with_path(".git/hooks/pre-commit"), "administration"),
        (_with_path("sub/.GIT/config"), "administration"),
        (_with_path(".chipmunk/journal.json"), "administration"),
        (b"--- /etc/passwd\n+++ /etc/passwd\n@@ -1 +1 @@\n-a\n+b\n", "a/ and b/"),
        (b"--- a/x\n+++ b/y\n@@ -1 +1 @@\n-a\n+b\n", "renames"),
        (b"--- /dev/null\n+++ b/y\n@@ -0,0 +1 @@\n+b\n", "creates"),
        (b"--- a/y\n+++ /dev/null\n@@ -1 +0,0 @@\n-b\n", "deletes"),
        (b"diff --git a/x b/x\nnew file mode 100644\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+b\n", "creates"),
        (b"diff --git a/x b/x\nold mode 100644\nnew mode 100755\n", "mode"),
        (b"diff --git a/x b/x\nBinary files a/x and b/x differ\n", "binary"),
        (b"--- a/x\n+++ b/x\n@@ -1,2 +1 @@\n-a\n", "middle of a hunk"),
        (b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n-b\n+c\n", "do not agree"),
        (b"--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n-a\n+c\ndiff --git a/y b/y\n", "shorter"),
        (b"--- a/x\n+++ b/x\n@@ one @@\n-a\n+c\n", "malformed hunk"),
        (b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n a\n", "changes nothing"),
        (b"--- a/x\n+++ b/x\n", "without a hunk"),
        (b"@@ -1 +1 @@\n-a\n+b\n", "name of its file"),
        (_with_path("m.py") * 2, "twice"),
        (b"", "no change"),
        (b"hello\n", "no change"),
    ],
)
def test_a_hostile_or_broken_patch_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(PatchInvalid, match=why) as caught:
        parse(data)
    assert caught.value.exit_code == 2
    assert "line " in str(caught.value)


def test_a_patch_through_a_link_is_refused(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", {"m.py": b"a\n"})
    root = make(tmp_path / "root")
    (root / "linked").symlink_to(outside)
    (root / "m.py").symlink_to(outside / "m.py")
    for path in ("linked/m.py", "m.py"):
        with pytest.raises(PatchInvalid, match="symbolic link"):
            plan_patch_file(root, _with_path(path))
    assert (outside / "m.py").read_bytes() == b"a\n"


def test_a_patch_on_top_of_a_patch_is_reverted_with_it(tmp_path: Path) -> None:
    make(tmp_path)
    pristine = snapshot(tmp_path)
    patch(tmp_path)
    layers = (tmp_path / "src/flux/layers.py").read_bytes()
    extra = [FileChange("setup.py", FILES["setup.py"], b"# other\n")]
    extra += [FileChange("src/flux/layers.py", layers, layers.replace(b"class Block", b"class Blocks"))]
    carry_out(plan_patch_file(tmp_path, unified(extra)))
    assert (tmp_path / "setup.py").read_bytes() == b"# other\n"
    assert b"class Blocks" in (tmp_path / "src/flux/layers.py").read_bytes()
    revert(tmp_path)
    assert snapshot(tmp_path) == pristine
    assert (tmp_path / "src/flux/layers.py").read_bytes() == LAYERS


def test_a_file_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(b"")
    with pytest.raises(Refused):
        plan_patch_file(tmp_path / "x.py", b"")
