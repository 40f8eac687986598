"""The whole path on a CPU: a patched starter, its original, both in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chipmunk.bench.measurement import Run, compare
from chipmunk.bench.process import BenchError
from chipmunk.bench.run import BenchOptions, run
from chipmunk.config import ConfigError
from chipmunk.registry import data_path
from chipmunk.verify.report import VerifyError

ROOT = Path(__file__).parents[2]
SIZES = ("112x96", "128x128")
ATTENTION = "{mbm: 32, counts_multiple_of: 8, full_step_every: 4, first_n_dense_layers: 0, top_keys: 0.25}"
MLP = "{bm: 32, mbm: 32, counts_multiple_of: 32, full_step_every: 4, first_n_dense_layers: 0, top_keys: %s}"


def chipmunk(*words: object, **more: str) -> subprocess.Popen[str]:
    """Start the command line; its output is a pipe."""
    environment = {name: value for name, value in os.environ.items() if name != "CHIPMUNK_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "chipmunk.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, **more},
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter repository, patched."""
    root = tmp_path_factory.mktemp("bench") / "starter"
    shutil.copytree(data_path("templates") / "flux-starter", root, ignore=shutil.ignore_patterns("__pycache__"))
    done = chipmunk("patch", root)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    return root


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two configurations that keep different fractions of the neurons."""
    folder = tmp_path_factory.mktemp("configs")
    for name, kept in (("few", 0.2), ("many", 0.45)):
        (folder / f"{name}.yml").write_text(f"attn: {ATTENTION}\nmlp: {MLP % kept}\n")
    return folder / "few.yml", folder / "many.yml"


def contents(root: Path) -> dict[str, str]:
    """Every file with its hash."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


@dataclass(frozen=True)
class Measured:
    """What one run of the command left."""

    code: int
    errors: str
    report: dict[str, Any]
    output: Path
    untouched: bool
    """Whether the repository is as it was."""

    @property
    def runs(self) -> list[Run]:
        return [Run.from_json(run) for run in self.report["runs"]]


