"""`chipmunk verify` end to end, on the starter and on the official code from the package index."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chipmunk import registry
from chipmunk.apply import carry_out, plan_update, revert, unified
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.plan import FileChange
from chipmunk.verify import VerifyError, VerifyOptions, VerifyReport, run

STARTER = registry.data_path("templates") / "flux-starter"
CHECKS = ["off", "everything kept", "parameters", "coverage", "oracle", "sparse error"]


def patch(root: Path) -> tuple[FileChange, ...]:
    known = registry.load()
    update = plan_update(root, lambda files: plan_repository(files, known))
    carry_out(update)
    return update.changes


def starter(folder: Path) -> Path:
    return Path(shutil.copytree(STARTER, folder / "flux-starter"))


def tree(root: Path) -> str:
    """One hash of all names, modes and bytes below a folder."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        found.update(f"{path.relative_to(root)} {path.stat().st_mode}\n".encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def failures(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.says for check in report.checks if not check.holds}


def check_output_of_verify(report: VerifyReport, suffix: str = "") -> None:
    data = report.to_json()
    assert data["status"] == "verified"
    assert report.exit_code == 0
    assert {"file", "line", "patch", "status", "reason"} <= set(data["sites"][0])
    assert "flux/model.py" in [file.replace("fluxbfl", "flux") for file in data["files"]]


@pytest.mark.slow
def test_the_starter_and_a_checkpoint_of_it(tmp_path: Path) -> None:
    root = starter(tmp_path)
    patch(root)
    code = """
from flux.util import configs, load_flow_model, save_checkpoint
params = configs["flux-tiny"].params
params.depth = params.depth_single_blocks = 3
save_checkpoint(load_flow_model("flux-tiny"), "mine.safetensors")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STARTER.parents[1]), str(root)])}
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment, check=True)
    before = tree(root)
    seen: list[tuple[str, int, int]] = []
    options = VerifyOptions(weights=tmp_path / "mine.safetensors")
    report = run(root, options, lambda what, done, total: seen.append((what, done, total)))
    assert failures(report) == {}
    with_weights = [f"{name}, with mine.safetensors" for name in CHECKS if name != "oracle"]
    assert [check.name for check in report.checks] == [*CHECKS, *with_weights]
    check_output_of_verify(report)
    # verifying changed nothing, not even byte code
    assert tree(root) == before
    assert all(0 < done <= total for _, done, total in seen)
    errors = report.checks[CHECKS.index("sparse error")].figures["errors"]["denoise/0"]["calls"]
    # full at steps 0 and 1, but for the order of the tokens; what sparse steps leave out stays from then on
    assert max(errors[:2]) < 1e-6
    assert min(errors[2:10]) > 1e-4


@pytest.fixture(scope="session")
def fluxbfl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official code as a wheel holds it."""
    folder = tmp_path_factory.mktemp("fluxbfl") / "wheel"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*install, "fluxbfl==0.0.3"], check=True)
    return folder


@pytest.mark.slow
def test_the_official_code_from_the_package_index(fluxbfl: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(fluxbfl, tmp_path / "repository"))
    pristine = Path(shutil.copytree(fluxbfl, tmp_path / "pristine"))
    before = tree(root)
    changes = patch(root)
    check = ["git", "apply", "--check", "-"]
    applied = subprocess.run(check, cwd=pristine, input=unified(changes), capture_output=True, check=False)
    assert applied.returncode == 0, applied.stderr

    report = run(root)
    assert failures(report) == {}
    check_output_of_verify(report)
    # the same loop with a reference image and with a condition in the channels, two call slots, and the LoRA wrapper
    assert report.checks[0].figures["scenarios"] == [
        "denoise", "denoise, reference", "denoise, channels", "two call slots", "FluxLoraWrapper",
    ]  # fmt: skip

    assert patch(root) == ()
    revert(root)
    assert tree(root) == before


# What cannot be verified, or does not hold.


def test_an_unpatched_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="is not patched") as refused:
        run(starter(tmp_path))
    assert refused.value.exit_code == 2
    assert refused.value.next_command == f"chipmunk patch {tmp_path / 'flux-starter'}"


