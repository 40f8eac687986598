"""Merging three ways, and what counts as formatting."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from apply_toys import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipmunk.apply.merge import merge, merge_python, same_code


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
