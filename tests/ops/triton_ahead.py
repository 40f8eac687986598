"""Kernels compiled ahead, while an operator is traced, for a GPU that is not there; to be run by `test_launch.py`."""

from __future__ import annotations

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
    driver.set_active(_Absent())
    return found


def _wait() -> None:
    for futures in launch._pending.values():
        for future in futures:
            future.result()


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
    _wait()
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
    _wait()
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
    _wait()
    assert {name for name, _ in built} == {"select_columns"}


def test_a_launch_waits_for_the_compilation_of_its_kernel(built: list[tuple[str, bool]]) -> None:
    _trace()
    (kernel,) = [each for each in launch._pending if "select" in each.fn.__module__]
    launch.launch(kernel, (1,), 7)
    assert built[-1] == ("select_columns", False)
    assert [only_compiled for name, only_compiled in built if name == "select_columns"] == [True, False]
    assert kernel not in launch._pending


def test_a_kernel_that_cannot_be_compiled_ahead_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        launched = False

        def warmup(self, *args: object, **options: object) -> None:
            raise RuntimeError("no compiler")

        def __getitem__(self, grid: object) -> Any:
            return lambda *args: setattr(self, "launched", True)

    kernel = Broken()
    with launch.compiling_ahead(torch.device("cpu")):
        launch.launch(kernel, (1,), 1)
    assert not kernel.launched
    launch.launch(kernel, (1,), 1)
    assert kernel.launched
