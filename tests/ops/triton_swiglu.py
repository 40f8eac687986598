"""The gathered SwiGLU product under Triton's interpreter, against its PyTorch reference and against float64."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_memory, test_the_poison_works  # noqa: F401
from torch.nn import functional

from chipmunk import ops
from chipmunk.ops import dispatch, tuning

PARAMETERS = [
    {"rows": 32, "neurons": 32, "depth": 16, "warps": 4, "stages": 1, "split": 2},
    {"rows": 32, "neurons": 64, "depth": 16, "warps": 4, "stages": 1, "split": 1, "band": 2},
    {"rows": 16, "neurons": 64, "depth": 32, "warps": 4, "stages": 1, "split": 2, "balanced": 0},
]
# batch, tokens, width, neurons, kept, group; the first leaves one tile for three programs to cut
SHAPES = [(1, 97, 200, 150, 100, 32), (2, 70, 50, 90, 33, 48), (1, 33, 16, 64, 1, 32)]


@pytest.mark.parametrize(
    ("shape", "parameters", "dtype"),
    [
        *zip(SHAPES, PARAMETERS, (torch.float32,) * 3, strict=True),
        (SHAPES[1], PARAMETERS[0], torch.float16),
    ],
)
def test_gate_and_value(
    shape: tuple[int, ...], parameters: tuning.Parameters, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.override, "sparse_swiglu_in", parameters)
    batch, tokens, width, neurons, kept, group = shape
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 4e-3}
    fused = torch.randn(3 * neurons, width + 3).mul(width**-0.5).to(dtype)[:, :width]  # views, as of a fused linear
    indices = torch.rand(batch, -(-tokens // group), neurons).topk(kept).indices.sort().values.int()
    x = torch.randn(batch, tokens, 2 * width).to(dtype)[..., :width]
    for gate_first, biased, by_neuron in ((True, True, True), (False, False, False)):
        first, second = fused[neurons:].chunk(2)
        gate, value = (first, second) if gate_first else (second, first)
        biases = torch.randn(2, neurons).to(dtype).unbind() if biased else (None, None)
        cache = torch.randn(batch, tokens, neurons).to(dtype)
        if by_neuron:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches = [cache.clone(memory_format=torch.preserve_format) for _ in range(2)]
        delta, wanted = (
            ops.sparse_swiglu_in(x, gate, value, *biases, indices, mutated, group, which)
            for mutated, which in zip(caches, ("triton", "reference"), strict=True)
        )
        torch.testing.assert_close(delta, wanted, **tolerance)
        torch.testing.assert_close(caches[0], caches[1], **tolerance)

        gated, values = (
            functional.linear(x.double(), w.double(), None if b is None else b.double())
            for w, b in zip((gate, value), biases, strict=True)
        )
        chosen = indices.long().repeat_interleave(group, dim=1)[:, :tokens]
        exact = (functional.silu(gated) * values).gather(-1, chosen)
        torch.testing.assert_close(caches[0].gather(-1, chosen).double(), exact, **tolerance)
        torch.testing.assert_close(delta.double(), exact - cache.double().gather(-1, chosen), **tolerance)
        kept_rest = cache.scatter(-1, chosen, 0)
        assert torch.equal(caches[0].scatter(-1, chosen, 0), kept_rest)


def test_what_it_cannot_run_is_named() -> None:
    x, gate, indices = torch.randn(1, 7, 5), torch.randn(12, 5), torch.tensor([0, 3]).expand(1, 3, 2).int().contiguous()
    apart = torch.randn(12, 6)[:, :5]
    with pytest.raises(NotImplementedError, match="different ways"):
        ops.sparse_swiglu_in(x, gate, apart, None, None, indices, torch.zeros(1, 7, 12), 3, "triton")
    with pytest.raises(NotImplementedError, match=r"torch\.float16"):
        ops.sparse_swiglu_in(x, gate.half(), gate.half(), None, None, indices, torch.zeros(1, 7, 12), 3, "triton")
