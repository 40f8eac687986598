"""Tune on the starter repository: the search in the patched process, confirmation, and an interruption."""

from __future__ import annotations

import io
import json
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from chipmunk.cli.tune import show_report
from chipmunk.config import load
from chipmunk.fidelity import FidelityOptions
from chipmunk.tune import TuneOptions, TuneReport, run
from tests.cli.command_line import chipmunk
from tests.fidelity.test_fidelity_run import patched_starter

STEPS = 8


def options(tmp_path: Path, floor: float, trials: int = 4) -> TuneOptions:
    start = tmp_path / "start.yml"
    start.write_text("attn: {mbm: 32, counts_multiple_of: 8}\nmlp: {bm: 32, mbm: 32, counts_multiple_of: 16}\n")
    small = FidelityOptions(count=1, seeds=(0,), steps=STEPS, size=(64, 64), command="chipmunk tune x")
    return TuneOptions(fidelity=small, floor=floor, start=start, trials=trials)


def test_a_search_ends_with_a_commented_configuration(tmp_path: Path) -> None:
    root = patched_starter(tmp_path)
    found = run(root, options(tmp_path, 12.0))
    assert found.exit_code == 0
    assert found.tuned is not None
    assert found.confirmed is not None
    assert found.tuned["fidelity"] >= 12
    assert found.tuned["cost"] <= found.trail[0]["cost"]
    assert len(found.tried) <= 5
    path = tmp_path / "found.yml"
    path.write_text(found.text)
    assert load(path).attn.mbm == 32, "what the start says is kept"
    assert "chipmunk tune x" in found.text
    assert f"{found.confirmed['fidelity']:.1f} dB" in found.text
    assert json.loads(json.dumps(found.to_json()))["cost"] == "FLOPs"


def test_an_interruption_leaves_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupt() -> None:
        """As soon as anything has held the floor."""
        while not any('"trail": [{' in best.read_text() for best in tmp_path.glob("chipmunk-tune-*/patched/best.json")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    root = patched_starter(tmp_path)
    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    found = run(root, options(tmp_path, 12.0, trials=500))
    watcher.join()
    assert found.interrupted
    assert found.exit_code == 130
    assert found.tuned == found.trail[-1]
    assert found.confirmed is None
    assert "not confirmed" in found.text
    path = tmp_path / "found.yml"
    path.write_text(found.text)
    load(path)


def test_cost_is_seconds_or_operations(tmp_path: Path) -> None:
    done = chipmunk("tune", tmp_path, "--cost", "money")
    assert done.code == 2
    assert "neither seconds nor FLOPs" in done.err
    small = FidelityOptions(device="cuda")
    assert TuneOptions(fidelity=small).measure == "seconds"
    assert TuneOptions(fidelity=small, cost="FLOPs").measure == "FLOPs"


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "chipmunk-config.yml").write_text("mlp: {}\n")
    done = chipmunk("tune", tmp_path)
    assert done.code == 2
    assert "is there already" in done.err
    assert (tmp_path / "chipmunk-config.yml").read_text() == "mlp: {}\n"


@pytest.mark.parametrize("floor", ["loud", "-3dB", "30 bananas"])
def test_a_floor_is_a_number_of_decibels(tmp_path: Path, floor: str) -> None:
    done = chipmunk("tune", tmp_path, f"--floor={floor}")
    assert done.code == 2
    assert "30dB say" in done.err


def test_what_was_tuned_on_random_weights_says_so() -> None:
    trial = {"what": "the start", "config": {}, "fidelity": 31.0, "cost": 0.8, "pictures": 1}
    about = {"model": "Flux of flux/model.py, 3.0 million parameters", "weights": "random", "dtype": "float32"}
    report = TuneReport(
        root=Path("flux"), target="flux", floor=30.0, trail=(trial,), tried=(trial,), tuned=trial, confirmed=trial,
        interrupted=False, cost="FLOPs", about={**about, "device": "CPU"}, text="mlp: {}", command="", seconds=1.0,
    )  # fmt: skip

    def shown(found: TuneReport) -> str:
        out = io.StringIO()
        show_report(Console(file=out, width=100), found, Path("chipmunk-config.yml"))
        return " ".join(out.getvalue().split())

    assert "Model Flux of flux/model.py, 3.0 million parameters, weights: random, float32" in shown(report)
    assert "random weights say nothing about pictures" in shown(report)
    trained = replace(report, about={**report.about, "weights": "of the repository"})
    assert "say nothing" not in shown(trained)
