"""Both attention kernels under Triton's interpreter against the PyTorch references."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, test_the_poison_works  # noqa: F401
from torch import Tensor

from chipmunk import ops
from chipmunk.ops import dispatch, tuning

TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3}
SPARSE = [
    {"rows": 32, "keys": 16, "warps": 4, "stages": 1},
    {"rows": 64, "keys": 32, "warps": 4, "stages": 1},  # rows do not divide some groups, keys not the lists
]
SUMS = [
    {"queries": 32, "tile": 32, "warps": 4, "stages": 1, "splits": 2, "programs": 2},
    {"queries": 16, "tile": 64, "warps": 4, "stages": 1, "splits": 1, "programs": 1},  # a group in several parts
    {"queries": 128, "tile": 16, "warps": 4, "stages": 1, "splits": 3, "programs": 2},  # several groups in a block
]
SHAPES = [(1, 2, 70, 32, 32), (2, 1, 68, 64, 48), (1, 1, 33, 16, 64), (1, 1, 96, 16, 32)]  # batch, heads, N, D, group
LEFT_OVER = (1, 1, 200, 16, 32)  # one block more than programs that run at once: it is cut along its 13 tiles of keys

CASES = [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, loud: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, width, _ = shape
    packed = torch.randn(batch, tokens, 3, heads, width).mul(loud).to(dtype)  # strided, as a projection gives them
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _close(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(out.float(), wanted.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("parameters", SPARSE)
@pytest.mark.parametrize("kept", [1, 29])
def test_sparse(
    shape: tuple[int, ...],
    kept: int,
    parameters: tuning.Parameters,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(dispatch.override, "column_sparse_attention", parameters)
    q, k, v = _inputs(shape, dtype)
    batch, heads, tokens, width, group = shape
    groups = -(-tokens // group)
    indices = torch.rand(batch, heads, groups, tokens).topk(kept).indices.sort().values.int()
    addend = torch.randn(batch, heads, tokens, width).to(dtype)
    for added, subtract in ((None, False), (None, True), (addend, False), (addend, True)):
        args = (q, k, v, indices, added, group, width**-0.5, subtract)
        out = ops.column_sparse_attention(*args, "triton")
        wanted = ops.column_sparse_attention(*args, "reference")
        _close(out, wanted, dtype)
        assert out.stride() == wanted.stride()


@pytest.mark.parametrize(("shape", "dtype"), [*CASES, (LEFT_OVER, torch.float32)])
@pytest.mark.parametrize("parameters", SUMS)
def test_column_sums(
    shape: tuple[int, ...], parameters: tuning.Parameters, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.override, "attention_with_column_sums", parameters)
    q, k, v = _inputs(shape, dtype)
    group, scale = shape[-1], shape[-2] ** -0.5
    out, sums = ops.attention_with_column_sums(q, k, v, group, scale, "triton")
    wanted, wanted_sums = ops.attention_with_column_sums(q, k, v, group, scale, "reference")
    _close(out, wanted, dtype)
    _close(sums, wanted_sums, dtype)
    assert out.stride() == wanted.stride()
    assert sums.stride() == wanted_sums.stride()


def test_scores_far_from_zero_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.override, "column_sparse_attention", SPARSE[0])
    q, k, v = _inputs((1, 1, 64, 32, 32), torch.float32, loud=30)
    indices = torch.arange(64, dtype=torch.int32).expand(1, 1, 2, 64)
    args = (q, k, v, indices, None, 32, 1.0, False)
    _close(ops.column_sparse_attention(*args, "triton"), ops.column_sparse_attention(*args, "reference"), torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.bfloat16}, "interpreter"),
        ({"width": 24}, "head dimension 24"),
        ({"group": 20}, "query groups of 20 rows"),
        ({"transposed": True}, "not contiguous in the head dimension"),
    ],
)
def test_what_cannot_run_says_why(change: dict[str, object], reason: str) -> None:
    width, group = int(change.get("width", 32)), int(change.get("group", 32))  # type: ignore[call-overload]
    q = torch.randn(1, 1, 64, width, dtype=change.get("dtype", torch.float32))  # type: ignore[call-overload]
    if "transposed" in change:
        q = q.transpose(2, 3).contiguous().transpose(2, 3)
    indices = torch.zeros(1, 1, -(-64 // group), 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=reason):
        ops.column_sparse_attention(q, q, q, indices, None, group, 1.0, False, "triton")
    with pytest.raises(NotImplementedError, match=reason):
        ops.attention_with_column_sums(q, q, q, group, 1.0, "triton")
