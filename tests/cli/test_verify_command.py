"""verify's report, the Python that it runs with, and demo, which goes through everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import chipmunk, environment, in_terminal, process

from chipmunk.apply import revert
from chipmunk.cli import verify as command
from chipmunk.cli.terminal import screen
from chipmunk.verify import Check, VerifyReport
from chipmunk.verify.report import Unverified


def report(*checks: Check) -> VerifyReport:
    return VerifyReport(Path("my repository"), "flux", checks, notes=("a [str] note",), environment={"torch": "2.13"})


def test_the_report_names_each_check_and_what_decides(capsys: pytest.CaptureFixture[str]) -> None:
    good = Check("off", True, "3 outputs [str] have the original's bits")
    command.show_report(screen(), report(good))
    shown = capsys.readouterr().out.splitlines()
    assert "  holds  off  3 outputs [str] have the original's bits" in shown
    assert "All 1 checks hold." in shown
    assert any("a [str] note" in line for line in shown)
    assert shown[-1].split("   ")[0] == "  chipmunk config init 'my repository'"
    command.show_report(screen(), report(good, Check("oracle", False, "differs by 3.0e-01")))
    shown = capsys.readouterr().out.splitlines()
    assert "  FAILS  oracle  differs by 3.0e-01" in shown
    assert "1 of 2 checks fail: do not use the patched code." in shown
    assert any(line.startswith("  chipmunk revert 'my repository'   ") for line in shown)


def test_models_that_were_not_verified_come_with_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    left = Unverified("Packed", "video.py", "needs 'indices'", "chipmunk verify mine --model Packed")
    given = replace(report(Check("off", True, "the same")), unverified=(left,))
    command.show_report(screen(), given)
    shown = capsys.readouterr().out.splitlines()
    assert "  not verified  Packed of video.py: needs 'indices'" in shown
    assert "All 1 checks hold; 1 patched models were not verified." in shown
    assert shown[-1].split() == ["chipmunk", "verify", "mine", "--model", "Packed", "for", "Packed"]


def test_what_cannot_be_verified_is_refused(starter: Path) -> None:
    done = chipmunk("verify", starter)
    assert (done.code, done.out) == (2, "")
    assert f"Next   chipmunk patch {starter}" in done.err
    assert json.loads(chipmunk("verify", starter, "--json").out)["status"] == "refused"
    assert chipmunk("verify", starter, "--python", starter / "none").code == 2


@pytest.mark.slow
def test_demo_walks_through_everything(tmp_path: Path) -> None:
    folder = tmp_path / "my demo"
    another = tmp_path / "bin" / "python3"
    another.parent.mkdir()
    another.write_text("#!/bin/sh\nexit 1\n")
    another.chmod(0o755)
    done = process("demo", folder, "--no-pictures", PATH=os.pathsep.join((str(another.parent), os.environ["PATH"])))
    assert done.code == 0, done.err
    assert not [line for line in done.lines if line.startswith("Note")]  # it is not the Python on the PATH that counts
    headings = [line for line in done.lines if line.startswith("== ")]
    commands = [line.split()[2] for line in done.lines if line.startswith("$ chipmunk ")]
    assert commands == ["patch", "diff", "status", "verify", "revert", "patch", "config"]
    assert len(headings) == len(commands) + 1
    assert any(line.startswith("All ") and line.endswith(" checks hold.") for line in done.lines)
    assert "chipmunk.steps(" in (folder / "flux/sampling.py").read_text()
    assert (folder / "chipmunk-config.yml").exists()
    assert revert(folder).changes
    again = chipmunk("demo", folder)
    assert again.code == 2
    assert "is there already; nothing was written" in again.err


def test_demo_stops_where_a_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chipmunk import registry

    (tmp_path / "templates" / "flux-starter").mkdir(parents=True)
    (tmp_path / "templates" / "flux-starter" / "main.py").write_text("print('no FLUX')\n")
    monkeypatch.setattr(registry, "data_path", lambda name: tmp_path / name)
    done = chipmunk("demo", tmp_path / "demo")
    assert done.code == 2
    assert "this step ended with exit code 2" in done.err


def test_a_fault_of_ours_is_said_to_be_one(starter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chipmunk.cli import planning

    def broken(*args: object, **options: object) -> None:
        raise TypeError("a [str] went wrong")

    monkeypatch.setattr(planning, "plan", broken)
    done = chipmunk("patch", starter)
    assert done.code == 2
    assert "Error  this is a fault in Chipmunk: TypeError: a [str] went wrong" in done.err
    assert "Traceback" in done.err


def test_a_progress_bar_comes_after_a_second_and_only_in_a_terminal(tmp_path: Path) -> None:
    code = "import time; from chipmunk.cli.terminal import Waiting\nwith Waiting() as waiting:\n"
    code += "    waiting('first [str]', 0, 2); time.sleep({}); waiting('second', 1, 2); time.sleep(0.3)\n"
    for seconds, expected in ((1.4, True), (0.1, False)):
        (tmp_path / "waits.py").write_text(code.format(seconds))
        shown = in_terminal(columns=80, program=[sys.executable, str(tmp_path / "waits.py")])
        assert shown.code == 0, shown.out
        assert ("first [str]" in shown.out) is expected
        assert ("second" in shown.out) is expected


def test_where_nothing_can_be_drawn_plain_lines_say_how_far_it_is(tmp_path: Path) -> None:
    code = "import sys, time; from chipmunk.cli import terminal; terminal._PACE = 0.2\n"
    code += "with terminal.Waiting(lines='lines' in sys.argv) as waiting:\n"
    code += "    time.sleep(0.3); waiting('first [str]', 1, 3); waiting('too soon', 2, 3)\n"
    code += "    time.sleep(0.3); waiting('\\x1b[31mlast', 3, 3)\n"
    program = [sys.executable, "-c", code]
    piped = subprocess.run([*program, "lines"], capture_output=True, text=True, env=environment(), check=True)
    assert piped.stdout == ""
    expected = ["  0:00  starting", "  0:00  1 of 3: first [str]", "  0:00  3 of 3: \\x1b[31mlast"]
    assert piped.stderr.splitlines() == expected
    silent = subprocess.run(program, capture_output=True, text=True, env=environment(), check=True)
    assert (silent.stdout, silent.stderr) == ("", "")
    dumb = ["env", "TERM=dumb", *program]
    assert in_terminal("lines", columns=80, program=dumb).out.splitlines() == expected


def test_a_python_without_torch_is_passed_over(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A venv nobody activated: the Python on the PATH sees the checkout through PYTHONPATH, and has no torch."""
    bare = tmp_path / "bin" / "python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(bare.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert command.python_of(starter, None) == sys.executable
    assert command.python_of(starter, str(bare)) == str(bare)
