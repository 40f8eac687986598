"""doctor, and what patch says about the Python that runs the repository: no torch, no runtime, the wrong packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DROPPED, ROOT, chipmunk

from chipmunk.cli.doctor import _machine, _what_runs
from chipmunk.cli.environment import Environment, Finding


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*DROPPED, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


class Venv:
    """A virtual environment without anything in it, and what a test puts there."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python3*/site-packages")

    def add(self, *files: str) -> None:
        for file in files:
            path = self.packages / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise SystemExit('doctor executed this')\n")

    def add_runtime(self) -> None:
        (self.packages / "checkout.pth").write_text(f"{ROOT}\n")


@pytest.fixture
def venv(tmp_path: Path) -> Venv:
    return Venv(tmp_path / "venv")


def findings(*words: str | Path, code: int) -> dict[str, tuple[str, str, str | None]]:
    done = chipmunk("doctor", *words, "--json")
    assert done.code == code, done.err
    found = json.loads(done.out)
    assert found["status"] == ("healthy" if code == 0 else "check failed")
    return {item["subject"]: (item["level"], item["says"], item["next_command"]) for item in found["findings"]}


def test_a_python_without_anything(venv: Venv) -> None:
    found = findings("--python", venv.python, code=1)
    assert found["torch"][:2] == ("problem", "not installed")
    level, says, remedy = found["runtime"]
    assert (level, says) == ("problem", "this Python cannot import chipmunk, which patched code does")
    assert remedy == f"{venv.python} -m pip install {ROOT}"
    done = chipmunk("doctor", "--python", venv.python)
    assert done.code == 1
    assert f"{venv.python} -m pip install 'torch>=2.6'" in done.out


def test_the_runtime_is_found_where_it_is_installed(venv: Venv) -> None:
    venv.add_runtime()
    found = findings("--python", venv.python, code=1)
    assert found["runtime"][0] == "ok"
    assert found["torch"][0] == "problem"


def test_the_original_package_of_the_same_name_is_told_from_ours(venv: Venv) -> None:
    venv.add("chipmunk/__init__.py", "chipmunk/modules/attn.py", "chipmunk/ops/mlp.py")
    level, says, remedy = findings("--python", venv.python, code=1)["runtime"]
    assert level == "problem"
    assert f"another package called chipmunk is in {venv.packages / 'chipmunk'}" in says
    assert remedy is not None
    assert remedy.startswith(f"{venv.python} -m pip uninstall chipmunk")


@pytest.mark.parametrize("layout", ["src", "."])
def test_a_package_in_site_packages_that_hides_the_patched_checkout(patched: Path, venv: Venv, layout: str) -> None:
    venv.add_runtime()
    venv.add("flux/__init__.py")
    if layout == "src":
        assert chipmunk("revert", patched).code == 0
        (patched / "src").mkdir()
        shutil.move(patched / "flux", patched / "src" / "flux")
        assert chipmunk("patch", patched).code == 0
    level, says, remedy = findings(patched, "--python", venv.python, code=1)["flux"]
    if layout == ".":  # found first, in the working directory
        assert (level, says) == ("ok", f"imported from this repository, {patched / 'flux'}")
    else:
        assert (level, remedy) == ("problem", f"{venv.python} -m pip install --editable {patched}")
        assert str(venv.packages / "flux") in says
        (venv.packages / "flux" / "__init__.py").unlink()
        (venv.packages / "flux").rmdir()
        assert findings(patched, "--python", venv.python, code=1)["flux"][0] == "note"
        (venv.packages / "editable.pth").write_text(f"{patched / 'src'}\n")
        assert findings(patched, "--python", venv.python, code=1)["flux"][0] == "ok"


def test_an_unpatched_repository_is_looked_at_too(starter: Path, venv: Venv) -> None:
    found = findings(starter, "--python", venv.python, code=1)
    assert found["repository"][1] == f"{starter}: unpatched"
    assert found["flux"][0] == "ok"


