"""The gathered SwiGLU kernel compiled for a Hopper GPU that is not there."""

from __future__ import annotations

from typing import Any

import torch
from triton_compiled import _check, _tensor, compiled  # noqa: F401

from chipmunk.ops.sparse_swiglu_in import triton as swiglu


def test_gate_and_value_of_a_fused_linear(compiled: list[Any]) -> None:  # noqa: F811
    x, cache = _tensor(1, 4608, 6144), _tensor(1, 18432, 4608).transpose(1, 2)
    gate, value = _tensor(3 * 6144 + 2 * 18432, 6144)[3 * 6144 :].chunk(2)
    indices = _tensor(1, 36, 6656, dtype=torch.int32)
    swiglu._run(x, gate, value, None, None, indices, cache, 128, parameters=swiglu._CANDIDATES[0][0])
    _check(compiled[0])
    assert "cp.async.cg.shared.global" in compiled[0].asm["ptx"]  # 16 bytes at a time, past L1
