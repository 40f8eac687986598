"""What is timed: each operator in the sizes of FLUX models, beside the dense PyTorch that it stands in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from chipmunk import ops
from chipmunk.bench.ops.inputs import HEADS, HIDDEN, NEURONS, WIDTH, Mlp, projection, random_lists, random_mlp
from chipmunk.ops import tuning

Run = Callable[[], Any]
INPUT_SETS = 3
"""So many runs a case, each with inputs of its own, so that none stays in L2."""


@dataclass
class Case:
    """One line of the table. `dense` names the case it is compared with; `flops` are useful ones."""

    name: str
    build: Callable[[], list[Run]]
    dense: str = ""
    flops: float = 0.0
    operator: str = ""
    parameters: tuning.Parameters | None = None


def _dense_attention(tokens: int) -> list[Run]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v)

    return [partial(run, *projection(tokens)) for _ in range(INPUT_SETS)]


def _sparse_attention(tokens: int, kept: int, group: int) -> list[Run]:
    runs: list[Run] = []
    for _ in range(INPUT_SETS):
        q, k, v = projection(tokens)
        addend = torch.randn(1, tokens, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        indices = random_lists((1, HEADS, -(-tokens // group)), tokens, kept)
        args = (q, k, v, indices, addend, group, WIDTH**-0.5, False, "triton")
        runs.append(partial(ops.column_sparse_attention, *args))
    return runs


def _selecting_attention(tokens: int, group: int) -> list[Run]:
    sets = [projection(tokens) for _ in range(INPUT_SETS)]
    return [partial(ops.attention_with_column_sums, q, k, v, group, WIDTH**-0.5, "triton") for q, k, v in sets]


def _dense_with_lse(tokens: int) -> list[Run]:
    from chipmunk.ops.attention_with_column_sums.triton import dense_attention

    sets = [projection(tokens) for _ in range(INPUT_SETS)]
    return [partial(dense_attention, q, k, v, WIDTH**-0.5) for q, k, v in sets]


def _select(shape: tuple[int, ...], keep: int, random: int) -> list[Run]:
    seed = torch.tensor([3, 4, 0], device="cuda")
    sets = [torch.rand(shape, device="cuda") for _ in range(INPUT_SETS)]
    return [partial(ops.select_columns, s, seed, keep, random, "triton") for s in sets]


def _dense_mlp(tokens: int) -> list[Run]:
    @torch.compile
    def run(m: Mlp, weight_out: Tensor, bias_out: Tensor) -> Tensor:
        hidden = functional.gelu(functional.linear(m.x, m.weight_in, m.bias), approximate="tanh")
        return functional.linear(hidden, weight_out, bias_out)

    sets = [random_mlp(tokens, 64) for _ in range(INPUT_SETS)]
    return [partial(run, m, m.weight_out.contiguous(), m.bias[:HIDDEN]) for m in sets]


def _sparse_mlp(tokens: int, kept: int, part: str, transposed_cache: bool = True) -> list[Run]:
    def run(m: Mlp, delta: Tensor) -> None:
        if part in ("in", "both"):
            delta = ops.sparse_mlp_in(m.x, m.weight_in, m.bias, m.indices, m.act_cache, 128, "gelu_tanh", "triton")
        if part in ("out", "both"):
            ops.sparse_mlp_out(delta, m.weight_out, m.indices, m.out_cache, 128, "triton")

    sets = [random_mlp(tokens, kept, transposed_cache=transposed_cache) for _ in range(INPUT_SETS)]
    return [partial(run, m, torch.randn(1, tokens, kept, device="cuda").bfloat16()) for m in sets]


def _dense_swiglu(tokens: int, width: int, neurons: int) -> list[Run]:
    @torch.compile
    def run(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
        gate, value = functional.linear(x, weight_in).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * value, weight_out)

    sets = [_random_swiglu(tokens, 64, width, neurons) for _ in range(INPUT_SETS)]
    return [partial(run, m.x, torch.cat((m.weight_in, value)), m.weight_out.contiguous()) for m, value in sets]


def _random_swiglu(tokens: int, kept: int, width: int, neurons: int) -> tuple[Mlp, Tensor]:
    """An MLP, and the second half of its first weight: the values."""
    m = random_mlp(tokens, kept, width=width, neurons=neurons)
    return m, torch.randn_like(m.weight_in) * width**-0.5


def _sparse_swiglu(tokens: int, kept: int, width: int, neurons: int, part: str) -> list[Run]:
    def run(m: Mlp, gate: Tensor, value: Tensor, delta: Tensor) -> None:
        if part in ("in", "both"):
            delta = ops.sparse_swiglu_in(m.x, gate, value, None, None, m.indices, m.act_cache, 128, "triton")
        if part in ("out", "both"):
            ops.sparse_mlp_out(delta, m.weight_out, m.indices, m.out_cache, 128, "triton")

    runs: list[Run] = []
    for _ in range(INPUT_SETS):
        m, value = _random_swiglu(tokens, kept, width, neurons)
        gates, values = torch.cat((m.weight_in, value)).chunk(2)
        runs.append(partial(run, m, gates, values, torch.randn(1, tokens, kept, device="cuda").bfloat16()))
    return runs


def _means(tokens: int) -> list[Run]:
    """What comes before an MLP's selection: the means of the groups, and fc1 of them."""

    @torch.compile
    def run(m: Mlp) -> Tensor:
        means = m.x.view(1, -1, 128, HIDDEN).float().mean(2).to(m.x.dtype)
        return functional.linear(means, m.weight_in, m.bias)

    return [partial(run, random_mlp(tokens, 64)) for _ in range(INPUT_SETS)]