def test_a_python_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    assert chipmunk("doctor", "--python", tmp_path / "none").code == 2
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho not a python >&2\n")
    silent.chmod(0o755)
    done = chipmunk("doctor", "--python", silent)
    assert done.code == 2
    assert "not a python" in done.err


def test_patch_says_what_to_install_where(starter: Path, venv: Venv) -> None:
    for how, done in (
        ("given", chipmunk("patch", starter, "--python", venv.python)),
        ("the active environment", chipmunk("patch", starter, VIRTUAL_ENV=str(venv.folder))),
        ("on your PATH", chipmunk("patch", starter, PATH=str(venv.folder / "bin"))),
    ):
        assert done.code == 0
        (note,) = [line for line in done.lines if line.startswith("Note")]
        assert "this Python cannot import chipmunk" in note
        assert f"{venv.python}" in note
        assert note.endswith(f", {how})")
        assert done.lines[-1].endswith(f" -m pip install {ROOT}")
    venv.add_runtime()
    assert "Note" not in chipmunk("patch", starter, "--python", venv.python).out


def test_patch_names_other_packages_that_would_be_imported_instead(starter: Path, venv: Venv) -> None:
    venv.add("chipmunk/__init__.py", "flux/__init__.py")
    (starter / "src").mkdir()
    shutil.move(starter / "flux", starter / "src" / "flux")
    done = chipmunk("patch", starter, "--python", venv.python)
    assert done.code == 0
    assert f"another package called chipmunk is in {venv.packages / 'chipmunk'}" in done.out
    assert f"flux: imported from {venv.packages / 'flux'}, not from this repository" in done.out


def test_patch_never_executes_a_python_inside_the_repository(starter: Path) -> None:
    inside = Venv(starter / ".venv")
    inside.python.unlink()
    inside.python.write_text("#!/bin/sh\ntouch executed\n")
    inside.python.chmod(0o755)
    done = chipmunk("patch", starter)
    assert (
        f"this Python cannot import chipmunk, which patched code does ({inside.python}, the repository's .venv)"
        in done.out
    )
    (inside.packages / "chipmunk_flux-0.1.0.dist-info").mkdir()
    assert "Note" not in chipmunk("patch", starter).out
    assert not (starter / "executed").exists()
    assert not Path("executed").exists()


GPU = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "bytes": 85_000_000_000}
FACTS = {"python": "3.11.7", "torch": "2.11.0", "cuda": "13.0", "hip": None, "devices": [GPU], "triton": "3.6.0"}


def looked(**changes: object) -> dict[str, Finding]:
    facts = {key: value for key, value in {**FACTS, **changes}.items() if value is not ...}
    found = Environment("/usr/bin/python3", "given", facts=facts)
    return {finding.subject: finding for finding in [*_machine(found), *_what_runs(found)]}


def test_what_a_gpu_makes_possible() -> None:
    found = looked()
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["GPU"].says == "NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB"
    old = looked(devices=[{**GPU, "capability": [7, 5]}])["Triton"]
    assert (old.level, old.says) == ("note", "will not run: the GPU is older than compute capability 8.0")
    none = looked(devices=[], cuda=None)
    assert none["GPU"].says == "torch sees none (its build: CPU only)"
    assert none["Triton"].level == "note"
    missing = looked(triton=..., triton_error="not installed")["Triton"]
    assert missing.level == "problem"
    assert missing.next_command == "/usr/bin/python3 -m pip install triton"
    assert looked(torch="2.5.1+cu124")["torch"].level == "problem"
    assert looked(torch="2.6.0")["torch"].level == "ok"
    assert looked(torch="nightly")["torch"].level == "ok"
    assert looked(hip="6.2", cuda=None)["Triton"].level == "note"


def test_the_probe_needs_no_newer_python_than_the_tool() -> None:
    source = (ROOT / "chipmunk/cli/probe.py").read_text()
    compile(source, "probe.py", "exec")
    done = subprocess.run(
        [sys.executable, "-I", "-c", source, json.dumps([None, ["json"], False])], capture_output=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["executable"] == sys.executable
    assert os.path.basename(answer["packages"]["json"][0]) == "json"
