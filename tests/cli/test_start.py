"""Starting: quick, without torch, with help as plain text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, chipmunk, environment

from chipmunk import __version__

COMMANDS = [
    "patch",
    "diff",
    "status",
    "revert",
    "apply",
    "verify",
    "bench",
    "fidelity",
    "tune",
    "report",
    "doctor",
    "demo",
    "patches",
    "targets",
    "config",
]


def test_help_names_every_command() -> None:
    done = chipmunk("--help")
    assert done.code == 0
    listed = done.out.split("Commands:")[1].split("\n\n")[0]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS


def test_help_comes_in_less_than_half_a_second() -> None:
    def seconds() -> float:
        """Processor time, which does not depend on what else the machine is doing."""
        process = subprocess.Popen([sys.executable, "-m", "chipmunk.cli", "--help"], env=environment())
        _, code, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--help"], {"torch", "triton", "libcst", "rich"}),
        (["patch", "--help"], {"torch", "triton", "libcst", "rich"}),
        (["config", "show"], {"torch", "triton"}),
        (["patch", "templates/flux-starter", "--dry-run"], {"torch", "triton"}),
        (["diff", "templates/flux-starter"], {"torch", "triton"}),
        (["status", "templates/flux-starter"], {"torch", "triton", "libcst"}),
        (["doctor", "--python", sys.executable], {"torch", "triton"}),
        (["patches", "list"], {"torch", "triton"}),
        (["targets", "show", "flux"], {"torch", "triton"}),
    ],
)
def test_commands_import_no_more_than_they_need(words: list[str], without: set[str]) -> None:
    assert without & imported_by(*words) == set()


def test_undoing_needs_no_parser(patched: Path) -> None:
    assert "libcst" not in imported_by("status", str(patched))
    assert "libcst" not in imported_by("revert", str(patched))


def imported_by(*words: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('IMPORTED', *sorted(sys.modules), file=sys.stderr))\n"
        f"sys.argv = ['chipmunk', *{list(words)!r}]\n"
        "from chipmunk.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.rpartition("IMPORTED")[2].split())
    assert "chipmunk.cli.app" in imported
    return imported


def test_version() -> None:
    assert chipmunk("--version").out == f"chipmunk-flux {__version__}\n"


@pytest.mark.parametrize("words", ["nonsense", "patch", "patch . --nonsense", "verify . --seed x"])
def test_usage_errors_are_code_2_and_leave_stdout_alone(words: str) -> None:
    done = chipmunk(*words.split())
    assert (done.code, done.out) == (2, "")
    assert "Error" in done.err


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["patch"], "REPO"),
        (["apply"], "PATCH REPO"),
        (["demo"], "DIR"),
        (["doctor"], "REPO"),
        (["config", "init"], "PLACE"),
        (["patches", "show"], "NAME"),
    ],
)
def test_arguments_are_called_as_in_the_readme(words: list[str], usage: str) -> None:
    first = chipmunk(*words, "--help").out.splitlines()[0]
    assert re.sub(r"[\[\]{}]", "", first).endswith(f"OPTIONS {usage}")
