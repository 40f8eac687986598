"""The benchmark as a picture: bars for each kind of step, speed-up over resolution and over what is kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chipmunk.apply.errors import quoted
from chipmunk.bench.measurement import Comparison
from chipmunk.bench.process import BenchError
from chipmunk.bench.run import BenchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")

_GREY, _DARK = "#b8bcc4", "#30343b"
_COLOURS = ("#2f6f9f", "#d9822b", "#4b9b6e", "#a4508b", "#8c6d31", "#5f5fb0")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _DARK,
    "axes.labelcolor": _DARK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "xtick.color": _DARK,
    "ytick.color": _DARK,
    "svg.fonttype": "none",
    "svg.hashsalt": "chipmunk",
    "legend.frameon": False,
}


def check(path: Path) -> None:
    """Raise BenchError, before anything is timed, if a picture cannot be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise BenchError(f"a picture ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, not '{path.suffix}': {path}")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"there is no folder {path.absolute().parent} for the picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError(
            "a picture needs matplotlib, which is not installed beside Chipmunk",
            next_command=f"{quoted(Path(sys.executable))} -m pip install 'chipmunk-flux[bench]'",
        ) from None


def draw(report: BenchReport, path: Path) -> None:
    """Write the picture of a report; the suffix of `path` says how."""
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = report.comparisons
    configs = list(dict.fromkeys(row.config for row in rows))
    what = _varied(rows)
    with matplotlib.rc_context(_STYLE):
        bars = (2 + sum(len(row.step_ms) + 0.4 for row in rows)) * 0.3
        if what is None:
            figure = Figure(figsize=(max(5.0, bars) + 4.6, 4.4), layout="constrained")
            panels = list(figure.subplots(1, 2, width_ratios=[max(5.0, bars), 4.2]))
        else:
            figure = Figure(figsize=(min(max(9.0, bars), 18.0), 8.4), layout="constrained")
            grid = figure.add_gridspec(2, 2)
            panels = [figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1])]
            _over_kept(panels[2], rows, what)
        _steps(panels[0], rows, configs)
        _over_resolution(panels[1], rows, configs)
        about = [report.environment.get("device", ""), f"{rows[0].steps} steps"]
        about += [f"batch {report.environment['batch']}"] if "batch" in report.environment else []
        about += [report.environment["dtype"]] if "dtype" in report.environment else []
        figure.suptitle(" · ".join(filter(None, about)), x=0.01, ha="left", fontsize=10, color=_DARK)
        # no date: the same figures give the same file
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)


def _steps(axes: Axes, rows: Sequence[Comparison], configs: list[str]) -> None:
    """Bars: time of each kind of step over that of a dense step, milliseconds above them."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.step_ms))
    position, ticks, names = 0.0, [], []
    labelled: set[str] = set()
    for size in dict.fromkeys(row.size for row in rows):
        of_size = [row for row in rows if row.size == size]
        bars = [("dense", 1.0, of_size[0].dense_step_ms, _GREY, 1.0)]
        for row in of_size:
            # the more often a kind comes, the less can it hide: configurations differ in shade
            shade = 1.0 - 0.65 * configs.index(row.config) / max(len(configs), 1)
            for kind in row.step_ms:
                colour = _COLOURS[kinds.index(kind) % len(_COLOURS)]
                bars.append((kind, row.ratios["steps"][kind], row.step_ms[kind], colour, shade))
        start = position
        for kind, ratio, ms, colour, shade in bars:
            label = None if kind in labelled else kind.replace("/", " / ")
            labelled.add(kind)
            axes.bar(position, ratio, 0.86, color=colour, alpha=shade, label=label)
            inside = ratio > 0.2
            ink = "white" if inside and shade > 0.7 and colour != _GREY else _DARK
            place: Any = {"y": ratio - 0.02, "va": "top"} if inside else {"y": ratio + 0.02, "va": "bottom"}
            axes.text(position, s=_short(ms), ha="center", fontsize=8, rotation=90, color=ink, **place)
            position += 1
        ticks.append((start + position - 1) / 2)
        names.append(size.replace("x", " × "))
        position += 1.2
    axes.axhline(1, color=_DARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xticks(ticks, names)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.9, position - 1.3)
    axes.set_ylim(0, 1.3 * max(1.0, *(ratio for row in rows for ratio in row.ratios["steps"].values())))
    axes.set_ylabel("time, dense step = 1")
    axes.set_title("Kinds of step, attention / MLP (in the bars: milliseconds)")
    axes.legend(
        ncols=3 if len(configs) == 1 else len(kinds) + 1,
        loc="upper left",
        fontsize=8.5,
        columnspacing=1.2,
        handlelength=1.2,
        title=None if len(configs) == 1 else f"dark to light: {', '.join(configs)}",
        title_fontsize=8.5,
        alignment="left",
    )


def _over_resolution(axes: Axes, rows: Sequence[Comparison], configs: list[str]) -> None:
    """Lines: speed-up of the whole picture, sizes in the order of their number of tokens."""
    sizes = list(dict.fromkeys(row.size for row in sorted(rows, key=lambda row: row.tokens)))
    for number, config in enumerate(configs):
        of_config = sorted((row for row in rows if row.config == config), key=lambda row: row.tokens)
        label = config if len(configs) > 1 else "Chipmunk"
        points = [(float(sizes.index(row.size)), row.speedup) for row in of_config]
        _line(axes, points, _COLOURS[number % len(_COLOURS)], label)
    axes.set_xticks(range(len(sizes)), [size.replace("x", " × ") for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    if len(sizes) > 3:  # more names than fit side by side
        axes.tick_params(axis="x", rotation=30)
    _speedup_axis(axes, rows)
    axes.set_title("Speed-up over resolution")
    axes.legend(loc="lower right", fontsize=8.5)


def _varied(rows: Sequence[Comparison]) -> str | None:
    """What the configurations keep different fractions of, at one size: neurons, else keys, else None."""
    for what in ("neurons", "keys"):
        for size in {row.size for row in rows}:
            if len({row.kept[what] for row in rows if row.size == size and what in row.kept}) > 1:
                return what
    return None


def _over_kept(axes: Axes, rows: Sequence[Comparison], what: str) -> None:
    """Lines: speed-up over the fraction of `what`, neurons or keys, that a sparse step computes."""
    other = "keys" if what == "neurons" else "neurons"
    differ = len({row.kept[other] for row in rows if other in row.kept}) > 1
    for number, size in enumerate(dict.fromkeys(row.size for row in rows)):
        points = sorted((100 * row.kept[what], row.speedup) for row in rows if row.size == size and what in row.kept)
        _line(axes, points, _COLOURS[number % len(_COLOURS)], size.replace("x", " × "))
    _speedup_axis(axes, rows)
    axes.margins(x=0.15)
    axes.set_xlabel(f"{what} computed on a sparse step, %")
    axes.set_title(f"Speed-up over {what} kept" + (f" ({other} differ too)" if differ else ""))
    axes.legend(loc="lower left", fontsize=8.5)


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=label, zorder=3)
    for point in points:
        axes.annotate(
            f"{point[1]:.2f}×",
            point,
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=colour,
        )


def _speedup_axis(axes: Axes, rows: Sequence[Comparison]) -> None:
    axes.axhline(1, color=_DARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(0, 1.18 * max(1.0, *(row.speedup for row in rows)))
    axes.set_ylabel("speed-up, dense = 1")


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"