def test_edits_in_patched_lines_are_refused_with_their_place(tmp_path: Path) -> None:
    root = starter(tmp_path)
    patch(root)
    file = root / "flux/math.py"
    file.write_text(file.read_text().replace("chipmunk.attention(chipmunk_layer,", "chipmunk.attention(None,"))
    with pytest.raises(VerifyError, match=r"flux/math\.py"):
        run(root)


@pytest.mark.parametrize(
    ("other", "why"),
    [(False, "No module named 'chipmunk'"), (True, "another package called chipmunk is installed there")],
)
def test_a_python_without_chipmunk_is_refused_with_what_to_install(tmp_path: Path, other: bool, why: str) -> None:
    root = starter(tmp_path)
    patch(root)
    installed = tmp_path / "installed"
    (installed / ("chipmunk" if other else "squirrel")).mkdir(parents=True)
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nPYTHONPATH={installed} exec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(VerifyError, match=f"runtime cannot be imported by .*: {why}") as refused:
        run(root, VerifyOptions(python=str(bare)))
    assert refused.value.next_command == f"chipmunk doctor --python {bare}"


def edited(root: Path, file: str, before: str, after: str) -> Path:
    text = (root / file).read_text()
    assert before in text
    (root / file).write_text(text.replace(before, after))
    return root


def test_a_repository_that_does_not_import_is_refused_with_the_line(tmp_path: Path) -> None:
    root = edited(starter(tmp_path), "flux/math.py", "import torch\n", "import torch\n\ntorch.gone\n")
    patch(root)
    with pytest.raises(VerifyError, match=r"flux/model.py cannot be imported: at flux/math.py:\d+: AttributeError"):
        run(root)


@pytest.mark.slow
def test_a_model_that_the_target_cannot_build_needs_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = edited(starter(tmp_path), "flux/model.py", "    theta: int\n", "    theta: int\n    flavour: str\n")
    patch(root)
    with pytest.raises(VerifyError, match="FluxParams has a field 'flavour'") as refused:
        run(root)
    assert "from flux.model import Flux, FluxParams\n\n\ndef build():" in refused.value.message
    assert refused.value.next_command == f"chipmunk verify {root} --factory verify_factory:build"

    monkeypatch.chdir(tmp_path)
    factory = refused.value.message.partition("\n\n")[2]
    assert factory.count("...") == 1
    factory = factory.replace("flavour=...", 'flavour="oak"').replace("depth=5,", "depth=3,")
    with pytest.raises(VerifyError, match=r"--factory verify_factory:build: there is no module verify_factory in /"):
        run(root, VerifyOptions(factory="verify_factory:build"))
    Path("verify_factory.py").write_text(factory)
    report = run(root, VerifyOptions(factory="verify_factory:build", only=("denoise",)))
    assert failures(report) == {}


def test_a_model_that_was_not_patched_is_refused_with_those_that_were(tmp_path: Path) -> None:
    root = starter(tmp_path)
    patch(root)
    with pytest.raises(VerifyError, match="no model that was patched is called Wrong; there are: Flux") as refused:
        run(root, VerifyOptions(model="Wrong"))
    assert refused.value.next_command == f"chipmunk verify {root} --model Flux"


@pytest.mark.slow
def test_a_forward_that_needs_what_verify_does_not_know_needs_a_factory(tmp_path: Path) -> None:
    line = "        img = self.img_in(img)\n"
    root = edited(starter(tmp_path), "flux/model.py", line, '        places = {}["where"]\n' + line)
    patch(root)
    with pytest.raises(
        VerifyError, match=r"the original code fails at flux/model.py:\d+: KeyError: 'where'"
    ) as refused:
        run(root)
    assert "Traceback" not in refused.value.message
    assert refused.value.next_command == f"chipmunk verify {root} --factory verify_factory:build"


@pytest.mark.slow
def test_patched_code_that_does_not_run_fails(tmp_path: Path) -> None:
    root = starter(tmp_path)
    patch(root)
    fault = tmp_path / "fault.py"
    fault.write_text("import chipmunk\nchipmunk.steps, chipmunk.attention = chipmunk.steps, None\n")
    report = run(root, VerifyOptions(preload=fault, only=("denoise",)))
    assert report.exit_code == 1
    assert list(failures(report)) == ["runs"]
    assert "TypeError: 'NoneType' object is not callable" in failures(report)["runs"]