@pytest.fixture(scope="module")
def measured(starter: Path, configs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Two configurations at two sizes, with more speed-up required than there will ever be."""
    output = tmp_path_factory.mktemp("output") / "new"
    before = contents(starter)
    words = ["--device", "cpu", "--size", ",".join(SIZES), "--steps", 8, "--images", 2, "--require", 1000, "--json"]
    process = chipmunk("bench", starter, *words, "--output", output, *(w for c in configs for w in ("--config", c)))
    out, errors = process.communicate()
    assert out, errors
    return Measured(process.returncode, errors, json.loads(out), output, contents(starter) == before)


def test_every_configuration_meets_the_original_at_every_size(measured: Measured) -> None:
    assert measured.untouched
    rows = measured.report["comparisons"]
    assert [(row["config"], row["size"]) for row in rows] == [(c, s) for c in ("few", "many") for s in SIZES]
    assert [run.variant for run in measured.runs] == ["dense", "fewer steps", "chipmunk", "chipmunk"]
    assert measured.report["environment"]["model"].startswith("Flux of flux/model.py")
    assert measured.report["target"] == "flux"
    assert "flux/model.py" in measured.report["files"]


def test_each_model_call_is_timed_and_told_apart(measured: Measured) -> None:
    for each in measured.runs:
        for image in each.images:
            assert len(image.step_ms) == len(image.kinds) == image.steps
            assert 0 < sum(image.step_ms) <= 1e3 * image.seconds
            if each.variant == "chipmunk":
                assert image.steps == 8
                assert image.kinds[1] == "full/sparse"
                assert image.kinds[2:] == ("sparse/sparse", "sparse/sparse", "full/full", *["sparse/sparse"] * 3)
            else:
                assert set(image.kinds) == {"dense"}


def test_what_is_kept_is_what_the_rules_say_after_rounding(measured: Measured) -> None:
    tokens = {"112x96": 32 + 7 * 6, "128x128": 32 + 8 * 8}
    for row in measured.report["comparisons"]:
        keys = {"112x96": 16, "128x128": 24}[row["size"]]  # a quarter, in steps of 8
        neurons = {"few": 128, "many": 256}[row["config"]]  # of 512, with 5 % at random, in steps of 32
        assert row["kept"] == {"keys": keys / tokens[row["size"]], "neurons": neurons / 512}


def test_fewer_dense_steps_fit_into_the_time_of_each_configuration(measured: Measured) -> None:
    for row in measured.report["comparisons"]:
        fitting = 8 * row["chipmunk"]["steady"] / row["dense"]["steady"]
        assert row["fewer_steps"][0] == min(max(int(fitting + 1e-9), 1), 8)


def test_json_is_exact(measured: Measured) -> None:
    """Every figure of the comparisons follows from the raw times that stand beside them."""
    runs = measured.runs
    again = [row for run in runs[2:] for row in compare(runs[0], run, runs[1])]
    assert json.loads(json.dumps([row.to_json() for row in again])) == measured.report["comparisons"]
    assert json.loads((measured.output / "bench.json").read_text()) == measured.report


def test_the_command_ends_with_1_below_what_is_required(measured: Measured) -> None:
    assert measured.code == 1
    assert measured.report["status"] == "below"
    assert measured.report["command"].startswith("chipmunk bench ")
    for name in ("few", "many"):
        assert f"112x96 ({name})" in measured.errors
    assert "Below the required 1000.00×" in measured.errors


def test_the_output_folder_holds_the_tables_and_the_picture(measured: Measured) -> None:
    assert "sparse/sparse" in (measured.output / "bench.txt").read_text()
    assert "few" in (measured.output / "bench.svg").read_text()


def test_a_cpu_says_that_it_is_none(measured: Measured) -> None:
    assert any("CPU" in note for note in measured.report["notes"])


def test_without_a_gpu_it_refuses_and_says_what_it_needs(starter: Path) -> None:
    out, errors = (process := chipmunk("bench", starter, CUDA_VISIBLE_DEVICES="")).communicate()
    assert process.returncode == 2
    assert out == ""
    assert "needs an NVIDIA GPU of compute capability 8.0 or newer" in errors
    assert "40 GB" in errors
    assert "chipmunk doctor" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "1000x768"], "multiples of 16"),
        (["--size", "0x768"], "multiples of 16"),
        (["--size", "big"], "1280x768 say"),
        (["--dtype", "int8"], "bfloat16, float16, float32"),
        (["--picture", "bench.txt"], ".svg, .png"),
        (["--device", "cpu", "--ops"], "--ops"),
        (["--model", "klein-9b", "--weights", "mine.safetensors"], "a size of its own"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(starter: Path, words: list[str], says: str) -> None:
    _, errors = (process := chipmunk("bench", starter, *words)).communicate()
    assert process.returncode == 2
    assert says in errors


def test_a_repository_that_is_not_patched(tmp_path: Path) -> None:
    shutil.copytree(data_path("templates") / "flux-starter", tmp_path / "plain")
    with pytest.raises(VerifyError) as caught:
        run(tmp_path / "plain", BenchOptions(device="cpu"))
    assert "chipmunk patch" in str(caught.value.next_command)


def test_a_loop_that_does_not_take_the_model_names_what_measures_without_it(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(data_path("templates") / "flux-starter", folder)
    sampling = folder / "flux/sampling.py"
    text = sampling.read_text().replace("    model: Flux,\n", "    holder,\n").replace("= model(", "= holder.model(")
    sampling.write_text(text)
    chipmunk("patch", folder).communicate()
    with pytest.raises(BenchError, match=r"takes the model as a parameter \(flux/sampling.py:\d+\)") as caught:
        run(folder, BenchOptions(device="cpu"))
    assert caught.value.next_command == f"chipmunk fidelity {folder}"


def test_a_wrong_configuration_or_no_checkpoint(starter: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.yml").write_text("mlp: {top_keys: 7}\n")
    with pytest.raises(ConfigError):
        run(starter, BenchOptions(device="cpu", configs=(tmp_path / "wrong.yml",)))
    with pytest.raises(BenchError, match="no file"):
        run(starter, BenchOptions(device="cpu", weights=tmp_path / "none.safetensors"))


def test_code_that_cannot_be_imported_says_where_and_why(starter: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(starter, tmp_path / "broken"))
    with (root / "flux" / "model.py").open("a") as file:
        file.write("\n\nraise RuntimeError('no such luck')\n")
    with pytest.raises(BenchError) as caught:
        run(root, BenchOptions(device="cpu"))
    assert "flux/model.py" in caught.value.message
    assert "no such luck" in caught.value.message
    assert "patched" in caught.value.message
    assert str(root) in str(caught.value.next_command)


def script(path: Path, text: str) -> Path:
    """Something that stands where a Python should be."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_process_that_is_killed(starter: Path, tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo last words >&2; kill -KILL $$")
    with pytest.raises(BenchError) as caught:
        run(starter, BenchOptions(python=str(python)))
    assert "SIGKILL: did the machine run out of memory?" in caught.value.message
    assert "last words" in caught.value.message
    assert caught.value.next_command == f"chipmunk verify {starter}"


