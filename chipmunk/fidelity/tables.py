"""The fidelity report in a terminal; every table fits into 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from chipmunk.fidelity.metrics import CAP
from chipmunk.fidelity.report import FidelityReport, covered, step_kinds

_STEPS_SHOWN = 8
_VARIANTS_SHOWN = 4


def report_tables(report: FidelityReport) -> Iterable[RenderableType]:
    """The tables, one after the other, each below its title."""
    results = report.results
    pictures, (width, height) = len(results["pictures"]), results["size"]
    one = "1 picture" if pictures == 1 else f"{pictures} pictures"
    yield Text(f"Beside dense: mean of {one}, {width}x{height}, {results['steps']} steps", style="bold")
    yield _summaries(report)
    yield Text("What a step costs: of a dense step's FLOPs, and how much of the change is covered", style="bold")
    yield _kinds(report)
    yield Text("Error of the latents after each step: relative L2", style="bold")
    yield _steps(report)


def _summaries(report: FidelityReport) -> Table:
    table = _table("", "PSNR", "lowest", "SSIM", "L2", "cosine", "FLOPs", "layers", "s")
    decodes = report.results["decodes"]
    for name, found in report.summaries.items():
        style = "bold red" if name in report.below else "bold"
        lowest = psnr(found.lowest_psnr)
        table.add_row(
            name,
            Text(psnr(found.fidelity), style=style),
            lowest,
            *_ssim(found.ssim),
            _small(found.l2),
            f"{found.cosine:.4f}",
            f"{found.flops:.0%}",
            f"{found.sparsifiable_flops:.0%}",
            f"{found.seconds:.2f}",
        )
    dense = report.results["dense"]["pictures"]
    seconds = sorted(picture["seconds"] for picture in dense)[len(dense) // 2]
    table.add_section()
    table.add_row("dense", "", "", "", "", "", "100%", "100%", f"{seconds:.2f}", style="dim")
    for name, floor in report.results["floor"].items():
        found = floor["summary"]
        value = found["psnr"] if decodes else found["latent_psnr"]
        table.add_row(
            f"dense, {name}",
            psnr(value),
            "",
            *_ssim(found["ssim"]),
            _small(found["l2"]),
            f"{found['cosine']:.4f}",
            style="dim",
        )
    table.caption = (
        "PSNR in dB" + ("" if decodes else " of the latents") + "; FLOPs of the whole model, and of the layers that "
        "can run sparse, over the run"
    )
    return table


def _kinds(report: FidelityReport) -> Table:
    table = _table("attention/MLP", "steps", "FLOPs", "ms", "attention mass", "MLP change")
    dense = report.results["cost"]["dense_call"]
    variants = _some(report)
    for variant in variants:
        if len(variants) > 1:
            table.add_section()
            table.add_row(Text(variant["name"], style="italic"))
        for kind, found in step_kinds(variant).items():
            attention, _, mlp = kind.partition("/")
            table.add_row(
                kind,
                f"{found['steps']:.0f}" if found["steps"] % 1 == 0 else f"{found['steps']:.1f}",
                f"{found['flops'] / dense:.0%}",
                f"{1000 * found['seconds']:.1f}",
                _share(covered(variant, "attention")) if attention == "sparse" else "",
                _share(covered(variant, "mlp")) if mlp == "sparse" else "",
            )
    return table


def _some(report: FidelityReport) -> list[dict[str, Any]]:
    """The variants with a configuration; of many, one of each family."""
    variants = [variant for variant in report.results["variants"] if variant["config"] is not None]
    if len(variants) <= _VARIANTS_SHOWN:
        return variants
    return [*{variant["family"]: variant for variant in reversed(variants)}.values()][::-1]


def _steps(report: FidelityReport) -> Table:
    count = report.results["steps"]
    shown = sorted({round(index * (count - 1) / (_STEPS_SHOWN - 1)) for index in range(_STEPS_SHOWN)})
    table = _table("after step", *(str(step) for step in shown))
    for variant in _some(report):
        curves = [picture["steps"] for picture in variant["pictures"] if picture["steps"]]
        if curves:
            means = [sum(curve[step]["l2"] for curve in curves) / len(curves) for step in shown]
            table.add_row(variant["name"], *map(_small, means))
    return table


def verdict(report: FidelityReport) -> Sequence[str]:
    """One line for each variant that is below what was required."""
    return [f"{name}: {value:.1f} dB, required {report.require_psnr:g} dB" for name, value in report.below.items()]


def psnr(value: float) -> str:
    """dB, or that there is no difference."""
    return "same" if value >= CAP else f"{value:.1f}"


def _ssim(value: float | None) -> list[str]:
    return ["–" if value is None else f"{value:.3f}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-3 else f"{value:.0e}"


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
