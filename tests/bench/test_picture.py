"""The picture: what it says, and what is said where it cannot be drawn."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chipmunk.bench import picture
from chipmunk.bench.process import BenchError
from tests.bench.runs import report


def test_an_svg_says_what_the_report_says(tmp_path: Path) -> None:
    picture.draw(report(), tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    for part in ("sparse / sparse", "full / full", "1280 × 768", "2048 × 2048", "1.40×", "H100", "bfloat16"):
        assert part in text
    assert "kept" not in text


def test_configurations_that_keep_the_same_need_no_third_panel(tmp_path: Path) -> None:
    picture.draw(report(("careful", "fast")), tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    for part in ("careful", "fast", "1.40×", "1.60×"):
        assert part in text
    assert "kept" not in text


@pytest.mark.parametrize("what", ["neurons", "keys"])
def test_a_third_panel_over_what_configurations_keep(tmp_path: Path, what: str) -> None:
    given = report(("careful", "fast"))
    rows = tuple(
        replace(row, kept={**row.kept, what: 0.2} if row.config == "fast" else row.kept) for row in given.comparisons
    )
    picture.draw(replace(given, comparisons=rows), tmp_path / "bench.svg")
    assert f"Speed-up over {what} kept" in (tmp_path / "bench.svg").read_text()


def test_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture.draw(report(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_by_its_suffix(tmp_path: Path) -> None:
    picture.draw(report(), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_another_suffix_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"\.svg, \.png or \.pdf, not '\.txt'"):
        picture.check(tmp_path / "bench.txt")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="there is no folder"):
        picture.check(tmp_path / "nowhere" / "bench.svg")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError) as caught:
        picture.check(tmp_path / "bench.svg")
    assert caught.value.next_command == f"{sys.executable} -m pip install 'chipmunk-flux[bench]'"
