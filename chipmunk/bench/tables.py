"""The benchmark in a terminal: the table that fills while it runs, and the tables that are left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from chipmunk.bench.measurement import Comparison, Run
from chipmunk.bench.run import BenchReport
from chipmunk.bench.spec import Event

_SHOWN = 5
"""Pictures of one size that a line of the live table shows."""

_SIDES = {"original": "the original", "patched": "the patched code"}


def said(event: Event, images: int) -> str:
    """What an event tells, in words; `images` pictures of a size are drawn."""
    side = _SIDES[event["side"]] + (f" ({event['config']})" if event["config"] else "")
    if event["event"] == "start":
        return f"starting the process of {side}"
    if event["event"] == "build":
        return f"building the model of {side}"
    if event["event"] == "about":
        return f"built {event['environment']['model']}"
    if event["event"] == "operators":
        return "timing the operators"
    if event["event"] == "error":
        return f"{side}: {event['message']}"
    name = _named(event) + (f" ({event['config']})" if event["config"] else "")
    of = "" if event["variant"] == "fewer steps" else f" of {images}"
    return f"{name} at {event['size']}: picture {event['index'] + 1}{of}"


class PlainLines:
    """The same in a pipe or a log: a line as soon as a picture is drawn or a phase begins."""

    def __init__(self, images: int, say: Callable[[str], None]) -> None:
        self._images = images
        self._say = say

    def __call__(self, event: Event) -> None:
        """Take in one event of a worker."""
        if event["event"] == "image":
            self._say(f"{said(event, self._images)}: {event['seconds']:.2f} s")
        elif event["event"] not in ("begin", "error"):  # the error itself is told at the end
            self._say(said(event, self._images))


class LiveTable:
    """What was drawn so far, one line for each side and size; `rich.live.Live` calls `render`."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._rows: dict[tuple[str, str, str], list[float]] = {}
        self._now = "reading the repository"
        self._since = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take in one event of a worker."""
        self._since = time.monotonic()
        if event["event"] == "image":
            row = self._rows.setdefault((_named(event), event["config"], event["size"]), [])
            row.append(event["seconds"])
            self._now = "waiting for the next one"
        else:
            self._now = said(event, self._images)

    def render(self) -> RenderableType:
        running = Text(f"{self._now}, {time.monotonic() - self._since:.0f} s", style="dim", overflow="ellipsis")
        running.no_wrap = True
        return Group(drawn(self._rows, _SHOWN), running) if self._rows else running


def drawn(rows: Mapping[tuple[str, str, str], Sequence[float]], shown: int) -> Table:
    """Seconds of each picture by side, configuration and size; of long rows the last `shown`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("size")
    table.add_column("seconds of each picture")
    for (name, config, size), seconds in rows.items():
        last = "  ".join(f"{value:.2f}" for value in seconds[-shown:])
        table.add_row(f"{name} {config}".strip(), size, ("…  " if len(seconds) > shown else "") + last)
    return table


