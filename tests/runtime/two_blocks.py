"""Models of two blocks of each kind, of which the first is always dense, in loops of `STEPS` steps."""

from __future__ import annotations

from typing import Any

import flux_model
import torch
from flux_model import Flux, denoise, small
from torch import Tensor

import chipmunk

STEPS = 12


def build(seed: int = 0, kind: type[Flux] = Flux) -> Any:
    return flux_model.build(seed, kind, double=2, single=2)


def fresh(given: dict[str, Tensor], steps: int = STEPS, config: dict[str, Any] | None = None) -> list[Tensor]:
    """What a model that did nothing before computes."""
    model = build()
    chipmunk.enable(model, config or small())
    return denoise(model, steps, **given)


def enabled(**changes: Any) -> Flux:
    model = build()
    chipmunk.enable(model, small(**changes))
    return model


def call(model: Any, step: int, given: dict[str, Tensor]) -> Tensor:
    return model(**given, timesteps=torch.full((given["img"].shape[0],), 1 - step / STEPS))
