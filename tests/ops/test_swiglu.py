"""The SwiGLU operator: its reference against plain loops in float64, its registration, and its kernel without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk import ops

HERE = Path(__file__).parent
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_reference(with_bias: bool, gate_first: bool, dtype: torch.dtype) -> None:
    batch, rows, width, neurons, group = 2, 7, 5, 12, 3
    halves = random(4 + 2 * neurons, width, seed=1, dtype=dtype)[4:].chunk(2)
    gate, value = halves if gate_first else reversed(halves)
    biases = random(2, neurons, seed=2, dtype=dtype).unbind() if with_bias else (None, None)
    x = random(batch, 2 * rows, width, dtype=dtype)[:, ::2]
    indices = torch.tensor([[0, 3, 5, 11], [1, 2, 3, 4], [8, 9, 10, 11]]).expand(batch, -1, -1).int().contiguous()
    indices[1, 0] = torch.tensor([2, 4, 6, 7])
    cache = random(batch, rows, neurons, seed=4, dtype=dtype)
    before = cache.clone()
    delta = ops.sparse_swiglu_in(x, gate, value, *biases, indices, cache, group)

    assert delta.shape == (batch, rows, 4)
    assert delta.dtype == dtype
    assert delta.is_contiguous()
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for b in range(batch):
        for row in range(rows):
            chosen = indices[b, row // group].tolist()
            for place, neuron in enumerate(chosen):
                g, v = (
                    float(x[b, row].double() @ w[neuron].double()) + (0.0 if bias is None else float(bias[neuron]))
                    for w, bias in zip((gate, value), biases, strict=True)
                )
                new = torch.tensor(g / (1 + pow(2.718281828459045, -g)) * v, dtype=torch.float64)
                torch.testing.assert_close(cache[b, row, neuron].double(), new, **near)
                change = cache[b, row, neuron].double() - before[b, row, neuron].double()
                torch.testing.assert_close(delta[b, row, place].double(), change, **near)
            others = [j for j in range(neurons) if j not in chosen]
            assert torch.equal(cache[b, row, others], before[b, row, others])


def arguments() -> list[Any]:
    neurons = torch.tensor([0, 3, 5]).expand(1, 3, 3).int().contiguous()
    gate, value = random(24, 5).chunk(2)
    return [random(1, 7, 5), gate, value, None, None, neurons, torch.zeros(1, 7, 12), 3]


def test_registration_is_sound() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.chipmunk.sparse_swiglu_in, (*arguments(), "reference"), test_utils=tests)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(7, 5), "x must be"),
        (1, torch.zeros(12, 4), "gate's weight must be"),
        (2, torch.zeros(11, 5), "one shape"),
        (3, torch.zeros(12), "both have a bias"),
        (5, torch.zeros(1, 2, 3).int(), "indices must be"),
        (6, torch.zeros(1, 7, 24), "cache must be"),
    ],
)
def test_wrong_input_is_named(index: int, value: Tensor, message: str) -> None:
    given = arguments()
    given[index] = value
    with pytest.raises(ValueError, match=f"chipmunk::sparse_swiglu_in: .*{message}"):
        ops.sparse_swiglu_in(*given)


def test_poisoned_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = ops.sparse_swiglu_in(*arguments())
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **_: self.new_full(size, 1e30))
    assert torch.equal(clean, ops.sparse_swiglu_in(*arguments()))


@pytest.mark.parametrize(("cases", "interpreted"), [("triton_swiglu.py", True), ("triton_swiglu_compiled.py", False)])
def test_triton(cases: str, interpreted: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / cases)]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
