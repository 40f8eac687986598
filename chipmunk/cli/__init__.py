"""The command line. It starts without torch, and without LibCST until a command needs it."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run `chipmunk` on the process's arguments; ends with an exit code of `docs/exit-codes.md`."""
    gc.disable()  # a run is over in seconds, of which looking for garbage would take a fifth
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets an escape, not a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        from chipmunk.cli.app import app

        app(prog_name="chipmunk")
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)
    finally:
        gc.freeze()  # nor does Python look for any on its way out
