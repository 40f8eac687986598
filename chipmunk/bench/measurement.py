"""What one benchmark process measures, and the figures that are drawn from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Image:
    """One picture of a size that a process drew."""

    width: int
    height: int
    steps: int
    index: int
    """0 is the first picture of this size in the process: it pays for compilation."""
    seconds: float
    """Wall time of the sampling loop, device synchronised before and after."""
    step_ms: tuple[float, ...]
    """Time of each model call on the device, milliseconds."""
    kinds: tuple[str, ...]
    """What each model call was: `dense`, or attention and MLP, `full/sparse` say."""
    peak_bytes: int
    """Largest memory that PyTorch had allocated while the picture was drawn."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Run:
    """Everything that one process measured."""

    variant: str
    """`dense` (the original, its blocks compiled), `fewer steps` (the same, a shorter loop) or `chipmunk` (patched)."""
    images: tuple[Image, ...]
    environment: dict[str, str]
    """Device, driver, versions of Python, torch and triton, the SDPA backend used."""
    statistics: str = ""
    """What ran sparse and what ran dense, in words; empty for the original."""
    compiled: dict[str, int] | None = None
    """Graphs, graph breaks and recompilations that the compiler counted."""

    @staticmethod
    def from_json(data: dict[str, Any]) -> Run:
        images = tuple(
            Image(**{**image, "step_ms": tuple(image["step_ms"]), "kinds": tuple(image["kinds"])})
            for image in data["images"]
        )
        return Run(**{**data, "images": images})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def of_size(self, size: str) -> list[Image]:
        return [image for image in self.images if image.size == size]


def steady(images: list[Image]) -> Image:
    """The picture that stands for the rest: the median of all after the first two, or the last one there is."""
    settled = sorted(images[2:] or images[-1:], key=lambda image: image.seconds)
    return settled[(len(settled) - 1) // 2]


def step_times(image: Image) -> dict[str, float]:
    """Median milliseconds of each kind of step, in the order in which the kinds first come."""
    return {
        kind: median(ms for ms, other in zip(image.step_ms, image.kinds) if other == kind)
        for kind in dict.fromkeys(image.kinds)
    }


@dataclass(frozen=True)
class Comparison:
    """The patched code beside the original at one size: everything as ratios to the dense steady picture."""

    size: str
    steps: int
    dense: dict[str, float]
    """Seconds of the `first`, `second` and `steady` picture, and `peak_gb`."""
    chipmunk: dict[str, float]
    speedup: float
    """Dense steady seconds over Chipmunk's steady seconds."""
    extra_gb: float
    """Peak memory above dense, GB (10⁹ bytes)."""
    step_ms: dict[str, float]
    """Milliseconds of each kind of step; `dense` is the original's."""
    fewer_steps: tuple[int, float] | None
    """How many dense steps take as long as Chipmunk's picture, and their measured seconds."""


def compare(dense: Run, chipmunk: Run, fewer: Run | None = None) -> list[Comparison]:
    """One comparison for each size that both runs measured."""
    rows = []
    for size in dict.fromkeys(image.size for image in dense.images):
        before, after = dense.of_size(size), chipmunk.of_size(size)
        if not before or not after:
            continue
        base, ours = steady(before), steady(after)
        shorter = [image for image in fewer.images if image.size == size] if fewer else []
        rows.append(
            Comparison(
                size=size,
                steps=base.steps,
                dense=_figures(before),
                chipmunk=_figures(after),
                speedup=base.seconds / ours.seconds,
                extra_gb=(ours.peak_bytes - base.peak_bytes) / 1e9,
                step_ms={"dense": median(base.step_ms), **step_times(ours)},
                fewer_steps=(steady(shorter).steps, steady(shorter).seconds) if shorter else None,
            )
        )
    return rows


def _figures(images: list[Image]) -> dict[str, float]:
    return {
        "first": images[0].seconds,
        "second": images[min(1, len(images) - 1)].seconds,
        "steady": steady(images).seconds,
        "peak_gb": max(image.peak_bytes for image in images) / 1e9,
    }
