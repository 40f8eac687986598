"""What a fidelity run says, for people and for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from chipmunk.apply.errors import Refused
from chipmunk.rewrite.plan import Site


class FidelityError(Refused):
    """Nothing could be measured: a library that is missing, or a model that cannot be built or run (exit code 2)."""


FIGURES = ("psnr", "ssim", "latent_psnr", "l2", "cosine")
"""Of one picture: PSNR (dB) and SSIM of the decoded picture, PSNR (dB, peak: the dense latents' range), relative L2 and
cosine of the latents."""


@dataclass(frozen=True)
class Summary:
    """Means over all pictures of one variant; None where nothing can be decoded."""

    psnr: float | None
    ssim: float | None
    latent_psnr: float
    l2: float
    cosine: float
    lowest_psnr: float
    """Of the decoded pictures, or else of the latents."""
    flops: float
    """Of the whole model over the run, dense = 1."""
    sparsifiable_flops: float
    """Of the layers that can run sparse, dense = 1."""
    seconds: float
    """Median of a picture."""
    speedup: float
    """Median over dense median; on a CPU it says nothing about a GPU."""
    skipped: float
    """Steps of a picture on which no block ran, or, with cache-dit, only a few; mean."""

    @property
    def fidelity(self) -> float:
        """What `--require-psnr` looks at: PSNR of the pictures, or of the latents where they cannot be decoded."""
        return self.latent_psnr if self.psnr is None else self.psnr


def mean(values: Iterable[float | None]) -> float | None:
    """None where there is nothing to take the mean of."""
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def summarise(variant: dict[str, Any], dense: dict[str, Any]) -> Summary:
    """The means of one variant's pictures beside those of the dense run."""
    pictures: Sequence[dict[str, Any]] = variant["pictures"]
    figures = {name: mean(picture.get(name) for picture in pictures) for name in FIGURES}
    shown = [picture["latent_psnr"] if picture["psnr"] is None else picture["psnr"] for picture in pictures]
    seconds = median(picture["seconds"] for picture in pictures)
    return Summary(
        psnr=figures["psnr"],
        ssim=figures["ssim"],
        latent_psnr=figures["latent_psnr"] or 0.0,
        l2=figures["l2"] or 0.0,
        cosine=figures["cosine"] or 0.0,
        lowest_psnr=min(shown),
        flops=fmean(picture["flops"] for picture in pictures) / dense["flops"],
        sparsifiable_flops=fmean(picture["sparsifiable_flops"] for picture in pictures) / dense["sparsifiable_flops"],
        seconds=seconds,
        speedup=median(picture["seconds"] for picture in dense["pictures"]) / seconds,
        skipped=fmean(sum("skipped" in kind for kind in picture["kinds"]) for picture in pictures),
    )


def step_kinds(variant: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each kind of step: how many a picture has, median seconds, mean FLOPs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for picture in variant["pictures"]:
        for kind, seconds, count in zip(picture["kinds"], picture["step_seconds"], picture["call_flops"], strict=True):
            found.setdefault(kind, []).append((seconds, count))
    pictures = len(variant["pictures"])
    return {
        kind: {
            "steps": len(rows) / pictures,
            "seconds": median(row[0] for row in rows),
            "flops": fmean(row[1] for row in rows),
        }
        for kind, rows in found.items()
    }


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader should know; what holds of several variants is said once."""
    said: dict[str, list[str]] = {}
    for variant in results["variants"]:
        for note in variant["notes"]:
            said.setdefault(note, []).append(variant["name"])
    shown = {note: names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") for note, names in said.items()}
    return [*results["notes"], *(f"{names}: {note}" for note, names in shown.items())]


def covered(variant: dict[str, Any], part: str) -> float | None:
    """Mean share of the attention mass, or of the MLP change, that sparse steps cover, over layers and steps."""
    layers = variant.get("coverage", {}).get(part, {})
    return mean(share for shares in layers.values() for _, share in shares)


@dataclass(frozen=True)
class FidelityReport:
    """The outcome of one run; `results` is what `--json` prints, less what is beside it here."""

    root: Path
    target: str | None
    results: dict[str, Any]
    command: str
    require_psnr: float | None = None
    sites: tuple[Site, ...] = ()
    seconds: float = 0.0
    images: dict[str, str] = field(default_factory=dict)
    """PNG files by `variant/picture`, relative to the folder of `results.json`."""
    stopped: BaseException | None = None
    """Why this is not all that was to be measured: an interruption, or an error of the patched side's."""

    @property
    def summaries(self) -> dict[str, Summary]:
        """By name of the variant."""
        return {variant["name"]: summarise(variant, self.results["dense"]) for variant in self.results["variants"]}

    @property
    def below(self) -> dict[str, float]:
        """The variants whose mean PSNR is below the one that was required, with it."""
        floor = self.require_psnr
        return {name: found.fidelity for name, found in self.summaries.items() if floor and found.fidelity < floor}

    @property
    def exit_code(self) -> int:
        return 1 if self.below else 0

    def to_json(self) -> dict[str, Any]:
        summaries = self.summaries
        variants = [
            {**variant, "summary": asdict(summaries[variant["name"]]), "kinds": step_kinds(variant)}
            for variant in self.results["variants"]
        ]
        return {
            "status": "interrupted" if self.stopped else "below" if self.below else "measured",
            "target": self.target,
            "root": str(self.root),
            "files": sorted({site.file for site in self.sites}),
            "sites": [{**asdict(site), "status": site.status.value} for site in self.sites],
            "command": self.command,
            **self.results,
            "variants": variants,
            "require_psnr": self.require_psnr,
            "images": self.images,
            "seconds": round(self.seconds, 2),
        }
