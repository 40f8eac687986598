"""The reference operators against plain loops in float64: they are the oracle that everything else is held against."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk import ops

POISON = 1e30


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    size = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return {"rtol": size, "atol": size}


def strided_qkv(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As a fused projection gives them: views of one (B, N, 3, H, D) tensor."""
    q, k, v = random(batch, rows, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def probabilities(q: Tensor, k: Tensor, row: int, keys: list[int], scale: float) -> list[float]:
    scores = [scale * float(q[row] @ k[key]) for key in keys]
    largest = max(scores)
    exponentials = [math.exp(score - largest) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


SHAPES = [(1, 1, 1, 4, 1), (1, 2, 7, 4, 3), (2, 1, 12, 5, 4), (2, 2, 9, 8, 16)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "rows", "width", "group"), SHAPES)
def test_attention_with_column_sums(
    batch: int, heads: int, rows: int, width: int, group: int, dtype: torch.dtype
) -> None:
    q, k, v = strided_qkv(batch, heads, rows, width, dtype)
    out, sums = ops.attention_with_column_sums(q, k, v, group, 0.7)

    wide_q, wide_k, wide_v = q.double(), k.double(), v.double()
    groups = math.ceil(rows / group)
    expected = torch.zeros(batch, heads, rows, width, dtype=torch.float64)
    expected_sums = torch.zeros(batch, heads, groups, rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for row in range(rows):
                weights = probabilities(wide_q[b, h], wide_k[b, h], row, list(range(rows)), 0.7)
                for key, weight in enumerate(weights):
                    expected[b, h, row] += weight * wide_v[b, h, key]
                    expected_sums[b, h, row // group, key] += weight
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
    torch.testing.assert_close(sums.double(), expected_sums, **tolerance(max(dtype, torch.float32, key=_precision)))
    assert out.dtype == dtype
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.transpose(1, 2).is_contiguous()


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize(("batch", "heads", "rows", "width", "group"), SHAPES)
def test_column_sparse_attention(
    batch: int, heads: int, rows: int, width: int, group: int, with_addend: bool, subtract: bool, dtype: torch.dtype
) -> None:
    q, k, v = strided_qkv(batch, heads, rows, width, dtype)
    groups, kept = math.ceil(rows / group), max(1, rows // 3)
    indices = torch.rand(batch, heads, groups, rows, generator=torch.Generator().manual_seed(3)).argsort(-1)
    indices = indices[..., :kept].sort(-1).values.int()
    addend = random(batch, rows, heads, width, seed=2, dtype=dtype).transpose(1, 2) if with_addend else None
    before = None if addend is None else addend.clone()
    out = ops.column_sparse_attention(q, k, v, indices, addend, group, 0.7, subtract)

    expected = torch.zeros(batch, heads, rows, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for row in range(rows):
                keys = indices[b, h, row // group].tolist()
                weights = probabilities(q[b, h].double(), k[b, h].double(), row, keys, 0.7)
                sparse = sum(weight * v[b, h, key].double() for weight, key in zip(weights, keys, strict=True))
                start = torch.zeros(width).double() if addend is None else addend[b, h, row].double()
                expected[b, h, row] = start - sparse if subtract else start + sparse
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    if addend is not None:
        assert torch.equal(addend, before)
        assert out.untyped_storage().data_ptr() != addend.untyped_storage().data_ptr()


def test_all_columns_are_dense_attention() -> None:
    q, k, v = strided_qkv(2, 2, 11, 8, torch.float64)
    everything = torch.arange(11, dtype=torch.int32).expand(2, 2, 3, 11)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(ops.column_sparse_attention(q, k, v, everything, None, 4, 0.3, False), dense)
    torch.testing.assert_close(ops.attention_with_column_sums(q, k, v, 4, 0.3)[0], dense)


def plain_hash(step: int, layer: int, group: int, column: int) -> int:
    """As docs/architecture.md states it, on Python's integers."""

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x7FEB352D % 2**32
        h ^= h >> 15
        h = h * 0x846CA68B % 2**32
        return h ^ (h >> 16)

    golden = 0x9E3779B9
    return mix((column + golden * mix((group + golden * mix((layer + golden * mix(step)) % 2**32)) % 2**32)) % 2**32)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_select_columns(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 20))
    keep = data.draw(st.integers(0, columns))
    chosen_at_random = data.draw(st.integers(0 if keep else 1, columns - keep)) if keep < columns else 0
    leading = data.draw(st.sampled_from([(1, 1), (2, 3), (2, 2, 3)]))
    step, layer = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 56))
    values = st.sampled_from([0.0, 1.0, 1.5, -2.0, 3.25])  # few values: many ties
    count = math.prod(leading) * columns
    scores = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).reshape(*leading, columns)
    got = ops.select_columns(scores, torch.tensor([step, layer, 0]), keep, chosen_at_random)

    assert got.shape == (*leading, keep + chosen_at_random)
    assert got.dtype == torch.int32
    flat_scores, flat = scores.reshape(leading[0], -1, columns), got.reshape(leading[0], -1, keep + chosen_at_random)
    for b in range(leading[0]):
        for group in range(flat_scores.shape[1]):
            row = flat_scores[b, group].tolist()
            ranking = sorted(range(columns), key=lambda j: (-row[j], j))
            best, rest = ranking[:keep], ranking[keep:]
            rest.sort(key=lambda j: (plain_hash(step, layer, group, j), j))
            assert flat[b, group].tolist() == sorted(best + rest[:chosen_at_random])


def test_random_columns_differ_between_steps_layers_and_groups_but_not_between_batch_elements() -> None:
    scores = torch.zeros(2, 2, 64)
    first, other_step, other_layer = (
        ops.select_columns(scores, torch.tensor([step, layer, 0]), 0, 8) for step, layer in ((1, 1), (2, 1), (1, 2))
    )
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_layer)


@pytest.mark.parametrize("rows_of_a_neuron", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_neurons(dtype: torch.dtype, rows_of_a_neuron: int) -> None:
    batch, groups, parts, neurons, keep, chance = 2, 3, 2, 11, 4, 2
    new, means = (torch.randn(batch, groups, parts, rows_of_a_neuron * neurons).to(dtype) for _ in range(2))
    seed, before = torch.tensor([5, 3, 0]), means.clone()
    got = ops.select_neurons(new, means, seed, neurons, keep, chance)

    scores = torch.zeros(batch, groups, neurons, dtype=torch.float64)
    for neuron in range(neurons):
        for row in range(neuron, rows_of_a_neuron * neurons, neurons):
            scores[..., neuron] += (new[..., row].double() - before[..., row].double()).abs().sum(dim=2)
    assert torch.equal(got, ops.select_columns(scores, seed, keep, chance))
    for b in range(batch):
        for group in range(groups):
            chosen = set(got[b, group].tolist())
            for row in range(rows_of_a_neuron * neurons):
                source = new if row % neurons in chosen else before
                assert torch.equal(means[b, group, :, row], source[b, group, :, row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_sparse_mlp_in_and_out(with_bias: bool, activation: str, dtype: torch.dtype) -> None:
    batch, rows, width, neurons, group, kept = 2, 7, 5, 12, 3, 4
    fused = random(4 + neurons, width, seed=1, dtype=dtype)
    weight, bias = fused[4:], random(4 + neurons, seed=2, dtype=dtype)[4:] if with_bias else None
    out_weight = random(width, 3 + neurons, seed=3, dtype=dtype)[:, 3:]
    x = random(batch, 2 * rows, width, dtype=dtype)[:, ::2]
    indices = torch.tensor([[0, 3, 5, 11], [1, 2, 3, 4], [8, 9, 10, 11]]).expand(batch, -1, -1).int().contiguous()
    indices[1, 0] = torch.tensor([2, 4, 6, 7])

    cache = random(batch, rows, neurons, seed=4, dtype=dtype)
    output = random(batch, rows, width, seed=5, dtype=dtype)
    old_cache, old_output = cache.clone(), output.clone()
    delta = ops.sparse_mlp_in(x, weight, bias, indices, cache, group, activation)
    ops.sparse_mlp_out(delta, out_weight, indices, output, group)

    assert delta.shape == (batch, rows, kept)
    assert delta.dtype == dtype
    for b in range(batch):
        for row in range(rows):
            chosen = indices[b, row // group].tolist()
            hidden = x[b, row].double() @ weight.double().T + (0 if bias is None else bias.double())
            tanh = "tanh" if activation == "gelu_tanh" else "none"
            new = torch.nn.functional.gelu(hidden, approximate=tanh)
            torch.testing.assert_close(cache[b, row, chosen].double(), new[chosen], **tolerance(dtype))
            others = [j for j in range(neurons) if j not in chosen]
            assert torch.equal(cache[b, row, others], old_cache[b, row, others])
            change = cache[b, row, chosen].double() - old_cache[b, row, chosen].double()
            torch.testing.assert_close(delta[b, row].double(), change, **tolerance(dtype))
            added = delta[b, row].double() @ out_weight[:, chosen].double().T
            expected = old_output[b, row].double() + added
            torch.testing.assert_close(output[b, row].double(), expected, **tolerance(dtype))


def test_results_do_not_depend_on_what_the_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that an operator makes is written in full: poisoned memory changes nothing."""
    q, k, v = strided_qkv(2, 2, 9, 4, torch.float32)
    indices = torch.tensor([0, 4, 8]).expand(2, 2, 3, 3).int()
    x, weight, chosen = random(2, 7, 5), random(12, 5), torch.tensor([0, 3, 5]).expand(2, 3, 3).int()

    def run() -> list[Tensor]:
        delta = ops.sparse_mlp_in(x, weight, None, chosen, torch.zeros(2, 7, 12), 3, "gelu")
        sparse = ops.column_sparse_attention(q, k, v, indices, None, 4, 0.5, False)
        return [*ops.attention_with_column_sums(q, k, v, 4, 0.5), sparse, delta]

    clean, poisoned_sizes = run(), []

    def poisoned_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        poisoned_sizes.append(size)
        return self.new_full(size if isinstance(size[0], int) else size[0], POISON, **options)

    monkeypatch.setattr(Tensor, "new_empty", poisoned_empty)
    for expected, poisoned in zip(clean, run(), strict=True):
        assert torch.equal(expected, poisoned)
    assert len(poisoned_sizes) >= len(clean)


def test_reorder_tokens() -> None:
    order = torch.tensor([2, 0, 1, 3])
    for x in (random(2, 4, 3), random(2, 4), torch.arange(8).reshape(2, 4), random(3, 4, 2).transpose(0, 2)):
        got = ops.reorder_tokens(x, order)
        assert torch.equal(got, x[:, order])
        assert got.is_contiguous()


def cases() -> dict[str, tuple[object, ...]]:
    q, k, v = strided_qkv(1, 2, 7, 4, torch.float32)
    keys = torch.tensor([0, 4]).expand(1, 2, 3, 2).int().contiguous()
    x, weight = random(1, 7, 5), random(12, 5)
    neurons = torch.tensor([0, 3, 5]).expand(1, 3, 3).int().contiguous()
    return {
        "attention_with_column_sums": (q, k, v, 3, 0.5),
        "column_sparse_attention": (q, k, v, keys, q, 3, 0.5, True),
        "select_columns": (random(1, 2, 3, 7), torch.tensor([1, 2, 0]), 2, 1),
        "select_neurons": (random(1, 3, 2, 24), random(1, 3, 2, 24), torch.tensor([1, 2, 0]), 12, 3, 1),
        "sparse_mlp_in": (x, weight, None, neurons, torch.zeros(1, 7, 12), 3, "gelu"),
        "sparse_mlp_out": (random(1, 7, 3), random(5, 12), neurons, torch.zeros(1, 7, 5), 3),
        "reorder_tokens": (x, torch.tensor([1, 0, 2])),
    }


@pytest.mark.parametrize("operator", sorted(cases()))
def test_registration_is_sound(operator: str) -> None:
    """Schema, aliasing, fake implementation (shapes, strides, dtypes), autograd registration."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.chipmunk, operator), (*cases()[operator], "reference"), test_utils=tests)


@pytest.mark.parametrize("operator", sorted(cases()))
def test_an_explicit_choice_never_falls_back(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "_triton_module", lambda name: "Triton cannot be imported (test)")
    counter: Counter[str] = Counter()
    with pytest.raises(NotImplementedError, match=r"Triton cannot be imported \(test\)"):
        getattr(ops, operator)(*cases()[operator], implementation="triton")
    with ops.record_fallbacks(counter), pytest.raises(ValueError, match="auto, reference, triton"):
        getattr(ops, operator)(*cases()[operator], implementation="cuda")
    assert not counter


def test_auto_counts_why_triton_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(ops.dispatch, "_triton_module", lambda name: "not written yet")
    counter: Counter[str] = Counter()
    with ops.record_fallbacks(counter):
        assert ops.dispatch.call("some_operator", "auto", lambda x: 2, lambda x: None, OnGpu()) == 2  # type: ignore[arg-type]
    assert counter == {"some_operator: not written yet": 1}


@pytest.mark.parametrize(
    ("operator", "index", "value", "message"),
    [
        ("attention_with_column_sums", 1, torch.zeros(1, 2, 8, 4), "one shape"),
        ("attention_with_column_sums", 1, torch.zeros(1, 2, 7, 4).double(), "one dtype"),
        ("column_sparse_attention", 3, torch.zeros(1, 2, 2, 2).int(), "indices must be"),
        ("column_sparse_attention", 3, torch.zeros(1, 2, 3, 0).int(), "at least one key"),
        ("column_sparse_attention", 4, torch.zeros(1, 2, 3, 4), "shape of q"),
        ("select_columns", 2, 7, "cannot keep 7 [+] 1 of 7"),
        ("select_columns", 2, -1, "negative"),
        ("select_neurons", 1, torch.zeros(1, 3, 2, 12), "new and means must be alike"),
        ("select_neurons", 3, 7, "24 rows are not those of 7 neurons"),
        ("select_neurons", 4, 12, "cannot keep 12 [+] 1 of 12"),
        ("select_neurons", 2, torch.tensor([1, 2]), "seed"),
        ("sparse_mlp_in", 1, torch.zeros(12, 4), "weight must be"),
        ("sparse_mlp_in", 4, torch.zeros(1, 7, 11), "cache must be"),
        ("sparse_mlp_in", 6, "relu", "gelu_tanh, gelu"),
        ("sparse_mlp_out", 3, torch.zeros(1, 7, 4), "cache must be"),
        ("sparse_mlp_out", 2, torch.zeros(1, 3, 4).int(), "indices must be"),
    ],
)
def test_wrong_input_is_named(operator: str, index: int, value: object, message: str) -> None:
    arguments = list(cases()[operator])
    arguments[index] = value
    with pytest.raises(ValueError, match=f"chipmunk::{operator}: .*{message}"):
        getattr(ops, operator)(*arguments)


def test_dense_results_only_gives_the_same_output_and_no_caches() -> None:
    q, k, v = (torch.randn(2, 3, 50, 16, dtype=torch.float64) for _ in range(3))
    out, _ = ops.attention_with_column_sums(q, k, v, 16, 0.25, "reference")
    with ops.dense_results_only():
        alone, sums = ops.attention_with_column_sums(q, k, v, 16, 0.25, "reference")
        difference = ops.column_sparse_attention(
            q, k, v, torch.zeros(2, 3, 4, 1, dtype=torch.int32), out, 16, 0.25, True, "reference"
        )
    torch.testing.assert_close(alone, out)
    assert alone.stride() == out.stride() == difference.stride()
    assert sums.shape == (2, 3, 4, 50)
    assert not sums.any()
    assert not difference.any()
