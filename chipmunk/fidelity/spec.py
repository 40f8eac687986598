"""What the parent process tells a fidelity worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipmunk.rewrite.plan import ModelFacts


@dataclass(frozen=True)
class Picture:
    """One picture to draw: what is asked for, and the seed of its noise.

    Where the target knows no text encoder, the prompt is a seed too: of the conditioning.
    """

    prompt: str
    seed: int


@dataclass(frozen=True)
class Variant:
    """One way to draw all pictures."""

    name: str
    config: dict[str, Any] | None = None
    """Of Chipmunk, the content of a `chipmunk-config.yml`; None: dense."""
    steps: int | None = None
    """Denoising steps, where not those of the run."""
    method: str = "chipmunk"
    """`chipmunk`, `dense`, or the name of another library that caches: `cache-dit`, `cache-dit TaylorSeer`."""
    settings: dict[str, Any] | None = None
    """Of another library."""
    family: str = ""
    """Variants of one family make one curve."""


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
    dense: Path
    """The folder with the dense pictures: the original's worker writes it, the others read it."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    """Of random weights."""
    factory: str | None = None
    factory_folder: Path | None = None
    weights: Path | None = None
    autoencoder: Path | None = None
    width: int | None = None
    height: int | None = None
    """In pixels; None: the target's choice."""
    text_tokens: int = 512
    """Where the target knows no text encoder."""
    steps: int = 50
    prompts: tuple[str, ...] = ()
    count: int = 2
    """How many of the target's own prompts, where none are given."""
    seeds: tuple[int, ...] = (0,)
    variants: tuple[Variant, ...] = ()
    floor: int = 0
    """Of how many pictures the dense-against-dense floor is taken."""
    coverage: bool = True
    """Whether to draw one picture more of each configuration, to see what the kept keys and neurons cover."""
    tune: dict[str, Any] | None = None
    """The search that is to be run instead of the variants; see `chipmunk.tune`."""
