"""Each operator against float64 on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chipmunk import ops
from chipmunk.bench.ops.inputs import HEADS, NEURONS, projection, random_lists, random_mlp


@dataclass
class Check:
    """One result of an operator. `error` and `bound` are relative L2 errors against float64."""

    name: str
    error: float
    bound: float
    repeatable: bool

    @property
    def ok(self) -> bool:
        return self.error <= self.bound and self.repeatable


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, or the largest integer."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before, mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖ in float64; NaN anywhere gives infinity."""
    difference = float((out.double() - exact).norm() / exact.norm())
    return difference if difference == difference else float("inf")


def _one(run: Callable[..., Tensor], *args: Any) -> tuple[Tensor]:
    return (run(*args),)


def _twice(run: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], bool]:
    with poisoned():
        first, second = run(), run()
    return first, all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_attention(
    tokens: int, kept: int, group: int, width: int, dtype: torch.dtype, batch: int = 1
) -> Iterator[Check]:
    """Dense attention with column sums, and sparse attention: alone, added to a tensor and subtracted from it."""
    heads, scale = 3, width**-0.5
    q, k, v = projection(tokens, heads, width, batch, dtype)
    label = f"N={tokens} K={kept} group={group} D={width} B={batch} {str(dtype)[6:]}"
    exact_q, exact_k, exact_v = q.double(), k.double(), v.double()
    exact_out, exact_sums = ops.attention_with_column_sums(exact_q, exact_k, exact_v, group, scale, "reference")
    dense = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    bound = 2 * error(dense, exact_out)
    (out, sums), same = _twice(lambda: ops.attention_with_column_sums(q, k, v, group, scale, "triton"))
    yield Check(f"attention_with_column_sums, output, {label}", error(out, exact_out), bound, same)
    yield Check(f"attention_with_column_sums, sums, {label}", error(sums, exact_sums), bound, same)
    indices = random_lists((batch, heads, -(-tokens // group)), tokens, kept)
    addend = torch.randn(batch, tokens, heads, width, device="cuda", dtype=dtype).transpose(1, 2)
    for added, subtract in ((None, False), (addend, False), (addend, True)):
        wanted = ops.column_sparse_attention(
            exact_q,
            exact_k,
            exact_v,
            indices,
            None if added is None else added.double(),
            group,
            scale,
            subtract,
            "reference",
        )
        args = (q, k, v, indices, added, group, scale, subtract)
        (out,), same = _twice(partial(_one, ops.column_sparse_attention, *args, "triton"))
        sign = "" if added is None else ("−" if subtract else "+")
        yield Check(f"column_sparse_attention {sign} {label}", error(out, wanted), bound, same)


def check_mlp(
    tokens: int, kept: int, group: int, activation: str, dtype: torch.dtype, **options: Any
) -> Iterator[Check]:
    """Both linears, and that nothing but the chosen neurons changes in the cache. options: of `random_mlp`."""
    m = random_mlp(tokens, kept, group, dtype=dtype, **options)
    label = f"M={tokens} K={kept} group={group} {activation} {str(dtype)[6:]} {options or ''}"
    exact_cache, exact_out = m.act_cache.double(), m.out_cache.double()
    bias = m.bias.double()
    wanted = ops.sparse_mlp_in(
        m.x.double(), m.weight_in.double(), bias, m.indices, exact_cache, group, activation, "reference"
    )
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    rows = torch.arange(tokens, device="cuda") // group
    chosen = m.indices[:, rows].long()
    dense = functional.gelu(functional.linear(m.x, m.weight_in, m.bias), approximate=approximate).gather(-1, chosen)
    cached = m.act_cache.gather(-1, chosen)

    def run_in() -> tuple[Tensor, Tensor]:
        cache = m.act_cache.clone(memory_format=torch.preserve_format)
        return ops.sparse_mlp_in(m.x, m.weight_in, m.bias, m.indices, cache, group, activation, "triton"), cache

    (delta, cache), same = _twice(run_in)
    yield Check(f"sparse_mlp_in, delta, {label}", error(delta, wanted), 2 * error(dense - cached, wanted), same)
    exact_new = exact_cache.gather(-1, chosen)
    yield Check(
        f"sparse_mlp_in, cache, {label}", error(cache.gather(-1, chosen), exact_new), 2 * error(dense, exact_new), same
    )
    untouched = torch.ones_like(cache, dtype=torch.bool).scatter_(-1, chosen, False)
    kept_rest = bool((cache == m.act_cache)[untouched].all())
    yield Check(f"sparse_mlp_in, rest of the cache, {label}", 0.0 if kept_rest else 1.0, 0.5, True)

    ops.sparse_mlp_out(delta.double(), m.weight_out.double(), m.indices, exact_out, group, "reference")
    spread = torch.zeros_like(cache).scatter_(-1, chosen, delta)
    dense_out = m.out_cache + functional.linear(spread, m.weight_out)

    def run_out() -> tuple[Tensor]:
        out = m.out_cache.clone()
        ops.sparse_mlp_out(delta, m.weight_out, m.indices, out, group, "triton")
        return (out,)

    (out,), same = _twice(run_out)
    yield Check(f"sparse_mlp_out, {label}", error(out, exact_out), 2 * error(dense_out, exact_out), same)


def check_selection(shape: tuple[int, ...], keep: int, random: int) -> Iterator[Check]:
    """Selections have to be equal, ties and random ones too: their error is 0 or 1."""
    scores = torch.rand(shape, device="cuda")
    seed = torch.randint(0, 1000, (3,), device="cuda")
    for name, values in (("", scores), (" with ties", (scores * 50).round()), (" all equal", torch.zeros_like(scores))):
        (out,), same = _twice(partial(_one, ops.select_columns, values, seed, keep, random, "triton"))
        wanted = ops.select_columns(values, seed, keep, random, "reference")
        equal = torch.equal(out, wanted)
        yield Check(f"select_columns {shape} {keep} + {random}{name}", 0.0 if equal else 1.0, 0.5, same)


def check_neurons(shape: tuple[int, ...], neurons: int, keep: int, random: int) -> Iterator[Check]:
    """The same for neurons, with the means that the selection refreshes. shape: of the means, (B, G, parts, rows)."""
    seed = torch.randint(0, 1000, (3,), device="cuda")
    new, means = torch.randn(2, *shape, device="cuda").bfloat16()
    refreshed = means.clone()
    wanted = ops.select_neurons(new, refreshed, seed, neurons, keep, random, "reference")

    def run() -> tuple[Tensor, Tensor]:
        mutated = means.clone()
        return ops.select_neurons(new, mutated, seed, neurons, keep, random, "triton"), mutated

    (out, mutated), same = _twice(run)
    equal = torch.equal(out, wanted) and torch.equal(mutated, refreshed)
    yield Check(f"select_neurons {shape} {keep} + {random} of {neurons}", 0.0 if equal else 1.0, 0.5, same)


def check_swiglu(tokens: int, kept: int, group: int, width: int, neurons: int, dtype: torch.dtype) -> Iterator[Check]:
    """The first linear of a gated MLP, and that nothing but the chosen neurons changes in the cache."""
    m = random_mlp(tokens, kept, group, width=width, neurons=neurons, dtype=dtype)
    gate, value = m.weight_in, torch.randn_like(m.weight_in) * width**-0.5
    cache = m.act_cache.double()
    wanted = ops.sparse_swiglu_in(
        m.x.double(), gate.double(), value.double(), None, None, m.indices, cache, group, "reference"
    )
    chosen = m.indices[:, torch.arange(tokens, device="cuda") // group].long()
    dense = (functional.silu(m.x @ gate.T) * (m.x @ value.T)).gather(-1, chosen) - m.act_cache.gather(-1, chosen)

    def run() -> tuple[Tensor, Tensor]:
        mutated = m.act_cache.clone(memory_format=torch.preserve_format)
        return ops.sparse_swiglu_in(m.x, gate, value, None, None, m.indices, mutated, group, "triton"), mutated

    (delta, mutated), same = _twice(run)
    label = f"M={tokens} K={kept} group={group} C={width} F={neurons} {str(dtype)[6:]}"
    yield Check(f"sparse_swiglu_in, delta, {label}", error(delta, wanted), 2 * error(dense, wanted), same)
    untouched = torch.ones_like(mutated, dtype=torch.bool).scatter_(-1, chosen, False)
    kept_rest = bool((mutated == m.act_cache)[untouched].all())
    yield Check(f"sparse_swiglu_in, rest of the cache, {label}", 0.0 if kept_rest else 1.0, 0.5, True)


def checks(match: str = "") -> Iterator[Check]:
    """All of them, or those whose function's name contains one of the comma-separated words."""
    bf16, fp16 = torch.bfloat16, torch.float16
    everything: list[partial[Iterator[Check]]] = [
        partial(check_attention, 4352, 672, 128, 128, bf16),
        partial(check_attention, 1091, 163, 192, 128, bf16, batch=2),
        partial(check_attention, 777, 320, 128, 64, fp16),
        partial(check_attention, 300, 300, 64, 64, bf16, batch=2),
        partial(check_attention, 515, 16, 256, 128, fp16),
        partial(check_attention, 1091, 130, 128, 128, bf16),
        partial(check_mlp, 4352, 4352, 128, "gelu_tanh", bf16),
        partial(check_mlp, 1000, 704, 128, "gelu_tanh", bf16, width=768, neurons=2048, batch=2),
        partial(check_mlp, 600, 64, 256, "gelu_tanh", fp16, width=384, neurons=1024),
        partial(check_mlp, 1000, 700, 128, "gelu", fp16, width=320, neurons=1280, batch=2),
        partial(check_mlp, 333, 96, 64, "gelu_tanh", bf16, width=136, neurons=500, transposed_cache=False),
        partial(check_mlp, 700, 512, 192, "gelu_tanh", bf16, width=256, neurons=1024, batch=2, transposed_weight=False),
        partial(check_selection, (1, HEADS, 34, 4352), 672, 0),
        partial(check_selection, (2, 34, NEURONS), 3738, 614),
        partial(check_selection, (1, 3, 133, 16896), 2800, 100),
        partial(check_selection, (1, 2, 3, 1), 1, 0),
        partial(check_selection, (3, 5, 1000), 0, 7),
        partial(check_neurons, (1, 34, 1, NEURONS), NEURONS, 3738, 614),
        partial(check_neurons, (2, 9, 3, 2 * 1000), 1000, 300, 7),
        partial(check_neurons, (1, 5, 2, 333), 333, 0, 40),
        partial(check_swiglu, 4352, 2048, 128, 1024, 4096, bf16),
        partial(check_swiglu, 777, 300, 192, 320, 1000, fp16),
    ]
    for check in everything:
        if not match or any(word in check.func.__name__ for word in match.split(",")):
            yield from check()
