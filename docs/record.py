"""Record `docs/patch.svg`: `chipmunk patch` on the starter repository, as a terminal of 112 columns shows it.

python docs/record.py
"""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 112


def run(words: list[str], folder: Path) -> str:
    """Run a command in a terminal and return what it wrote there."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "chipmunk.cli", *words],
        cwd=folder,
        stdin=follower,
        stdout=follower,
        stderr=sys.stderr.fileno(),  # no progress bar in the picture
        env={**plain, "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
    )
    os.close(follower)
    written = b""
    while part := _read(leader):
        written += part
    if process.wait() != 0:
        raise SystemExit(written.decode())
    return written.decode().replace("\r\n", "\n")


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux: the other end was closed
        return b""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "templates" / "flux-starter", Path(folder, "my-flux-repo"), ignore=ignored)
        words = ["patch", "./my-flux-repo"]
        shown = run(words, Path(folder))
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "dim"), (f"chipmunk {' '.join(words)}", "bold")))
    console.print(Text.from_ansi(shown))
    console.save_svg(str(ROOT / "docs" / "patch.svg"), title="chipmunk patch", unique_id="chipmunk-patch")


if __name__ == "__main__":
    main()
