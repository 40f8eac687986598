"""What the parent process tells a benchmark worker, and what the worker says while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chipmunk.rewrite.plan import ModelFacts

Event = dict[str, Any]
"""A line of a worker's output that starts with `PROGRESS`, as an object. Its `event` is one of

    build                                                   the model is being built
    about    environment                                    it is: what it is, and what it runs on
    begin    variant, size, steps, index                    a picture begins
    image    variant, size, steps, index, seconds, image    it is drawn; `image` is an `Image`
    error    kind, message, next, trace                     why the worker ends without a result

and `side` and `config` are added to each by the parent, which also says `start` when it starts a worker, and
`operators` when it begins to time those.
"""


@dataclass(frozen=True)
class Spec:
    """One worker's order."""

    side: str
    """`original` or `patched`."""
    root: Path
    facts: ModelFacts
    target: Path
    """The target's file."""
    out: Path
    """Where the `Run`s are written, one JSON object a line."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each picture, pixels."""
    steps: int = 50
    batch: int = 1
    images: int = 4
    text_tokens: int = 512
    dtype: str = "bfloat16"
    device: str = "cuda"
    """On a CPU the model is the target's small one."""
    compile: bool = True
    """Whether the original's blocks are compiled; for the patched side its configuration says."""
    seed: int = 0
    config: Path | None = None
    """`chipmunk-config.yml` of the patched side; the defaults without one."""
    weights: Path | None = None
    model: str | None = None
    """One of the target's `MODELS` instead of its full size."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments that replace those of the full size, `{"depth": 2}` say."""
    match_seconds: dict[str, list[float]] = field(default_factory=dict)
    """By size, the times that runs of fewer dense steps have to fit into."""
