"""Charts as inline SVG. Colours come from the page's style sheet (`s0`, `s1`, …), so that they follow light and dark.

Every chart is drawn twice, wide and narrow, with letters of one size: a scaled-down drawing cannot be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = (760, 360), (350, 300)
COLOURS = 8
"""Series that the style sheet has colours for."""
_LETTER = 6.6
"""Mean width of a letter at 12 px."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    marks: bool = False
    titles: tuple[str, ...] = ()
    """What each point is, where the pointer rests on it."""


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`; `whole` ones for what is counted."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):  # all the same, but for rounding
        high = low + max(abs(low), 1.0) * 0.1
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(math.ceil(step), 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: no needless zeros."""
    text = f"{value:.4g}"
    return text if "e" not in text else f"{value:.0e}".replace("e-0", "e-")


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    description: str,
    levels: Sequence[Level] = (),
    x_range: tuple[float, float] | None = None,
    y_from: float | None = 0.0,
    whole: bool = False,
) -> str:
    """Lines over two axes, wide and narrow.

    y_from: where the vertical axis starts; None: near the lowest point. whole: the horizontal axis counts something.
    """
    return _twice(lambda size: _lines(size, series, x_label, y_label, description, levels, x_range, y_from, whole))


def bars(rows: Sequence[tuple[str, float, str, int]], x_label: str, description: str, mark: float = 1.0) -> str:
    """Horizontal bars: name, value, what is written at its end, and colour. mark: a line to compare with."""
    return _twice(lambda size: _bars(size[0], rows, x_label, description, mark))


def heat(
    names: Sequence[str], columns: Sequence[int], values: Sequence[Sequence[float | None]], description: str, unit: str
) -> str:
    """A field of cells, the darker the higher: rows by name, a column for each model call; None is left empty."""
    return _twice(lambda size: _heat(size[0], names, columns, values, description, unit))


def _twice(draw: Callable[[tuple[int, int]], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _lines(
    size: tuple[int, int],
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    description: str,
    levels: Sequence[Level],
    x_range: tuple[float, float] | None,
    y_from: float | None,
    whole: bool,
) -> str:
    width, height = size
    wide = width == WIDE[0]
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + [level.value for level in levels]
    low = min(ys) if y_from is None else y_from
    y_ticks = ticks(low, max(ys), 5)
    first, last = x_range or (min(xs), max(xs))
    x_ticks = ticks(min(first, *xs), max(last, *xs), 6 if wide else 4, whole)
    right = 24 + max(_LETTER * len(line.name) for line in series) if wide else 14
    left, top, bottom = 52, 30, 46

    def x_of(value: float) -> float:
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - left - right)

    def y_of(value: float) -> float:
        return height - bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (height - top - bottom)

    out = [_begin(width, height, description)]
    for tick in y_ticks:
        y = y_of(tick)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(left - 8, y + 4, number(tick), "end"))
    for tick in x_ticks:
        out.append(_text(x_of(tick), height - bottom + 18, number(tick), "middle"))
    out.append(
        f'<line class="axis" x1="{left}" x2="{width - right:.1f}" y1="{height - bottom}" y2="{height - bottom}"/>'
    )
    out.append(_text(0, 14, y_label, "start", "label"))
    out.append(_text((left + width - right) / 2, height - 8, x_label, "middle", "label"))
    for level in levels:
        y = y_of(level.value)
        out.append(f'<line class="level" x1="{left}" x2="{width - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(left + 4, y - 5, level.name, "start", "quiet"))
    ends = []
    for line in series:
        points = [(x_of(x), y_of(y)) for x, y in line.points]
        colour = line.colour % COLOURS
        if len(points) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            out.append(f'<polyline class="line s{colour}" points="{path}"/>')
        if line.marks:
            for index, (x, y) in enumerate(points):
                title = line.titles[index] if index < len(line.titles) else line.name
                out.append(_mark(colour, x, y, title))
        ends.append((points[-1] if points[-1][0] >= points[0][0] else points[0], colour, line.name))
    if wide:
        out += _end_labels(ends, width - right, top)
    return "".join([*out, "</svg>"])


def _end_labels(ends: list[tuple[tuple[float, float], int, str]], edge: float, top: float) -> list[str]:
    """The names right of the axes, at the height where each line ends, moved apart where they would overlap.

    A thin leader goes to a line that ends before the edge.
    """
    placed: list[float] = []
    out = []
    for (x, y), colour, name in sorted(ends, key=lambda end: end[0][1]):
        at = max(y + 4, placed[-1] + 15 if placed else top)
        placed.append(at)
        if x < edge - 2 or abs(at - 4 - y) > 2:
            out.append(
                f'<line class="leader s{colour}" x1="{x + 7:.1f}" y1="{y:.1f}" x2="{edge + 8:.1f}" y2="{at - 4:.1f}"/>'
            )
        out.append(_text(edge + 11, at, name, "start", f"t{colour}"))
    return out


def _mark(colour: int, x: float, y: float, title: str) -> str:
    """Each colour has a shape of its own, for eyes and printers that do not tell colours apart."""
    inside = f"<title>{escape(title)}</title>"
    shape = colour % 4
    if shape == 1:
        return f'<rect class="mark s{colour}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{inside}</rect>'
    if shape == 2:
        points = f"{x:.1f},{y - 5.5:.1f} {x + 5.5:.1f},{y + 4:.1f} {x - 5.5:.1f},{y + 4:.1f}"
        return f'<polygon class="mark s{colour}" points="{points}">{inside}</polygon>'
    if shape == 3:
        points = f"{x:.1f},{y - 5.5:.1f} {x + 5.5:.1f},{y:.1f} {x:.1f},{y + 5.5:.1f} {x - 5.5:.1f},{y:.1f}"
        return f'<polygon class="mark s{colour}" points="{points}">{inside}</polygon>'
    return f'<circle class="mark s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{inside}</circle>'


def _bars(width: int, rows: Sequence[tuple[str, float, str, int]], x_label: str, description: str, mark: float) -> str:
    row, top, bottom, right = 46, 8, 44, 16
    height = top + row * len(rows) + bottom
    x_ticks = ticks(0, max([mark, *(value for _, value, _, _ in rows)]), 5 if width == WIDE[0] else 4)

    def x_of(value: float) -> float:
        return 1 + value / x_ticks[-1] * (width - right - 1)

    out = [_begin(width, height, description)]
    for tick in x_ticks:
        x = x_of(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        out.append(_text(x, height - bottom + 17, f"{tick:.0%}", "start" if tick == 0 else "middle"))
    x = x_of(mark)
    for index, (name, value, note, number_) in enumerate(rows):
        y = top + row * index
        colour = number_ % COLOURS
        out.append(f'<rect class="bar s{colour}" x="1" y="{y + 20}" width="{x_of(value) - 1:.1f}" height="18" rx="2"/>')
        out.append(_text(1, y + 14, name, "start", "label"))
        out.append(_text(width - right, y + 14, note, "end", "quiet"))
    out.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
    out.append(_text(width / 2, height - 8, x_label, "middle", "label"))
    return "".join([*out, "</svg>"])


def _heat(
    width: int,
    names: Sequence[str],
    columns: Sequence[int],
    values: Sequence[Sequence[float | None]],
    description: str,
    unit: str,
) -> str:
    left = 8 + _LETTER * max(len(name) for name in names)
    row = 16 if len(names) <= 24 else 9
    top, bottom = 8, 64
    height = top + row * len(names) + bottom
    cell = (width - left - 8) / max(len(columns), 1)
    every = 1 if row >= 12 else 3
    out, inner = [_begin(width, height, description)], max(cell - 1, 0.5)
    for y, (name, line) in enumerate(zip(names, values, strict=True)):
        if y % every == 0:
            out.append(_text(left - 6, top + row * y + row / 2 + 4, name, "end", "small"))
        for x, value in enumerate(line):
            if value is not None:
                out.append(
                    f'<rect class="cell" x="{left + cell * x:.1f}" y="{top + row * y}" width="{inner:.1f}" '
                    f'height="{row - 1}" fill-opacity="{0.06 + 0.94 * value:.3f}">'
                    f"<title>{escape(name)}, step {columns[x]}: {value:.0%} {escape(unit)}</title></rect>"
                )
    below = top + row * len(names)
    step = max(math.ceil(len(columns) / (10 if width == WIDE[0] else 5)), 1)
    for x in range(0, len(columns), step):
        out.append(_text(left + cell * (x + 0.5), below + 15, str(columns[x]), "middle"))
    out.append(_text((left + width) / 2, below + 32, "step", "middle", "label"))
    shades = [0.0, 0.25, 0.5, 0.75, 1.0]
    wide = (width - left - 8) / len(shades)
    for index, shade in enumerate(shades):
        x_at = left + wide * index
        out.append(
            f'<rect class="cell" x="{x_at:.1f}" y="{below + 40}" width="{wide:.1f}" height="8" '
            f'fill-opacity="{0.06 + 0.94 * shade:.3f}"/>'
        )
        out.append(_text(x_at + wide / 2, below + 61, f"{shade:.0%}", "middle", "small"))
    return "".join([*out, "</svg>"])


def _begin(width: int, height: int, description: str) -> str:
    # no width and height: the page's style sheet says how much room there is
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description, quote=True)}">'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'
