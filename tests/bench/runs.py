"""Hand-made measurements."""

from __future__ import annotations

from pathlib import Path

from chipmunk.bench.measurement import Image, Run, compare
from chipmunk.bench.run import BenchReport

KINDS = ("dense/full", "full/sparse", "sparse/sparse", "sparse/sparse", "full/full", "sparse/sparse")
MS = {"dense": 100.0, "dense/full": 110.0, "full/sparse": 90.0, "sparse/sparse": 50.0, "full/full": 140.0}
NOTHING = {"graphs": 0, "breaks": 0, "recompiles": 0, "failures": 0}


def image(
    seconds: float, index: int = 0, size: str = "1280x768", kinds: tuple[str, ...] = ("dense",) * 6, peak: float = 24.0
) -> Image:
    width, height = map(int, size.split("x"))
    return Image(
        width=width,
        height=height,
        steps=len(kinds),
        index=index,
        seconds=seconds,
        step_ms=tuple(MS[kind] for kind in kinds),
        kinds=kinds,
        peak_bytes=int(peak * 1e9),
        compiled={**NOTHING, "graphs": 3, "recompiles": 2} if index == 0 else NOTHING,
        kept={} if kinds[0] == "dense" else {"keys": 0.154, "neurons": 0.354},
        sdpa="cudnn",
    )


def dense(*seconds: float, size: str = "1280x768") -> Run:
    return Run("dense", tuple(image(s, i, size) for i, s in enumerate(seconds)), {"device": "a GPU"})


def sparse(*seconds: float, size: str = "1280x768", config: str = "defaults", peak: float = 33.0) -> Run:
    images = tuple(image(s, i, size, KINDS, peak) for i, s in enumerate(seconds))
    return Run("chipmunk", images, {"device": "a GPU"}, config=config, statistics="all sparse")


def joined(*runs: Run) -> Run:
    """One run of all sizes."""
    return Run(runs[0].variant, tuple(i for run in runs for i in run.images), runs[0].environment, runs[0].config)


def report(configs: tuple[str, ...] = ("defaults",), require: float | None = None) -> BenchReport:
    """Three sizes, times of seconds and of minutes."""
    sizes = {"1280x768": 6.5, "1360x768": 7.25, "2048x2048": 135.5}
    before = joined(*(dense(3 * s, s, s, s, size=size) for size, s in sizes.items()))
    after = [
        joined(*(sparse(4 * s, s / 1.2, s / (1.4 + n / 5), size=z, config=c) for z, s in sizes.items()))
        for n, c in enumerate(configs)
    ]
    fewer = Run(
        "fewer steps", tuple(image(s * 2 / 3, i, z, ("dense",) * 4) for z, s in sizes.items() for i in (0, 1)), {}
    )
    about = {
        "device": "NVIDIA H100 80GB HBM3, 85 GB",
        "python": "3.12.3",
        "torch": "2.11.0",
        "model": "Flux of src/flux/model.py, 11.9 billion parameters",
        "weights": "random",
        "dtype": "bfloat16",
        "batch": "1",
        "text tokens": "512",
    }
    return BenchReport(
        root=Path("/home/me/flux"),
        target="flux",
        comparisons=tuple(row for run in after for row in compare(before, run, fewer)),
        runs=(before, fewer, *after),
        environment=about,
        command="chipmunk bench flux",
        require=require,
        operators=(
            {"name": "dense attention N=4352", "ms": 0.39, "tflops": 590.0},
            {"name": "sparse attention N=4352 K=672 (15.4%)", "ms": 0.121, "tflops": 561.0, "ratio": 3.22},
        ),
    )
