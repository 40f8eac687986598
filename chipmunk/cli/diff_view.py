"""A unified diff in colours: one column, or before and after side by side where the terminal is wide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from chipmunk.cli.terminal import clean, exact

WIDE = 160
"""Columns from which on the two sides stand beside each other."""

_STYLES = {"-": "red", "+": "green", " ": "", "\\": "dim"}
_GAP = " │ "


@dataclass(frozen=True)
class Hunk:
    """Consecutive lines before and after."""

    header: str
    old: int
    """1-based number of its first line in the file before."""
    new: int
    """1-based number of its first line in the file after."""
    rows: list[tuple[str, str]]
    """Sign and text of each line."""


def show_diff(out: Console, diff: bytes) -> None:
    """Print a diff as `chipmunk.apply.unified` writes it."""
    beside = out.is_terminal and out.width >= WIDE
    for title, hunks in parse(diff):
        exact(out, title, "bold")
        for hunk in hunks:
            exact(out, hunk.header, "cyan")
            for line in _beside(hunk, out.width) if beside else _below(hunk):
                out.print(line, soft_wrap=True)
        out.print()


def parse(diff: bytes) -> Iterator[tuple[str, list[Hunk]]]:
    """Yield each file's name with its hunks; control characters are made visible."""
    title, hunks = "", list[Hunk]()
    for raw in diff.split(b"\n"):
        line = clean(raw.decode("utf-8", "replace").removesuffix("\r"))
        if line.startswith("diff --git "):
            if hunks:
                yield title, hunks
            title, hunks = "", []
        elif line.startswith("+++ ") and not hunks:
            title = line[4:].rstrip("\t").strip('"').removeprefix("b/")
        elif line.startswith("@@ "):
            old, new = (int(part[1:].split(",")[0]) for part in line.split()[1:3])
            hunks.append(Hunk(line, old, new, []))
        elif hunks and line[:1] in _STYLES and line:
            hunks[-1].rows.append((line[0], line[1:]))
    if hunks:
        yield title, hunks


def _below(hunk: Hunk) -> Iterator[Text]:
    for sign, text in hunk.rows:
        yield Text(sign + text, style=_STYLES[sign])


def _beside(hunk: Hunk, columns: int) -> Iterator[Text]:
    width = (columns - len(_GAP)) // 2
    old, new = hunk.old, hunk.new
    removed: list[Text] = []
    added: list[Text] = []
    for sign, text in [*hunk.rows, ("", "")]:
        if sign == "-":
            removed += _cell(old, sign, text, width)
            old += 1
        elif sign == "+":
            added += _cell(new, sign, text, width)
            new += 1
        elif sign != "\\":
            yield from _rows(removed, added, width)
            removed, added = [], []
        if sign == " ":
            yield from _rows(_cell(old, sign, text, width), _cell(new, sign, text, width), width)
            old, new = old + 1, new + 1


def _rows(left: list[Text], right: list[Text], width: int) -> Iterator[Text]:
    for before, after in zip_longest(left, right):
        yield Text.assemble(before if before is not None else " " * width, (_GAP, "dim"), after or "")


def _cell(number: int, sign: str, code: str, width: int) -> list[Text]:
    """One line of one side, on as many rows as it needs; each is filled to `width` columns."""
    parts = chop_cells(code.expandtabs(4), width - 8) or [""]
    rows: list[Text] = []
    for part in parts:
        row = Text.assemble((f"{number:>5} " if not rows else " " * 6, "dim"), (f"{sign} {part}", _STYLES[sign]))
        row.pad_right(width - row.cell_len)
        rows.append(row)
    return rows
