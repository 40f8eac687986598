"""Selection of neurons in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from chipmunk.ops.select_columns.reference import select_columns


def select_neurons(new: Tensor, means: Tensor, seed: Tensor, neurons: int, keep: int, random: int) -> Tensor:
    """See `chipmunk.ops.select_neurons`. Scores in float32 at least."""
    exact = torch.float64 if new.dtype == torch.float64 else torch.float32
    scores = (new.to(exact) - means.to(exact)).abs().sum(dim=2)
    by_neuron = (*new.shape[:3], -1, neurons)
    indices = select_columns(scores.reshape(*new.shape[:2], -1, neurons).sum(dim=2), seed, keep, random)
    chosen = indices.long()[:, :, None, None].expand(-1, -1, new.shape[2], new.shape[3] // neurons, -1)
    means.view(by_neuron).scatter_(-1, chosen, new.reshape(by_neuron).gather(-1, chosen))
    return indices
