"""What went wrong, in one block: what, where, why and the next command; and the exit code that says so."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import typer

Parameters = ParamSpec("Parameters")

DONE, UNMET, REFUSED, CONFLICT, INTERRUPTED = 0, 1, 2, 3, 130
"""The exit codes, the same for every command; `docs/exit-codes.md` explains them."""

SUFFIXES = (".yml", ".yaml")
"""Of a configuration's file; a name that ends in anything else was to be a folder."""

_STATUS = {UNMET: "check failed", REFUSED: "refused", CONFLICT: "conflict", INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class Where:
    """One place that an error is about."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Failure(Exception):
    """An error as the user sees it."""

    def __init__(
        self, message: str, places: tuple[Where, ...] = (), next_command: str | None = None, exit_code: int = REFUSED
    ) -> None:
        super().__init__(message)
        self.message = message
        self.places = places
        self.next_command = next_command
        self.exit_code = exit_code


def command(function: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turn what a command raises into a block on stderr, with `--json` an object on stdout, and an exit code."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            with stoppable():
                function(*args, **kwargs)
        except typer.Exit:
            raise
        except BrokenPipeError:  # whoever was reading has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(REFUSED) from None
        except (Exception, KeyboardInterrupt) as error:
            failure = explain(error)
            report(failure, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(failure.exit_code) from error

    return run


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: what it started is stopped, and what it has is kept.

    A signal that is ignored (`nohup`), or that somebody else handles, is left as it is.
    """
    mine = [
        number
        for name in ("SIGTERM", "SIGHUP")
        if (number := getattr(signal, name, None)) is not None
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in mine:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def explain(error: BaseException) -> Failure:
    """Say in the user's words what an exception means."""
    from chipmunk.apply import ApplyError
    from chipmunk.apply.errors import quoted
    from chipmunk.config import ConfigError
    from chipmunk.registry import RegistryError
    from chipmunk.rewrite import SelectionError

    if isinstance(error, Failure):
        return error
    if isinstance(error, ApplyError):
        places = tuple(Where(place.file, place.line, place.reason) for place in error.places)
        return Failure(error.message, places, error.next_command, error.exit_code)
    if isinstance(error, ConfigError):
        places = tuple(
            Where(problem.source, problem.line, f"{problem.key} {problem.message}" if problem.key else problem.message)
            for problem in error.problems
        )
        source = Path(error.problems[0].source)
        look = f"chipmunk config check {quoted(source)}"
        if not source.exists():
            look = f"chipmunk config init {quoted(source)}" if source.suffix in SUFFIXES else "chipmunk config init"
        return Failure("the configuration cannot be used", places, look)
    if isinstance(error, SelectionError):
        return Failure(str(error), next_command=f"chipmunk {'targets' if 'target' in str(error) else 'patches'} list")
    if isinstance(error, RegistryError):
        return Failure(str(error), next_command="chipmunk patches list")
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted; nothing is half-written", exit_code=INTERRUPTED)
    if isinstance(error, OSError):
        file = str(error.filename) if error.filename is not None else None
        reason = error.strerror or str(error)
        places = () if file is None else (Where(file, None, reason),)
        if file is None:
            return Failure(reason)
        full = error.errno == errno.ENOSPC
        look = f"df -h {quoted(Path(file).parent)}" if full else f"ls -ld {quoted(Path(file))}"
        return Failure("a file cannot be read or written", places, look)
    traceback.print_exception(error, file=sys.stderr)
    return Failure(f"this is a fault in Chipmunk: {type(error).__name__}: {error}", next_command="chipmunk doctor")


def report(failure: Failure, *, as_json: bool) -> None:
    """Write the block to stderr and, for `as_json`, the object to stdout."""
    from chipmunk.cli.terminal import exact, print_json, screen, sentence

    if as_json:
        print_json(failure_object(failure))
    out = screen(stderr=True)
    first, _, rest = failure.message.partition("\n\n")
    sentence(out, first, label="Error", style="bold red", indent=0)
    if rest:
        exact(out, f"\n{rest}")
    for place in failure.places:
        sentence(
            out, str(place) if place.reason == failure.message else f"{place}: {place.reason}", label="at", indent=0
        )
    if failure.next_command is not None:
        exact(out, f"Next   {failure.next_command}", "bold")


def failure_object(failure: Failure) -> dict[str, Any]:
    """The `--json` object of a command that failed: the same keys as that of one that did not, and `error`."""
    return {
        "status": _STATUS.get(failure.exit_code, "refused"),
        "target": None,
        "files": [],
        "sites": [],
        "error": {
            "message": failure.message,
            "places": [{"file": p.file, "line": p.line, "reason": p.reason} for p in failure.places],
            "next": failure.next_command,
        },
    }
