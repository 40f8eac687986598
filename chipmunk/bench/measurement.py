"""What one benchmark process measures, and the figures that are drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
    """What each model call was: `dense`, or, patched, attention and MLP of the last layer, `full/sparse` say."""
    peak_bytes: int
    """Largest memory that PyTorch had allocated while the picture was drawn."""
    compiled: dict[str, int] = field(default_factory=dict)
    """What torch.compile did during this picture: `graphs`, `breaks`, `recompiles`, `failures`."""
    kept: dict[str, float] = field(default_factory=dict)
    """Fraction of the `keys` and `neurons` that a sparse step computes, after rounding."""
    sdpa: str = ""
    """The SDPA backend that was the fastest for this size."""

    @staticmethod
    def from_json(data: dict[str, Any]) -> Image:
        return Image(**{**data, "step_ms": tuple(data["step_ms"]), "kinds": tuple(data["kinds"])})

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
    """Device, driver, and versions of Python, torch and triton."""
    config: str = ""
    """Name of the configuration; empty for the original."""
    statistics: str = ""
    """What ran sparse and what ran dense, in words; empty for the original."""
    notes: tuple[str, ...] = ()
    """What a reader should know: model calls that ran dense, operators that did not run in Triton."""

    @staticmethod
    def from_json(data: dict[str, Any]) -> Run:
        images = tuple(map(Image.from_json, data["images"]))
        return Run(**{**data, "images": images, "notes": tuple(data.get("notes", ()))})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(image.size for image in self.images))

    def of_size(self, size: str) -> list[Image]:
        return [image for image in self.images if image.size == size]


def steady(images: Sequence[Image]) -> Image:
    """The picture that stands for the rest: the median of all after the first two, or the last one there is."""
    settled = sorted(images[2:] or images[-1:], key=lambda image: image.seconds)
    return settled[(len(settled) - 1) // 2]


def steps_that_fit(seconds: float, dense: Image) -> int:
    """How many steps the dense model takes in `seconds`: at least one, at most those of the picture `dense`."""
    fitting = int(seconds * dense.steps / dense.seconds + 1e-9)
    return min(max(fitting, 1), dense.steps)


def step_times(image: Image) -> dict[str, float]:
    """Median milliseconds of each kind of step, in the order in which the kinds first come."""
    return {
        kind: median(ms for ms, other in zip(image.step_ms, image.kinds, strict=True) if other == kind)
        for kind in dict.fromkeys(image.kinds)
    }


@dataclass(frozen=True)
class Comparison:
    """The patched code beside the original at one size."""

    config: str
    size: str
    steps: int
    dense: dict[str, float]
    """Seconds of the `first`, `second` and `steady` picture, and `peak_gb`."""
    chipmunk: dict[str, float]
    speedup: float
    """Dense steady seconds over Chipmunk's steady seconds."""
    extra_gb: float
    """Peak memory above dense, GB (10⁹ bytes)."""
    dense_step_ms: float
    """Median milliseconds of a model call of the original."""
    step_ms: dict[str, float]
    """Median milliseconds of each kind of step of the patched code."""
    step_counts: dict[str, int]
    """How many of each kind a picture has."""
    fewer_steps: tuple[int, float] | None
    """How many dense steps fit into the time of Chipmunk's picture, and their measured seconds."""
    kept: dict[str, float]
    """Fraction of the `keys` and `neurons` that a sparse step computes."""
    compiled: dict[str, list[dict[str, int]]]
    """What torch.compile did in each picture in a row, of `dense` and of `chipmunk`."""

    @property
    def tokens(self) -> int:
        """Image tokens; one stands for 16 × 16 pixels."""
        width, height = map(int, self.size.split("x"))
        return (width // 16) * (height // 16)

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Times and peak memory of each side, over those of the dense steady picture."""
        base = {**dict.fromkeys(("first", "second", "steady"), self.dense["steady"]), "peak_gb": self.dense["peak_gb"]}
        found = {
            side: {name: value / base[name] if base[name] else 1.0 for name, value in figures.items()}
            for side, figures in (("dense", self.dense), ("chipmunk", self.chipmunk))
        }
        found["steps"] = {kind: ms / self.dense_step_ms for kind, ms in self.step_ms.items()}
        if self.fewer_steps is not None:
            found["fewer_steps"] = {"steady": self.fewer_steps[1] / self.dense["steady"]}
        return found

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens": self.tokens, "ratios": self.ratios}


def compare(dense: Run, chipmunk: Run, fewer: Run | None = None) -> list[Comparison]:
    """One comparison for each size that both runs measured."""
    rows = []
    for size in dense.sizes:
        before, after = dense.of_size(size), chipmunk.of_size(size)
        if not after:
            continue
        base, ours = steady(before), steady(after)
        fitting = steps_that_fit(ours.seconds, base)
        shorter = [image for image in fewer.of_size(size) if image.steps == fitting] if fewer else []
        rows.append(
            Comparison(
                config=chipmunk.config,
                size=size,
                steps=base.steps,
                dense=_figures(before),
                chipmunk=_figures(after),
                speedup=base.seconds / ours.seconds,
                extra_gb=(_peak(after) - _peak(before)) / 1e9,
                dense_step_ms=median(base.step_ms),
                step_ms=step_times(ours),
                step_counts=dict(Counter(ours.kinds)),
                fewer_steps=(fitting, steady(shorter).seconds) if shorter else None,
                kept=ours.kept,
                compiled={
                    "dense": [image.compiled for image in before],
                    "chipmunk": [image.compiled for image in after],
                },
            )
        )
    return rows


def _figures(images: Sequence[Image]) -> dict[str, float]:
    return {
        "first": images[0].seconds,
        "second": images[min(1, len(images) - 1)].seconds,
        "steady": steady(images).seconds,
        "peak_gb": _peak(images) / 1e9,
    }


def _peak(images: Sequence[Image]) -> int:
    """The most memory over all pictures: the first ones, which compile, may need more."""
    return max(image.peak_bytes for image in images)
