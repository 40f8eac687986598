"""Writing to the terminal, or to whatever stands in for it.

Nothing here reads markup: code such as `list[str]` comes out as it is. In a pipe, lines are as long as they are; where
the width is known (a terminal, or `COLUMNS`), text is wrapped with a hanging indent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_ENDLESS = 100_000
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_PATIENCE = 1.0
"""Seconds before a progress bar appears."""
_PACE = 3.0
"""Seconds between plain lines that say how far a command is."""
LABEL = 7
"""Columns of the label in front of a sentence."""


def screen(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that prints exactly what it is given."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _ENDLESS
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def clean(text: str) -> str:
    """Make control characters visible: a file name or a line of code must not steer the terminal."""
    return text.translate(_CONTROLS)


def sentence(out: Console, body: str, *, label: str = "", style: str = "", indent: int = 2) -> None:
    """Print a label and a text that hangs beside it."""
    head = Text(" " * indent + label.ljust(LABEL - 1) + " ", style=style)
    hanging(out, head, Text(clean(body)))


def say(out: Console, text: str, style: str = "") -> None:
    """Print a text, wrapped where the width is known."""
    hanging(out, Text(""), Text(clean(text), style=style))


def exact(out: Console, text: str, style: str = "") -> None:
    """Print text whose lines are to stay whole: code, paths, commands."""
    out.print(Text(clean(text), style=style), soft_wrap=True)


def next_commands(out: Console, commands: Sequence[tuple[str, str]]) -> None:
    """Print commands to run next, each with what it does."""
    exact(out, "\nNext", "bold")
    width = max((len(command) for command, _ in commands), default=0) + 3
    for command, what in commands:
        exact(out, f"  {command.ljust(width)}{what}".rstrip())


def hanging(out: Console, head: Text, body: Text) -> None:
    """Print `head`, and `body` after it, wrapped so that further lines begin where the first one did."""
    width = max(out.width - head.cell_len, 20)
    for number, line in enumerate(body.wrap(out, width)):
        line.rstrip()
        out.print(Text.assemble(head if number == 0 else " " * head.cell_len, line), soft_wrap=True)


def cropped(out: Console, head: Text, code: Text) -> None:
    """Print one line of code after `head`; in a terminal it is cut at the margin, in a pipe never."""
    code.truncate(max(out.width - head.cell_len, 20), overflow="ellipsis")
    out.print(Text.assemble(head, code), soft_wrap=True)


def print_json(value: Any) -> None:
    """Write one object to stdout, exact whatever the encoding: every character beyond ASCII is escaped."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: on a full disk, what was there stays. Raises OSError that names the file."""
    from chipmunk.apply import disk

    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_bytes(data)
        return
    final = path.resolve()
    temporary = final.with_name(f".{final.name}.chipmunk.tmp")
    try:
        disk.write_new(temporary, data, final if final.exists() else None)
        disk.rename(temporary, final)
    except OSError as error:
        with suppress(OSError):
            disk.remove(temporary)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_bytes(data: bytes) -> None:
    """Write bytes to stdout as they are: a piped diff is a patch."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def draws() -> bool:
    """Whether what stands on stderr can be drawn over: a terminal that moves its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Lines:
    """How far a command is, in plain lines on stderr, each with the time since the start: for logs and pipes."""

    def __init__(self, pace: float = 0.0) -> None:
        """pace: seconds that have to pass between two lines; what comes sooner is left out."""
        self._pace = pace
        self._began = time.monotonic()
        self._last = -pace

    def __call__(self, text: str) -> None:
        """Say that something is done, or begins."""
        passed = time.monotonic() - self._began
        if passed - self._last < self._pace:
            return
        self._last = passed
        minutes, seconds = divmod(int(passed), 60)
        with suppress(OSError):  # nobody reads it any more
            sys.stderr.write(f"{minutes:3}:{seconds:02}  {clean(text)}\n")
            sys.stderr.flush()


class Waiting:
    """How far a command is, on stderr: in a terminal a bar, once a second has passed; elsewhere nothing, or `lines`."""

    def __init__(self, *, time_left: bool = False, lines: bool = False) -> None:
        text = TextColumn("{task.description}", markup=False)
        left = (TextColumn("left"), TimeRemainingColumn()) if time_left else ()
        self._columns: tuple[ProgressColumn, ...] = (text, BarColumn(), TimeElapsedColumn(), *left)
        self._lock = threading.Lock()
        self._state = ("starting", 0, 1)
        self._bar: Progress | None = None
        self._timer = threading.Timer(_PATIENCE, self._begin)
        self._timer.daemon = True
        self._lines = Lines(_PACE) if lines and not draws() else None

    def __call__(self, step: str, done: int, total: int) -> None:
        """Say that `done` of `total` is done, and `step` comes next or was the last."""
        with self._lock:
            self._state = (clean(step), done, total)
            self._update()
            if self._lines is not None:
                self._lines(f"{done} of {total}: {step}")

    def __enter__(self) -> Waiting:
        if draws():
            self._timer.start()
        elif self._lines is not None:
            self._lines("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()

    def _begin(self) -> None:
        with self._lock:
            if self._timer.finished.is_set():  # it was over before the lock was free
                return
            self._bar = Progress(*self._columns, console=screen(stderr=True), transient=True)
            self._bar.add_task("")
            self._update()
            self._bar.start()

    def _update(self) -> None:
        if self._bar is not None:
            step, done, total = self._state
            self._bar.update(self._bar.task_ids[0], description=step, completed=done, total=total)
