"""What a terminal shows, at its width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from chipmunk.bench.tables import LiveTable, report_tables
from chipmunk.cli.bench import show_report
from tests.bench.runs import report


def shown(columns: int, *what: RenderableType) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=True, color_system=None)
    for each in what:
        console.print(each)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("configs", [("defaults",), ("careful", "a-name-that-is-rather-long", "fast")])
def test_no_figure_is_cut(columns: int, configs: tuple[str, ...]) -> None:
    whole = report(configs)
    lines = shown(columns, *report_tables(whole))
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    assert "…" not in text
    for row in whole.comparisons:
        assert f"{row.speedup:.2f}×" in text
        assert f"{row.ratios['steps']['sparse/sparse']:.2f}×" in text
    assert "2048x2048" in text


def test_the_lines_of_one_size() -> None:
    lines = [line.split() for line in shown(80, *report_tables(report()))]
    assert ["dense", "19.50", "3.00×", "6.50", "1.00×", "6.50", "1.00×", "1.00×", "24.0", "1.00×"] in lines
    assert ["chipmunk", "26.00", "4.00×", "5.42", "0.83×", "4.64", "0.71×", "1.40×", "33.0", "1.38×"] in lines
    assert ["4", "dense", "steps", "4.33", "0.67×", "1.50×"] in lines
    assert ["sparse/sparse", "3", "50.0", "0.50×", "31%", "15.4%", "35.4%"] in lines
    assert ["full/sparse", "1", "90.0", "0.90×", "18%", "100%", "35.4%"] in lines
    assert ["dense", *["3", "/", "0", "/", "2"], *["0", "/", "0", "/", "0"] * 3] in lines
    assert ["sparse", "attention", "N=4352", "K=672", "(15.4%)", "0.1210", "561", "3.22×"] in lines


def test_what_was_measured_with_what() -> None:
    out = io.StringIO()
    show_report(Console(file=out, width=80), report())
    for part in ("NVIDIA H100 80GB HBM3", "11.9 billion", "PyTorch 2.11.0", "cudnn", "chipmunk bench flux"):
        assert part in out.getvalue()


def test_the_live_table_follows_the_events() -> None:
    table = LiveTable(images=3)
    common = {"side": "patched", "config": "defaults", "variant": "chipmunk", "size": "2048x2048", "steps": 50}
    table({"event": "build", "side": "patched", "config": "defaults"})
    assert "building the model of the patched code" in "\n".join(shown(80, table.render()))
    for index, seconds in enumerate((61.5, 21.25)):
        table({**common, "event": "begin", "index": index})
        table({**common, "event": "image", "index": index, "seconds": seconds})
    table({**common, "event": "begin", "index": 2})
    shorter = {**common, "side": "original", "config": "", "variant": "fewer steps", "steps": 27, "index": 0}
    lines = shown(80, table.render())
    assert any(line.split() == ["chipmunk", "defaults", "2048x2048", "61.50", "21.25"] for line in lines)
    assert "picture 3 of 3" in lines[-1]
    table({**shorter, "event": "image", "seconds": 21.0})
    assert any(line.split() == ["27", "dense", "steps", "2048x2048", "21.00"] for line in shown(80, table.render()))


def test_a_long_row_of_pictures_fits() -> None:
    table = LiveTable(images=40)
    for index in range(40):
        event = {"side": "original", "config": "", "variant": "dense", "size": "2048x2048", "steps": 50, "index": index}
        table({**event, "event": "image", "seconds": 135.25})
    assert max(map(len, shown(80, table.render()))) <= 80
