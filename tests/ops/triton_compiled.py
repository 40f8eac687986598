"""The kernels compiled for a GPU that is not there, with the parameters of the tuned table, by Triton's own ptxas.

What would make them slow shows here: registers that do not suffice, products that ptxas serializes, gathers that are
not asynchronous, more shared memory than there is.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chipmunk.ops import tuning
from chipmunk.ops.attention_with_column_sums import triton as sums
from chipmunk.ops.column_sparse_attention import triton as sparse
from chipmunk.ops.select_columns import triton as select
from chipmunk.ops.select_neurons import triton as neurons
from chipmunk.ops.sparse_mlp_in import triton as mlp_in
from chipmunk.ops.sparse_mlp_out import triton as mlp_out

SHARED_MEMORY = 227 * 1024
TABLE = tuning.TABLE[9, 0]


class _Absent:
    """A driver for a Hopper GPU that nothing is ever launched on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled instead of launched."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        found.append(run(self, *args, **(options | {"warmup": True})))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    driver.set_active(_Absent())
    return found


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _assembled(kernel: Any) -> str:
    """What ptxas says of a kernel."""
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", "-o", "/dev/null", "/dev/stdin"]
    return subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr


def _spilled(kernel: Any) -> int:
    """Bytes that a thread spills."""
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", _assembled(kernel)))


def _check(kernel: Any, spilled: int = 0) -> None:
    ptx = kernel.asm["ptx"]
    assert "serializ" not in _assembled(kernel)
    assert _spilled(kernel) <= spilled
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx


@pytest.mark.parametrize("group", [64, 128, 192])
def test_sparse_attention_in_gluon(group: int, compiled: list[Any]) -> None:
    q = _tensor(1, 640, 24, 128).transpose(1, 2)
    indices = _tensor(1, 24, -(-640 // group), 672, dtype=torch.int32)
    parameters = TABLE[f"column_sparse_attention/128 gluon {sparse._consumers(group)}"]
    sparse._run(q, q, q, indices, q, group, 0.1, False, parameters)
    _check(compiled[-1], spilled=32)


def test_sparse_attention_in_triton(compiled: list[Any]) -> None:
    q = _tensor(1, 640, 24, 128).transpose(1, 2)
    indices = _tensor(1, 24, 5, 672, dtype=torch.int32)
    sparse._run(q, q, q, indices, q, 128, 0.1, True, {"rows": 128, "keys": 64, "warps": 8, "stages": 3})
    _check(compiled[-1])


def test_column_sums(compiled: list[Any]) -> None:
    q = _tensor(1, 600, 24, 128).transpose(1, 2)
    lse = _tensor(1, 24, 600, dtype=torch.float32)
    sums.column_sums(q, q, lse, 128, 0.1, TABLE["attention_with_column_sums/128"])
    _check(compiled[-1])


def test_selection(compiled: list[Any]) -> None:
    seed = _tensor(3, dtype=torch.int64)
    for groups, columns in ((34, 4352), (132, 16896)):
        select.select_columns(_tensor(1, 24, groups, columns, dtype=torch.float32), seed, columns // 6, 0)
    new = _tensor(1, 34, 1, 12288)
    neurons.select_neurons(new, new, seed, 12288, 3738, 614)
    assert len(compiled) == 3
    assert all(_spilled(kernel) <= 32 for kernel in compiled)


def test_gathered_products(compiled: list[Any]) -> None:
    x, cache = _tensor(1, 4352, 3072), _tensor(1, 12288, 4352).transpose(1, 2)
    indices = _tensor(1, 34, 4352, dtype=torch.int32)
    mlp_in._run(
        x, _tensor(12288, 3072), _tensor(12288), indices, cache, 128, "gelu_tanh", parameters=TABLE["sparse_mlp_in"]
    )
    _check(compiled[0])
    delta, weight = _tensor(1, 4352, 4352), _tensor(12288, 3072).T
    mlp_out._run(delta, weight, indices, x, 128, parameters=TABLE["sparse_mlp_out"])
    _check(compiled[2])
    assert len(compiled) == 4  # each with the kernel that finishes the tiles that were cut


def test_the_second_product_in_gluon(compiled: list[Any]) -> None:
    delta, weight = _tensor(1, 4352, 4352), _tensor(12288, 3072).t()
    indices, out = _tensor(1, 34, 4352, dtype=torch.int32), _tensor(1, 4352, 3072)
    mlp_out._run(delta, weight, indices, out, 128, TABLE["sparse_mlp_out/gluon"])
    _check(compiled[0])
    assert "cp.async.cg.shared.global" in compiled[0].asm["ptx"]  # whole rows, past the first cache
    assert compiled[0].metadata.shared <= SHARED_MEMORY