def test_a_process_that_ends_well_without_a_result(starter: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"without a result \(exit code 0\)"):
        run(starter, BenchOptions(python=str(script(tmp_path / "python", "exit 0"))))


def test_a_python_without_chipmunk(starter: Path, tmp_path: Path) -> None:
    python = script(tmp_path / "python", "echo \"ModuleNotFoundError: No module named 'chipmunk'\" >&2; exit 1")
    with pytest.raises(BenchError) as caught:
        run(starter, BenchOptions(python=str(python)))
    assert caught.value.next_command == f"chipmunk doctor --python {python}"


def test_ctrl_c_ends_the_worker_and_what_it_started(starter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "processes"
    python = script(tmp_path / "python", f"sleep 600 & echo $$ $! done > {marker}; sleep 600")
    process = chipmunk("bench", starter, "--python", python)
    while not marker.exists() or "done" not in marker.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    for number in marker.read_text().split()[:2]:
        assert not alive(int(number))


@pytest.fixture
def running(starter: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """`chipmunk bench` in a pipe, with more pictures to draw than anybody waits for; its output folder is `out`."""
    config = tmp_path / "few.yml"
    config.write_text(f"attn: {ATTENTION}\nmlp: {MLP % 0.2}\n")
    words = ["--device", "cpu", "--size", "64x64", "--steps", 8, "--images", 5000, "--output", tmp_path / "out"]
    return chipmunk("bench", starter, *words, "--config", config)


def wait_for(process: subprocess.Popen[str], picture: int) -> list[str]:
    """The lines on stderr up to the one that tells of a picture."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if f"picture {picture} of 5000" in line:
            return lines
    raise AssertionError("".join(lines))


def test_sigterm_leaves_the_table_of_what_there_is(running: subprocess.Popen[str], tmp_path: Path) -> None:
    lines = wait_for(running, 3)
    assert all(re.fullmatch(r" {0,2}\d+:\d\d  [^\x1b\r]+\n", line) for line in lines), lines
    before = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert before["status"] == "interrupted", "what a reader finds if the process is killed now"
    assert len(before["runs"][0]["images"]) >= 2
    os.kill(running.pid, signal.SIGTERM)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    times = [one["seconds"] for one in kept["runs"][0]["images"]]
    assert len(times) >= 3
    assert all(f"{seconds:.2f}" in out for seconds in times)
    assert "What was drawn before it was stopped" in (tmp_path / "out" / "bench.txt").read_text()
    assert "Interrupted" in errors
    assert str(tmp_path / "out") in errors
    assert "\x1b" not in out + errors


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True
