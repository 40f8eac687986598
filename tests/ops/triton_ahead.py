"""Kernels compiled ahead, while an operator is traced, for a GPU that is not there; to be run by `test_launch.py`."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chipmunk import ops
from chipmunk.ops import launch, tuning


class _Absent:
    """A driver for a Hopper GPU that nothing is ever launched on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Here:
    """Runs a job at once, in this process."""

    def submit(self, job: Any, *args: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(job(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Name of each kernel that was compiled or launched, and whether it was compiled only."""
    found: list[tuple[str, bool]] = []

    def record(self: Any, *args: Any, **options: Any) -> None:
        assert not any(isinstance(arg, Tensor) for arg in args) or not options["warmup"]
        found.append((self.fn.__module__.split(".")[2], options["warmup"]))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_asked", set())
    monkeypatch.setattr(launch, "_pending", {})
    monkeypatch.setattr(launch, "workers", _Here)
    driver.set_active(_Absent())
    return found


def _trace(dtype: torch.dtype = torch.bfloat16, implementation: str = "auto") -> None:
    """One sparse and one selecting step's operators, as the compiler sees them."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 640, 128, dtype=dtype, device="cuda")
        seed = torch.empty(3, dtype=torch.int64, device="cuda")
        out, sums = ops.attention_with_column_sums(q, q, q, 128, 0.1, implementation)
        keys = ops.select_columns(sums, seed, 96, 0, implementation)
        result = ops.column_sparse_attention(q, q, q, keys, out, 128, 0.1, True, implementation)
        assert result.shape == q.shape
        x = torch.empty(1, 640, 256, dtype=dtype, device="cuda")
        cache = torch.empty(1, 1024, 640, dtype=dtype, device="cuda").transpose(1, 2)
        weight = torch.empty(1024, 256, dtype=dtype, device="cuda")
        neurons = torch.empty(1, 5, 256, dtype=torch.int32, device="cuda")
        delta = ops.sparse_mlp_in(x, weight, None, neurons, cache, 128, "gelu_tanh", implementation)
        ops.sparse_mlp_out(delta, weight.t(), neurons, x, 128, implementation)


def test_every_kernel_of_a_traced_step_is_compiled_once_and_none_is_launched(built: list[tuple[str, bool]]) -> None:
    _trace()
    _trace()  # the compiler asks for shapes several times
    names = [name for name, _ in built]
    assert set(names) == {
        "attention_with_column_sums",
        "select_columns",
        "column_sparse_attention",
        "sparse_mlp_in",
        "sparse_mlp_out",
    }
    assert all(only_compiled for _, only_compiled in built)
    assert max(names.count(name) for name in names) <= 2  # a product and the sums of its parts


def test_what_triton_does_not_run_is_not_compiled(built: list[tuple[str, bool]]) -> None:
    _trace(dtype=torch.float32)
    _trace(implementation="reference")
    assert {name for name, _ in built} <= {"select_columns"}  # its scores are float32 always


def test_an_unknown_gpu_is_left_to_the_search_at_the_first_launch(
    built: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TABLE", {})
    monkeypatch.setattr(tuning, "_found", {"nothing": {}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unknown")
    monkeypatch.setattr(tuning, "_shared_memory", lambda device: 100 << 10)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _trace()
    assert {name for name, _ in built} == {"select_columns"}


def test_a_launch_waits_for_the_compilation_of_its_kernel(built: list[tuple[str, bool]]) -> None:
    _trace()
    (kernel,) = [each for each in launch._pending if "select" in each.fn.__module__]
    launch.launch(kernel, (1,), 7)
    assert [only_compiled for name, only_compiled in built if name == "select_columns"] == [True, False]
    assert kernel not in launch._pending


def test_a_worker_leaves_the_compiled_kernel_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    args = [torch.float32, torch.int64, torch.int32, 640, 96, 0, 5]
    options = {"head": 512, "tail": 128, "tile": 512, "has_best": True, "has_random": False, "num_warps": 4}
    with suppress(Exception):  # the launcher, which comes after the kernel, is linked with the driver of a GPU
        launch.compile_to_disk(
            "chipmunk.ops.select_columns.triton", "_kernel", GPUTarget("cuda", 90, 32), args, options, {}
        )
    assert list(tmp_path.rglob("_kernel.cubin"))


def test_a_kernel_that_cannot_be_compiled_ahead_costs_nothing(
    built: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(launch, "compile_to_disk", broken)
    _trace()
    assert not built
    for kernel in list(launch._pending):
        launch.launch(kernel, (1,), 7)
    assert [only_compiled for _, only_compiled in built] == [False] * len(built)
    monkeypatch.setattr(launch, "workers", lambda: None)
    _trace()
    assert not launch._pending
