"""Random inputs for the operators, in the shapes that models give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEADS, WIDTH, HIDDEN, NEURONS = 24, 128, 3072, 12288  # FLUX.1-dev


def random_lists(batch: Sequence[int], columns: int, kept: int, device: str = "cuda") -> Tensor:
    """Random lists of `kept` of `columns`, ascending: (…, kept) int32."""
    scores = torch.rand(*batch, columns, device=device)
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values.int()


def projection(
    tokens: int, heads: int = HEADS, width: int = WIDTH, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """q, k, v (B, H, N, D) as views of one packed projection, which is how a model produces them."""
    packed = torch.randn(batch, tokens, 3, heads, width, device="cuda", dtype=dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


@dataclass
class Mlp:
    """One MLP's tensors; the second weight's transpose is contiguous, as the runtime keeps it on a GPU."""

    x: Tensor
    weight_in: Tensor
    bias: Tensor
    weight_out: Tensor
    indices: Tensor
    act_cache: Tensor
    out_cache: Tensor


def random_mlp(
    tokens: int,
    kept: int,
    group: int = 128,
    width: int = HIDDEN,
    neurons: int = NEURONS,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    transposed_cache: bool = True,
    transposed_weight: bool = True,
) -> Mlp:
    """An MLP of `neurons` neurons on (batch, tokens, width), of which each group of `group` rows keeps `kept`.

    transposed_cache, transposed_weight: lie in memory neuron by neuron, as the runtime keeps them on a GPU.
    """

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    cache = random(batch, tokens, neurons)
    weight_out = random(width, neurons, scale=neurons**-0.5)
    return Mlp(
        random(batch, tokens, width),
        random(neurons, width, scale=width**-0.5),
        random(neurons),
        weight_out.T.contiguous().T if transposed_weight else weight_out,
        random_lists((batch, -(-tokens // group)), neurons, kept),
        cache.transpose(1, 2).contiguous().transpose(1, 2) if transposed_cache else cache,
        random(batch, tokens, width),
    )
