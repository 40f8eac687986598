"""The check of the Triton operators on a run, in a Python of its own: the interpreter is chosen at the import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chipmunk.verify.checks import Comparison, Outputs

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

HERE = Path(__file__).parent


def test_operators_under_the_interpreter(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    cases = str(HERE / "interpreted_operators.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cases]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def comparison(kept: float, other: float, **operators: Any) -> Comparison:
    """Results of a patched side whose dense output is all ones, with these errors."""
    made = Comparison.__new__(Comparison)
    ones = torch.ones(100)
    made.scenarios = [{"name": "loop", "images": [0]}]
    tensors = {"half off": ones, "half off MATH": ones * (1 + other), "half kept": ones * (1 + kept)}
    made.patched = Outputs.__new__(Outputs)
    made.patched.tensors = {f"{job}/loop/0/{call}": x for job, x in tensors.items() for call in ("000", "latents")}
    found = {name: {"calls": 3, "error": 1e-3, "limit": 8e-3, "passed_over": {}, "holds": True} for name in SPARSE}
    kernels = {"dtype": "bfloat16", "backends": ["MATH"], "operators": found | operators}
    made.results = [{}, {"kernels": kernels}]
    return made


SPARSE = ("attention_with_column_sums", "column_sparse_attention", "sparse_mlp_in")


@pytest.mark.parametrize(
    ("kept", "other", "holds"),
    [(1e-3, 1e-3, True), (1.9e-3, 1e-3, True), (3e-3, 1e-3, False), (float("nan"), 1e-3, False), (0.0, 0.0, False)],
)
def test_half_precision_is_held_against_two_dense_runs(kept: float, other: float, holds: bool) -> None:
    check = comparison(kept, other).half_precision()
    assert check.holds is holds
    assert "bfloat16" in check.says


def test_operators_that_hold() -> None:
    check = comparison(0, 1).kernels()
    assert check.holds
    assert "9 operator calls by Triton" in check.says


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"error": 0.5, "shapes": "(1, 2)"}, "sparse_mlp_in: an error of 5.0e-01 (limit 8e-03) on (1, 2)"),
        ({"passed_over": {"float32": 4}}, "sparse_mlp_in did not run in Triton 4 times: float32"),
    ],
)
def test_operators_that_do_not(bad: dict[str, Any], says: str) -> None:
    each = {"calls": 3, "error": 1e-3, "limit": 8e-3, "shapes": "", "passed_over": {}, "holds": False} | bad
    check = comparison(0, 1, sparse_mlp_in=each).kernels()
    assert not check.holds
    assert check.says == says


def test_a_run_without_attention_in_triton_shows_nothing() -> None:
    made = comparison(0, 1)
    made.results[1]["kernels"]["operators"].pop("column_sparse_attention")
    assert not made.kernels().holds
