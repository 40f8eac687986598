"""`chipmunk fidelity`: how close the patched repository's pictures are to the dense ones, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chipmunk.cli.failure import Failure, command
from chipmunk.cli.options import (
    Json,
    Plugins,
    Python,
    Repo,
    Target,
    device_of,
    factory_of,
    folder_for,
    size_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.fidelity import FidelityOptions, FidelityReport

Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", help="A chipmunk-config.yml; may be repeated, to compare.", metavar="FILE"),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", help="A checkpoint of your own; for a script, a pipeline's folder.", metavar="PATH"),
]
Factory = Annotated[
    str | None,
    typer.Option("--factory", help="A function that builds the model, or loads a pipeline.", metavar="MODULE:FUNCTION"),
]
Autoencoder = Annotated[
    Path | None,
    typer.Option("--autoencoder", help="A checkpoint to decode with; latents are compared without.", metavar="FILE"),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="What to draw; may be repeated. [2 known ones]", metavar="TEXT"),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Denoising steps of a picture.")]
Size = Annotated[
    str | None, typer.Option("--size", help="Of the pictures, in pixels. [the target's]", metavar="WIDTHxHEIGHT")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="[float32; bfloat16 on a GPU]", metavar="float32|bfloat16|float16")
]
Device = Annotated[str, typer.Option("--device", help="Where to run it.", metavar="cpu|cuda")]


@command
def fidelity(
    repo: Repo,
    config: Configs = None,
    prompt: Prompts = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="How many of the target's own prompts.")] = 2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Pictures of each prompt.")] = 2,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="Seed of the first one.")] = 0,
    steps: Steps = 50,
    size: Size = None,
    weights: Weights = None,
    factory: Factory = None,
    autoencoder: Autoencoder = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside fewer dense steps, step caching and cache-dit, as curves.")
    ] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="The defaults with one setting changed at a time: what each brings.")
    ] = False,
    floor: Annotated[bool, typer.Option(help="Measure dense against dense too.")] = True,
    coverage: Annotated[bool, typer.Option(help="Measure what the kept keys and neurons cover too.")] = True,
    require_psnr: Annotated[
        float | None, typer.Option("--require-psnr", help="End with 1 if a mean is below this.", metavar="DB")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write pictures, tables and results.json there.", metavar="DIR")
    ] = None,
    target: Target = None,
    plugins: Plugins = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Measure how close pictures stay to the dense ones, and what they cost.

    The original, rebuilt from the journal, and the patched code draw the same pictures from the same noise in processes
    of their own: PSNR, SSIM, error of the latents step by step, what the kept keys and neurons cover, FLOPs, seconds.
    Your code is run.
    """
    from chipmunk.cli.terminal import print_json, screen

    options = fidelity_options(
        repo, config=config, prompt=prompt, prompts=prompts, seeds=range(first_seed, first_seed + seeds), steps=steps,
        size=size, weights=weights, factory=factory, autoencoder=autoencoder, dtype=dtype, device=device,
        floor=floor, require_psnr=require_psnr, output=output, target=target, plugins=plugins, python=python,
        compare=compare, ablation=ablation, coverage=coverage,
    )  # fmt: skip
    report = run_with_bar(repo, options)
    if as_json:
        print_json(report.to_json())
    else:
        show_report(screen(), report)
    if output is not None:
        write(report, output)
        if not as_json:
            _say_where(output, report)
    end_if_stopped(report)
    if report.exit_code:
        from chipmunk.fidelity.tables import verdict

        out = screen(stderr=True)
        for line in verdict(report):
            out.print(f"Below: {line}", style="bold red", soft_wrap=True)
        raise typer.Exit(report.exit_code)


