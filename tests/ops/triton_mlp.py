"""Both gathered products under Triton's interpreter against the PyTorch references, and how they share their work."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from poison import poisoned_memory, test_the_poison_works  # noqa: F401

from chipmunk import ops
from chipmunk.ops import balance, dispatch, tuning
from chipmunk.ops.balance import piece, pieces

PARAMETERS = [
    {"rows": 32, "neurons": 32, "columns": 32, "depth": 16, "warps": 4, "stages": 1, "split": 4},
    {"rows": 32, "neurons": 64, "columns": 64, "depth": 16, "warps": 4, "stages": 1, "split": 2, "band": 2},
    {"rows": 32, "neurons": 64, "columns": 128, "depth": 32, "warps": 4, "stages": 1, "split": 1, "balanced": 0},
]
# batch, tokens, width, neurons, kept, group; the first leaves one tile for three programs to cut
SHAPES = [(1, 97, 208, 150, 100, 32), (2, 70, 50, 90, 33, 48), (1, 33, 16, 64, 1, 32)]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)]
)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_fc1_and_fc2(
    shape: tuple[int, ...], parameters: tuning.Parameters, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.override, "sparse_mlp_in", parameters)
    monkeypatch.setitem(dispatch.override, "sparse_mlp_out", parameters)
    batch, tokens, width, neurons, kept, group = shape
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    fused = torch.randn(2 * neurons, width + 3).mul(width**-0.5).to(dtype)
    weight_in = fused[neurons:, :width]  # a view, as of a fused linear
    indices = torch.rand(batch, -(-tokens // group), neurons).topk(kept).indices.sort().values.int()
    x = torch.randn(batch, tokens, 2 * width).to(dtype)[..., :width]
    for activation, bias, by_neuron in (("gelu_tanh", True, True), ("gelu", False, False)):
        cache = torch.randn(batch, tokens, neurons).to(dtype)
        if by_neuron:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches = [cache.clone(memory_format=torch.preserve_format) for _ in range(2)]
        biases = torch.randn(neurons).to(dtype) if bias else None
        delta, wanted = (
            ops.sparse_mlp_in(x, weight_in, biases, indices, mutated, group, activation, which)
            for mutated, which in zip(caches, ("triton", "reference"), strict=True)
        )
        torch.testing.assert_close(delta, wanted, **tolerance)
        torch.testing.assert_close(caches[0], caches[1], **tolerance)

        weight_out = torch.randn(width, neurons + 5).to(dtype)[:, 5:]
        if by_neuron:
            weight_out = weight_out.T.contiguous().T
        outs = [torch.ones(batch, tokens, width, dtype=torch.float32 if bias else dtype) for _ in range(2)]
        for out, which in zip(outs, ("triton", "reference"), strict=True):
            ops.sparse_mlp_out(wanted, weight_out, indices, out, group, which)
        torch.testing.assert_close(outs[0], outs[1], rtol=2e-3, atol=2e-5 if bias else 2e-2)


@triton.jit
def _count(counts, steps, tiles, programs_: tl.constexpr, whole, left, parts, run):
    program = tl.program_id(0)
    for number in range(pieces(program, programs_, whole, left, parts)):
        tile, first, last, part = piece(number, program, programs_, steps, whole, left, run)
        for step in range(first, last):
            tl.atomic_add(counts + tile * steps + step, 1)
        if part >= 0:
            tl.atomic_add(counts + tiles * steps + part * left + tile - whole, 1)


@pytest.mark.parametrize("tiles", [1, 2, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("steps", [1, 12, 13, 40])
@pytest.mark.parametrize("programs", [1, 4, 7])
def test_each_step_of_each_tile_is_done_once(tiles: int, steps: int, programs: int) -> None:
    share = balance.share(tiles, steps, programs)
    counts = torch.zeros(tiles * steps + share.left * share.parts, dtype=torch.int32)
    _count[(share.programs,)](
        counts, steps, tiles, share.programs, share.whole, share.left, share.parts, share.run
    )  # the last ones: each part's sums are stored once
    assert (counts == 1).all()


def test_left_over_tiles_are_cut() -> None:
    share = balance.share(tiles=408, steps=68, programs=132)
    assert (share.whole, share.left, share.parts, share.run) == (396, 12, 10, 7)
    assert balance.share(396, 68, 132).left == 0
    assert balance.share(408, 68, 132, balanced=False) == balance.Share(132, 408, 0, 0, 68)
