"""Runs that are killed, interrupted or fail at any of their calls that change the disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

from chipmunk.apply import Conflict, Interrupted, Refused

CALLS = [
    "write",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "fchmod",
    "fchown",
    "open",
]
"""Every `os` function through which this package changes the disk, or could."""
Action = Callable[[Path], object]


def stop_at(number: int, how: Callable[[str], None], for_good: bool = False) -> list[str]:
    """From now on, count this process's calls that change the disk; at call `number`, do `how` before it.

    A write is cut in two first, so that half of it is done. With -1, nothing is stopped; the calls are listed. With
    `for_good`, every later call is stopped too.
    """
    seen: list[str] = []

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if name == "open" and not int(args[1]) & os.O_CREAT:  # type: ignore[call-overload]
                return real(*args, **kwargs)
            seen.append(name)
            if len(seen) - 1 == number or (for_good and len(seen) > number):
                if name == "write":
                    real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[call-overload]
                how(name)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return seen


def in_child(action: Action, root: Path, number: int, how: Callable[[str], None], for_good: bool = False) -> int:
    """Run an action in a process of its own, stopped at a call; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            stop_at(number, how, for_good)
            action(root)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except Interrupted:
            code = 4
        except Conflict:
            code = 3
        except Refused as error:
            code = 2 if "nothing was changed" in str(error) and error.next_command else 98
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def calls_of(action: Action, root: Path) -> list[str]:
    """What an action calls, run to its end in this process."""
    real = {name: getattr(os, name) for name in CALLS}
    try:
        seen = stop_at(-1, lambda name: None)
        action(root)
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    return seen


def die(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str) -> None:
    if name in ("write", "open", "mkdir"):  # renaming over a file and removing need no space
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def ctrl_c(name: str) -> None:
    raise KeyboardInterrupt