def fidelity_options(
    repo: Path,
    *,
    config: list[Path] | None = None,
    prompt: list[str] | None = None,
    prompts: int = 2,
    seeds: range = range(2),
    steps: int = 50,
    size: str | None = None,
    weights: Path | None = None,
    factory: str | None = None,
    autoencoder: Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    floor: bool = True,
    coverage: bool = True,
    require_psnr: float | None = None,
    output: Path | None = None,
    target: str | None = None,
    plugins: list[Path] | None = None,
    python: str | None = None,
    compare: bool = False,
    ablation: bool = False,
) -> FidelityOptions:
    """What was typed, checked."""
    import shlex
    import sys

    from chipmunk.cli.verify import python_of
    from chipmunk.fidelity import FidelityOptions
    from chipmunk.fidelity import compare as rivals

    chosen = dtype or ("float32" if device_of(device) == "cpu" else "bfloat16")
    if chosen not in ("float32", "bfloat16", "float16"):
        raise Failure(f"--dtype {dtype} is none of float32, bfloat16, float16")
    executable = python_of(repo, python)
    return FidelityOptions(
        configs=tuple(config or ()),
        variants=(
            *(rivals.comparison(steps, executable) if compare else ()),
            *(rivals.ablation() if ablation else ()),
        ),
        prompts=tuple(prompt or ()),
        count=prompts,
        seeds=tuple(seeds),
        steps=steps,
        size=None if size is None else size_of(size),
        text_tokens=64 if device == "cpu" else 512,
        weights=weights,
        factory=factory_of(factory),
        autoencoder=autoencoder,
        dtype=chosen,
        device=device,
        python=executable,
        target=target,
        plugins=tuple(plugins or ()),
        floor=1 if floor else 0,
        coverage=coverage,
        require_psnr=require_psnr,
        output=folder_for(output),
        command=shlex.join(["chipmunk", *sys.argv[1:]]),
    )


def run_with_bar(repo: Path, options: FidelityOptions) -> FidelityReport:
    """Run it, and say on stderr how far it is."""
    from chipmunk.cli.terminal import Waiting
    from chipmunk.fidelity import run

    with Waiting(time_left=True, lines=True) as waiting:
        return run(repo, options, waiting)


def end_if_stopped(report: FidelityReport) -> None:
    """Say why not everything was measured, where it was not, and end with that error's code."""
    from chipmunk.cli import failure

    if report.stopped is not None:
        why = failure.explain(report.stopped)
        failure.report(why, as_json=False)
        raise typer.Exit(why.exit_code)


def show_report(out: Console, report: FidelityReport) -> None:
    """Print the tables, what they were measured with, and what a reader should know."""
    from chipmunk.cli.terminal import clean, sentence
    from chipmunk.fidelity.report import notes
    from chipmunk.fidelity.tables import report_tables

    found: dict[str, Any] = report.results["environment"]
    stopped = ", then stopped" if report.stopped else ""
    out.print(clean(f"Measured {report.root} in {report.seconds:.0f} s{stopped}"), soft_wrap=True)
    for label, text in (
        ("Model", f"{found['model']}, weights: {found['weights']}, {found['dtype']}"),
        ("Device", f"{found['device']}, Python {found['python']}, PyTorch {found['torch']}"),
        ("Run", report.command),
    ):
        sentence(out, text, label=label)
    out.print()
    for table in report_tables(report):
        out.print(table)
    for note in notes(report.results):
        sentence(out, note, label="Note", style="yellow", indent=0)


def write(report: FidelityReport, folder: Path) -> None:
    """The report as `results.json` and `fidelity.txt`; the pictures are there already."""
    import json

    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    with (folder / "fidelity.txt").open("w", encoding="utf-8") as file:
        show_report(Console(file=file, width=100, markup=False, highlight=False, emoji=False), report)


def _say_where(folder: Path, report: FidelityReport) -> None:
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import next_commands, say, screen

    pictures = f" and {len(report.images)} pictures" if report.images else ""
    say(screen(), f"Wrote results.json, fidelity.txt{pictures} to {folder}.")
    results = quoted(folder / "results.json")
    next_commands(screen(), [(f"chipmunk report {results}", "all of it as one HTML page")])
