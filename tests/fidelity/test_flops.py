"""FLOPs from shapes and kept counts, against sums by hand and against PyTorch's own count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from chipmunk.fidelity.flops import LayerCall, LayerShape, ModelCost, attention, kind, mlp

SHAPE = LayerShape(batch=2, tokens=100, width=64, rows=80, channels=32, neurons=128)


def counted(call: object) -> int:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return counter.get_total_flops()


def test_dense_attention_is_what_pytorch_counts() -> None:
    q, k, v = torch.randn(3, 2, 4, 100, 16)
    assert attention(SHAPE) == counted(lambda: functional.scaled_dot_product_attention(q, k, v))


def test_dense_mlp_is_what_pytorch_counts() -> None:
    x, first, second = torch.randn(2, 80, 32), torch.randn(128, 32), torch.randn(32, 128)
    assert mlp(SHAPE) == counted(lambda: functional.linear(functional.linear(x, first), second))


def test_gated_mlp_has_three_products_for_each_neuron() -> None:
    gated = LayerShape(batch=1, rows=10, channels=4, neurons=8, rows_per_neuron=2)
    x, first, second = torch.randn(1, 10, 4), torch.randn(16, 4), torch.randn(4, 8)
    assert mlp(gated) == counted(lambda: functional.linear(functional.linear(x, first)[..., :8], second))
    assert mlp(gated, LayerCall(mlp="sparse", neurons=2)) == mlp(gated) // 4


def test_sparse_attention_costs_its_keys() -> None:
    assert attention(SHAPE, LayerCall(attention="sparse", keys=25)) == attention(SHAPE) // 4


def test_a_full_step_pays_for_its_caches() -> None:
    dense = attention(SHAPE)
    kept = LayerCall(attention="full", keys=25)
    selecting = LayerCall(attention="full", keys=25, selects_keys=True)
    assert attention(SHAPE, kept) == dense + dense // 4
    assert attention(SHAPE, selecting) == dense + dense // 4 + dense // 2, "queries and keys are multiplied once more"


def test_means_are_counted_where_they_are_computed() -> None:
    through = 2 * 2 * 3 * 32 * 128  # 3 rows of means in each of 2 batch elements
    assert mlp(SHAPE, LayerCall(mlp="full", means=3)) == mlp(SHAPE) + through
    assert mlp(SHAPE, LayerCall(mlp="sparse", neurons=32, means=3)) == mlp(SHAPE) // 4
    selecting = LayerCall(mlp="sparse", neurons=32, means=3, selects_neurons=True)
    assert mlp(SHAPE, selecting) == mlp(SHAPE) // 4 + through


@given(st.integers(0, 100), st.integers(0, 128))
def test_keeping_less_never_costs_more(keys: int, neurons: int) -> None:
    call = LayerCall(attention="sparse", keys=keys, mlp="sparse", neurons=neurons)
    assert attention(SHAPE, call) <= attention(SHAPE)
    assert mlp(SHAPE, call) <= mlp(SHAPE)


def test_a_model_call_is_the_sum_of_its_blocks_and_the_rest() -> None:
    part = attention(SHAPE) + mlp(SHAPE)
    cost = ModelCost(layers=(SHAPE, SHAPE), blocks=(part + 7, part + 11), outside=5)
    dense = {0: LayerCall(), 1: LayerCall()}
    assert cost.dense == 2 * part + 7 + 11 + 5
    assert cost.whole(dense) == cost.dense
    assert cost.sparsifiable(dense) == cost.dense_sparsifiable == 2 * part
    half = {0: LayerCall(), 1: LayerCall(attention="sparse", keys=50, mlp="sparse", neurons=64)}
    assert cost.whole(half) == cost.dense - part // 2


def test_a_skipped_call_costs_what_is_outside_of_the_blocks() -> None:
    cost = ModelCost(layers=(SHAPE,), blocks=(10**9,), outside=5)
    assert cost.whole({}) == 5
    assert cost.sparsifiable({}) == 0


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ({}, "skipped"),
        ({0: LayerCall()}, "dense/dense"),
        ({0: LayerCall(), 1: LayerCall("sparse", 5, mlp="full")}, "sparse/full"),
        ({0: LayerCall("full", 5, mlp="sparse"), 1: LayerCall()}, "full/sparse"),
    ],
)
def test_a_call_is_named_after_its_most_sparse_layer(calls: dict[int, LayerCall], expected: str) -> None:
    assert kind(calls) == expected
