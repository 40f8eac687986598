"""The command line as its users meet it: real processes, in a pipe or in a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from chipmunk.cli.app import app

DROPPED = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "CHIPMUNK_CONFIG", "VIRTUAL_ENV", "CONDA_PREFIX", "TERM")
TOOL = (sys.executable, "-m", "chipmunk.cli")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def environment(**more: str) -> dict[str, str]:
    """The process's environment without what would change how output looks or which Python is found."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**kept, "PYTHONPATH": path, "PATH": tools, "TERM": "xterm", **more}


def chipmunk(*words: str | Path, **more: str) -> Done:
    """Run `chipmunk` in this process, which saves a second each time; its output is no terminal."""
    done = CliRunner(env={**dict.fromkeys(DROPPED), **more}).invoke(app, [*map(str, words)], prog_name="chipmunk")
    return Done(done.exit_code, done.stdout, done.stderr)


def process(*words: str | Path, cwd: Path | None = None, **more: str) -> Done:
    """Run `chipmunk` in a process whose output is a pipe."""
    done = subprocess.run(
        [*TOOL, *map(str, words)],
        capture_output=True,
        cwd=cwd,
        env=environment(**more),
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def in_terminal(*words: str | Path, columns: int, program: Sequence[str] = TOOL) -> Done:
    """Run `chipmunk` (or another program) in a terminal; `out` is everything that it wrote there."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [*program, *map(str, words)], stdin=follower, stdout=follower, stderr=follower, env=environment()
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    return Done(process.wait(), written.decode().replace("\r\n", "\n"), "")
