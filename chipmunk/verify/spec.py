"""What the parent process tells a worker, and the work that both sides share by name: scenarios and configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipmunk.rewrite.plan import ModelFacts


@dataclass(frozen=True)
class Image:
    """One image of a scenario: `height` x `width` tokens, beside `text` tokens."""

    batch: int
    height: int
    width: int
    text: int
    steps: int


IMAGES = (Image(1, 13, 11, 19, 12), Image(2, 9, 10, 19, 9))
"""Two in a row of different sizes and step counts. Neither grid fits patches or tiles: 162 tokens and 109."""

LARGE_IMAGES = (Image(1, 18, 22, 33, 10),)
"""With weights of the user's own, at their full width."""

_ATTENTION = {"mbm": 48, "counts_multiple_of": 16}
_MLP = {"bm": 32, "mbm": 32, "counts_multiple_of": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "kept": {"attn": {**_ATTENTION, "top_keys": 1.0}, "mlp": {**_MLP, "top_keys": 1.0, "random_keys": 0.0}},
    "default": {"attn": _ATTENTION, "mlp": _MLP},
    "other": {
        "attn": {**_ATTENTION, "recompute_mask": False, "random_keys": 0.1, "full_step_schedule": [0, 4, 9]},
        "mlp": {"bm": 64, "mbm": 16, "counts_multiple_of": 32, "block_mask_cache": 2, "full_step_every": 5},
        "patchify": {"chunk_size_1": 4, "chunk_size_2": 2},
        "step_caching": {"is_enabled": True, "mode": "adaptive", "keep": 0.7, "first_steps": 3},
    },
}
"""By name, what is in `chipmunk-config.yml`; tiles are cut down to the small model's size, all else is the default or,
in `other`, as far from it as the schema goes."""


@dataclass(frozen=True)
class Scenario:
    """One thing that is run with a model, on both sides."""

    name: str
    model: str
    """`model`, `channels` (more channels in than out) or the name of a subclass."""
    images: tuple[Image, ...]
    config: str
    """Of `CONFIGS`, for the sparse run."""
    loop: int | None = None
    """Index of the repository's loop; None for a loop of verify's own."""
    variant: str = "plain"


@dataclass(frozen=True)
class Spec:
    """One worker's order."""

    side: str
    """`original` or `patched`."""
    root: Path
    out: Path
    facts: ModelFacts
    target: Path
    """The target's file."""
    device: str = "cpu"
    seed: int = 0
    factory: str | None = None
    factory_folder: Path | None = None
    """Where a factory's module may lie beside the checkout: the folder that verify was started in."""
    weights: Path | None = None
    preload: Path | None = None
    """A Python file to execute before anything of the checkout is imported."""
    only: tuple[str, ...] = ()
    """Names of scenarios; all if empty."""