def _select_neurons(tokens: int, keep: int, random: int) -> list[Run]:
    seed = torch.tensor([3, 4, 0], device="cuda")
    shape = (1, tokens // 128, 1, NEURONS)
    sets = [torch.randn(2, *shape, device="cuda").bfloat16() for _ in range(INPUT_SETS)]
    return [
        partial(ops.select_neurons, new, means.clone(), seed, NEURONS, keep, random, "triton") for new, means in sets
    ]


def _grid(**columns: str) -> list[tuning.Parameters]:
    """Parameters from columns of numbers."""
    values = {name: [int(v) for v in text.split()] for name, text in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


VARIANTS: dict[str, list[tuning.Parameters]] = {
    "column_sparse_attention": _grid(
        gluon=" 1   1   1   0   0",
        rows="128 128 128 128 128",
        keys="128  64 128  32  64",
        warps=" 8   8   8   4   8",
        stages="2   4   3   3   2",
        registers="0 0  0   0 128",
    ),
    "attention_with_column_sums": _grid(
        queries=" 256 256 256 128 128 128",
        tile="     64  64  64  64 128  64",
        warps="     4   4   8   4   8   4",
        stages="    3   2   3   3   2   2",
        splits="    2   2   2   2   2   2",
        programs="  2   2   2   2   1   3",
    ),
    "select_columns": _grid(warps="4 8 16 32"),
    "sparse_mlp_in": _grid(
        rows="    128 128 128 128 128 128 128",
        neurons=" 256 256 256 256 256 256 256",
        depth="    64  64  64  64  64  64  64",
        warps="     8   8   8   8   8   8   8",
        stages="    3   3   3   3   4   4   4",
        split="     4   4   4   4   4   4   4",
        balanced="  1   0   0   0   1   0   1",
        band="      0   8   1  16   8   0   1",
    ),
    "sparse_swiglu_in": _grid(
        rows="    128 128 128 128 128 128 128",
        neurons=" 128 128 128 128 128  64  64",
        depth="    64  64  64  64  64  64  64",
        warps="     8   8   8   8   8   8   4",
        stages="    3   3   3   4   3   4   3",
        split="     2   1   2   2   2   1   1",
        balanced="  1   1   0   1   1   1   1",
        band="      0   0   0   0   8   0   0",
    ),
    "sparse_mlp_out": [
        *_grid(gluon="1 1 1", blocks="2 2 3", stages="3 4 3"),
        *_grid(
            rows="    128 128 128 128",
            columns=" 256 256 256 256",
            depth="    64  64  64  64",
            warps="     8   8   8   8",
            stages="    3   3   3   4",
            split="     4   4   4   4",
            balanced="  1   0   0   1",
            band="      0   8   1   0",
        ),
    ],
}


def cases(variants: str) -> Iterator[Case]:
    """All lines of the table, in order. variants: `all` times every design that was tried, beside the tuned one."""

    def named(operator: str) -> list[tuple[str, tuning.Parameters | None]]:
        found = VARIANTS.get(operator, []) if variants == "all" else []
        return [("", None), *((" " + " ".join(f"{k[:2]}{v}" for k, v in p.items()), p) for p in found)]

    for tokens, counts in ((4352, (672, 1344)), (16896, (896, 2800))):
        dense = f"dense attention N={tokens}"
        full = 4.0 * HEADS * WIDTH * tokens
        yield Case(dense, partial(_dense_attention, tokens), flops=full * tokens)
        for kept in counts:
            for label, p in named("column_sparse_attention") if kept != 1344 else [("", None)]:
                build = partial(_sparse_attention, tokens, kept, 128)
                name = f"sparse attention N={tokens} K={kept} ({kept / tokens:.1%}){label}"
                yield Case(name, build, dense, full * kept, "column_sparse_attention", p)
        build = partial(_sparse_attention, tokens, counts[0], 192)
        yield Case(f"sparse attention N={tokens} K={counts[0]} group=192", build, dense, full * counts[0])
        build = partial(_sparse_attention, tokens, counts[1], 192)
        yield Case(f"sparse attention N={tokens} K={counts[1]} group=192", build, dense, full * counts[1])
        name = f"dense attention with log-sum-exp N={tokens}"
        yield Case(name, partial(_dense_with_lse, tokens), dense, full * tokens)
        for label, p in named("attention_with_column_sums"):
            build = partial(_selecting_attention, tokens, 128)
            yield Case(
                f"selecting attention N={tokens}{label}", build, dense, full * tokens, "attention_with_column_sums", p
            )
        yield Case(f"selecting attention N={tokens} group=192", partial(_selecting_attention, tokens, 192), dense)
    for label, p in named("select_columns"):
        for name, shape, keep, random in (
            ("keys", (1, HEADS, 34, 4352), 672, 0),
            ("keys N=16896", (1, HEADS, 132, 16896), 2800, 0),
        ):
            yield Case(f"select {name}{label}", partial(_select, shape, keep, random), "", 0.0, "select_columns", p)
    for tokens in (4352,):
        dense = f"dense MLP M={tokens}"
        yield Case(dense, partial(_dense_mlp, tokens), flops=4.0 * tokens * HIDDEN * NEURONS)
        yield Case(f"MLP means M={tokens}", partial(_means, tokens))
        for label, p in named("select_columns"):
            build = partial(_select_neurons, tokens, 3738, 614)
            yield Case(f"select neurons M={tokens}{label}", build, "", 0.0, "select_columns", p)
        for kept in (4352, 3584):
            flops = 2.0 * tokens * HIDDEN * kept
            share = f"M={tokens} K={kept} ({kept / NEURONS:.1%})"
            for label, p in named("sparse_mlp_in"):
                build = partial(_sparse_mlp, tokens, kept, "in")
                yield Case(f"fc1 {share}{label}", build, "", flops, "sparse_mlp_in", p)
            yield Case(f"fc1 {share} row-major cache", partial(_sparse_mlp, tokens, kept, "in", False), "", flops)
            for label, p in named("sparse_mlp_out"):
                build = partial(_sparse_mlp, tokens, kept, "out")
                yield Case(f"fc2 {share}{label}", build, "", flops, "sparse_mlp_out", p)
            yield Case(f"sparse MLP {share}", partial(_sparse_mlp, tokens, kept, "both"), dense, 2 * flops)

    for label, width, neurons, kept in (("FLUX.2-dev", 6144, 18432, 6656), ("klein-9b", 4096, 12288, 4352)):
        dense, flops = f"dense swiglu MLP, {label}", 2.0 * 4352 * width * neurons
        yield Case(dense, partial(_dense_swiglu, 4352, width, neurons), flops=3 * flops)
        share = f"{label} M=4352 K={kept} ({kept / neurons:.1%})"
        build = partial(_sparse_swiglu, 4352, kept, width, neurons)
        flops *= kept / neurons
        for variant, p in named("sparse_swiglu_in"):
            yield Case(f"swiglu fc1 {share}{variant}", partial(build, "in"), "", 2 * flops, "sparse_swiglu_in", p)
        yield Case(f"swiglu fc2 {share}", partial(build, "out"), "", flops)
        yield Case(f"sparse swiglu MLP {share}", partial(build, "both"), dense, 3 * flops)
