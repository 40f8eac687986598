"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the GPUs they are tuned for.

Both want a Python of their own: the interpreter is chosen when `triton` is imported, and compiling for a GPU that is
not there replaces Triton's driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("cases", "interpreted"),
    [
        ("triton_attention.py", True),
        ("triton_mlp.py", True),
        ("triton_selection.py", True),
        ("triton_compiled.py", False),
        ("triton_ahead.py", False),
    ],
)
def test_triton(cases: str, interpreted: bool, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / cases)]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
