"""What the user did to patched files since: edits, a formatter's work, files that are gone or put back by hand."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
from apply_toys import FILES, LAYERS, MATH, edit, few, make, patch, rules, rules_2, snapshot
from hypothesis import given
from hypothesis import strategies as st

from chipmunk.apply import Conflict, FileState, State, carry_out, plan_update, revert, status
from chipmunk.rewrite.plan import SiteStatus


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