def drawn_by(runs: Sequence[Run]) -> Table:
    """All that was drawn before a benchmark was stopped."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        for image in run.images:
            name = _variant(run.variant, image.steps)
            rows.setdefault((name, run.config, image.size), []).append(image.seconds)
    return drawn(rows, max(map(len, rows.values()), default=0))


def _named(event: Event) -> str:
    """The side that drew a picture, in words."""
    return _variant(event["variant"], event["steps"])


def _variant(variant: str, steps: int) -> str:
    return f"{steps} dense steps" if variant == "fewer steps" else variant


def report_tables(report: BenchReport) -> Iterable[RenderableType]:
    """The final tables, one after the other; each fits into 80 columns."""
    several = len({row.config for row in report.comparisons}) > 1
    if report.interrupted:
        yield Text("What was drawn before it was stopped", style="bold")
        yield drawn_by(report.runs)
    if not report.comparisons:
        return
    count = report.comparisons[0].steps
    yield Text(f"Pictures of {count} steps: seconds, and × the steady dense picture", style="bold")
    yield pictures(report.comparisons, several)
    yield Text("Steps, attention/MLP: milliseconds on the device, and × a dense step", style="bold")
    yield steps(report.comparisons, several)
    yield Text("torch.compile, picture by picture: graphs / graph breaks / recompilations", style="bold")
    yield compilation(report.comparisons, several)
    if report.operators:
        yield Text("Operators: speed-up over the dense cuDNN or cuBLAS operator of the same shape", style="bold")
        yield operators(report.operators)


def pictures(rows: Sequence[Comparison], several: bool) -> Table:
    """Whole pictures: seconds, and their ratio to the dense steady picture."""
    table = _table("", "first", "second", "steady", "speed-up", "peak GB")
    for size, of_size in _by_size(rows):
        _heading(table, size)
        dense, ratios = of_size[0].dense, of_size[0].ratios["dense"]
        table.add_row("dense", *_times(dense, ratios), "1.00×", _memory(dense, ratios))
        for row in of_size:
            speedup = Text(f"{row.speedup:.2f}×", style="bold green" if row.speedup > 1 else "bold red")
            ours = row.ratios["chipmunk"]
            table.add_row(_name(row, several), *_times(row.chipmunk, ours), speedup, _memory(row.chipmunk, ours))
        for row in {row.fewer_steps: row for row in of_size if row.fewer_steps is not None}.values():
            assert row.fewer_steps is not None
            count, seconds = row.fewer_steps
            ratio = row.ratios["fewer_steps"]["steady"]
            table.add_row(
                f"{count} dense steps",
                "",
                "",
                f"{_seconds(seconds)} {ratio:.2f}×",
                f"{1 / ratio:.2f}×",
                "",
                style="dim",
            )
    return table


def steps(rows: Sequence[Comparison], several: bool) -> Table:
    """Each kind of step: how many, milliseconds, ratio to a dense step, and what a sparse one computes."""
    table = _table("", "steps", "ms", "ratio", "of all", "keys", "neurons")
    for size, of_size in _by_size(rows):
        _heading(table, size)
        for row in of_size:
            if row is of_size[0]:
                table.add_row("dense", str(row.steps), f"{row.dense_step_ms:.1f}", "1.00×", "", "100%", "100%")
            if several:
                table.add_row(Text(row.config, style="italic"))
            whole = sum(row.step_ms[kind] * count for kind, count in row.step_counts.items())
            for kind, count in row.step_counts.items():
                ms, ratio = row.step_ms[kind], row.ratios["steps"][kind]
                share = f"{ms * count / whole:.0%}"
                attention, _, mlp = kind.partition("/")
                kept = [_kept(row, "keys", attention), _kept(row, "neurons", mlp or attention)]
                table.add_row(kind, str(count), f"{ms:.1f}", f"{ratio:.2f}×", share, *kept)
    return table


def compilation(rows: Sequence[Comparison], several: bool) -> Table:
    """What torch.compile did, picture by picture."""
    shown = min(max((len(row.compiled["dense"]) for row in rows), default=0), 4)
    table = _table("", *(f"picture {index + 1}" for index in range(shown)))
    failures = 0
    for size, of_size in _by_size(rows):
        _heading(table, size)
        sides = [("dense", of_size[0].compiled["dense"])]
        sides += [(_name(row, several), row.compiled["chipmunk"]) for row in of_size]
        for name, counts in sides:
            table.add_row(name, *(" / ".join(str(count[key]) for key in _COMPILED) for count in counts[:shown]))
            failures += sum(count["failures"] for count in counts)
    if failures:
        table.caption = f"{failures} times the compiler gave up: that code ran uncompiled"
    return table


_COMPILED = ("graphs", "breaks", "recompiles")


def operators(lines: Sequence[dict[str, Any]]) -> Table:
    """The operators against dense PyTorch, as `chipmunk.bench.ops` measured them."""
    table = _table("", "ms", "TFLOP/s", "speed-up")
    for line in lines:
        rate = f"{line['tflops']:.0f}" if "tflops" in line else ""
        ratio = f"{line['ratio']:.2f}×" if "ratio" in line else ""
        table.add_row(str(line["name"]), f"{line['ms']:.4f}", rate, ratio)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column(first, overflow="fold")  # where the width does not suffice, names are wrapped, never figures
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _heading(table: Table, text: str) -> None:
    if table.row_count:
        table.add_section()
    table.add_row(Text(text, style="bold cyan"))


def _by_size(rows: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    return [(size, [row for row in rows if row.size == size]) for size in dict.fromkeys(row.size for row in rows)]


def _name(row: Comparison, several: bool) -> str:
    return row.config if several else "chipmunk"


def _times(figures: dict[str, float], ratios: dict[str, float]) -> list[str]:
    return [f"{_seconds(figures[name])} {ratios[name]:.2f}×" for name in ("first", "second", "steady")]


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _memory(figures: dict[str, float], ratios: dict[str, float]) -> str:
    return f"{figures['peak_gb']:.1f} {ratios['peak_gb']:.2f}×" if figures["peak_gb"] else "–"


def _kept(row: Comparison, what: str, kind: str) -> str:
    return f"{row.kept[what]:.1%}" if kind == "sparse" and what in row.kept else "100%"
