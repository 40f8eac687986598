"""patches and targets: what is built in, and what a folder adds."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import chipmunk

from chipmunk import registry

PLUGIN = '''\
"""Does [bold] nothing at all.

A second paragraph
over two lines.

    indented = [str]
"""

from chipmunk.registry import Example

NAME = "nothing"
API = 1
VERSION = "3"


def rule(context):
    pass


EXAMPLES = (
    Example("a list", "flux/a.py", "x: list[str] = []\\n", "x: list[str] = [1]\\n"),
    Example("a tuple", "flux/b.py", "y: tuple[int] = ()\\n", None),
)
'''


@pytest.mark.parametrize("kind", ["patches", "targets"])
def test_lists_name_each_with_its_summary_and_origin(kind: str) -> None:
    done = chipmunk(kind)
    assert done.code == 0
    assert chipmunk(kind, "list").out == done.out
    for name, item in getattr(registry.load(), kind).items():
        (line,) = [line for line in done.lines if line.startswith(name + " ")]
        assert item.summary in line
        assert item.origin in done.out


@pytest.mark.parametrize("kind", ["patches", "targets"])
def test_each_can_be_shown(kind: str) -> None:
    for name in getattr(registry.load(), kind):
        done = chipmunk(kind, "show", name)
        assert done.code == 0
        assert done.lines[0].startswith(name)


def test_a_folder_adds_its_own_and_shows_its_examples(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text(PLUGIN)
    listed = chipmunk("patches", "list", "--plugins", tmp_path)
    assert "Does [bold] nothing at all" in listed.out
    shown = chipmunk("patches", "show", "nothing", "--plugins", tmp_path)
    assert shown.lines[0] == f"nothing 3   {tmp_path / 'nothing.py'}"
    assert "A second paragraph over two lines." in shown.lines
    assert "    indented = [str]" in shown.lines
    assert "-x: list[str] = []" in shown.lines
    assert "+x: list[str] = [1]" in shown.lines
    assert "a tuple: left alone   flux/b.py" in shown.lines
    assert "y: tuple[int] = ()" in shown.lines


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    done = chipmunk("patches", "show", "atention")
    assert (done.code, done.out) == (2, "")
    assert "Next   chipmunk patches show attention" in done.err
    assert "Next   chipmunk targets list" in chipmunk("targets", "show", "zzz").err


def test_a_plugin_that_cannot_be_used_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    done = chipmunk("targets", "list", "--plugins", tmp_path)
    assert done.code == 2
    assert str(tmp_path / "broken.py") in done.err
    assert "Traceback" not in done.err
