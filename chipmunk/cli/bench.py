"""`chipmunk bench`: how fast the patched repository is beside its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipmunk.cli.failure import Failure, command
from chipmunk.cli.options import (
    Json,
    Plugins,
    Python,
    Repo,
    Target,
    device_of,
    folder_for,
    size_of,
    weights_file,
)

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.bench.run import BenchOptions, BenchReport

_DTYPES = ("bfloat16", "float16", "float32")


@command
def bench(
    repo: Repo,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="Of the pictures, in pixels; may be repeated. [1280x768]", metavar="WIDTHxHEIGHT"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps of a picture.")] = 50,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn at once.")] = 1,
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures of each size, one after the other.")] = 4,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", help="A chipmunk-config.yml; may be repeated, to compare.", metavar="FILE"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="A checkpoint instead of random weights.", metavar="SAFETENSORS")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model that the target knows by name. [its full size]", metavar="NAME"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16 or float32. [bfloat16]", metavar="TYPE")
    ] = None,
    require: Annotated[
        float | None, typer.Option("--require", min=0, help="End with 1 if a speed-up is below this.", metavar="RATIO")
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Time each operator too.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw a picture of it, .svg or .png.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write tables, JSON and picture there.", metavar="DIR")
    ] = None,
    keep_caches: Annotated[
        bool, typer.Option("--keep-caches", help="Use your compile caches, not empty ones.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="cpu runs a small model, to try the command.", metavar="cuda|cpu")
    ] = "cuda",
    target: Target = None,
    plugins: Plugins = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Measure how much faster the patched code is. Needs a GPU.

    The original, rebuilt from the journal and with its blocks compiled, and the patched code run in processes of their
    own: the repository's own model at its full size, in the repository's own sampling loop. Your code is run.
    """
    import shlex
    import sys

    from chipmunk.bench import picture as drawing
    from chipmunk.bench.run import BenchOptions
    from chipmunk.cli.terminal import print_json, screen
    from chipmunk.cli.verify import python_of

    on_cpu = device_of(device) == "cpu"
    if ops and on_cpu:
        raise Failure("--ops times the operators on a GPU: it does not go with --device cpu")
    if model is not None and weights is not None:
        raise Failure("--model does not go with --weights: a checkpoint has a size of its own")
    chosen = dtype or ("float32" if on_cpu else "bfloat16")
    if chosen not in _DTYPES:
        raise Failure(f"--dtype {dtype} is none of {', '.join(_DTYPES)}")
    if picture is not None:
        drawing.check(picture)
    sizes = _sizes(size or ["1280x768"])
    weights_file(weights)
    folder_for(output)
    options = BenchOptions(
        sizes=sizes,
        steps=steps,
        batch=batch,
        images=images,
        configs=tuple(config or ()),
        weights=weights,
        model=model,
        dtype=chosen,
        python=python_of(repo, python),
        target=target,
        plugins=tuple(plugins or ()),
        device=device,
        text_tokens=32 if on_cpu else 512,
        compile=not on_cpu,
        keep_caches=keep_caches,
        operators=ops,
        require=require,
        command=shlex.join(["chipmunk", *sys.argv[1:]]),
    )
    report = _watched(repo, options, output)
    if as_json:
        print_json(report.to_json())
    else:
        show_report(screen(), report)
    if picture is not None and report.comparisons:
        drawing.draw(report, picture)
    if output is not None:
        _write(report, output)
    if report.interrupted:
        kept = "" if output is None else f"; what there is was written to {output}"
        screen(stderr=True).print(f"Interrupted{kept}.", style="bold yellow", soft_wrap=True)
        raise typer.Exit(report.exit_code)
    if report.exit_code:
        below = ", ".join(f"{row.size} ({row.config}) {row.speedup:.2f}×" for row in report.below)
        screen(stderr=True).print(f"Below the required {require:.2f}×: {below}", style="bold red", soft_wrap=True)
        raise typer.Exit(report.exit_code)


def show_report(out: Console, report: BenchReport) -> None:
    """Print the tables, what they were measured with, and what a reader should know."""
    from chipmunk.bench.tables import report_tables
    from chipmunk.cli.terminal import clean, sentence

    found = report.environment
    versions = ", ".join(f"{name} {found[key]}" for key, name in _VERSIONS.items() if key in found)
    backends = ", ".join(dict.fromkeys(image.sdpa for run in report.runs for image in run.images))
    configs = ", ".join(dict.fromkeys(run.config for run in report.runs if run.config))
    stopped = ", then stopped" if report.interrupted else ""
    out.print(clean(f"Measured {report.root} in {report.seconds:.0f} s{stopped}"), soft_wrap=True)
    about = (
        f"{found['model']}, {found['weights']} weights, {found['dtype']}, batch {found['batch']}, "
        f"{found['text tokens']} text tokens"
    )
    for label, text in (
        ("Model", about),
        ("Device", found["device"]),
        ("With", f"{versions}; fastest SDPA backend: {backends}"),
        ("Config", configs),
        ("Run", report.command),
    ):
        sentence(out, text, label=label)
    out.print()
    for table in report_tables(report):
        out.print(table)
    for note in report.notes:
        sentence(out, note, label="Note", style="yellow", indent=0)


_VERSIONS = {
    "python": "Python",
    "torch": "PyTorch",
    "triton": "Triton",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "driver": "driver",
}


def _watched(repo: Path, options: BenchOptions, output: Path | None) -> BenchReport:
    """Run it and say how far it is: a table that fills in a terminal, plain lines elsewhere.

    After each picture what there is goes to `bench.json` in the folder `output`; where the run fails, it is shown.
    """
    from contextlib import suppress

    from rich.live import Live

    from chipmunk.bench.process import BenchError
    from chipmunk.bench.run import run
    from chipmunk.bench.tables import LiveTable, PlainLines
    from chipmunk.cli.terminal import Lines, draws, screen

    so_far: list[BenchReport] = []

    def keep(report: BenchReport) -> None:
        so_far[:] = [report]
        if output is not None:
            with suppress(OSError):  # the last one is written in any case, or says why not
                _write_json(report, output)

    try:
        if not draws():
            return run(repo, options, PlainLines(options.images, Lines()), keep)
        table = LiveTable(options.images)
        with Live(get_renderable=table.render, console=screen(stderr=True), transient=True, refresh_per_second=4):
            return run(repo, options, table, keep)
    except BenchError:
        for report in so_far:
            show_report(screen(stderr=True), report)
            if output is not None:
                _write(report, output)
        raise


def _write_json(report: BenchReport, folder: Path) -> None:
    import json

    from chipmunk.cli.terminal import write_file

    write_file(folder / "bench.json", (json.dumps(report.to_json(), indent=1) + "\n").encode())


def _write(report: BenchReport, folder: Path) -> None:
    """The report as `bench.txt`, `bench.json` and, where matplotlib is installed, `bench.svg`."""
    import importlib.util

    from rich.console import Console

    from chipmunk.bench import picture

    _write_json(report, folder)
    with (folder / "bench.txt").open("w", encoding="utf-8") as file:
        show_report(Console(file=file, width=100, markup=False, highlight=False, emoji=False), report)
    if report.comparisons and importlib.util.find_spec("matplotlib") is not None:
        picture.draw(report, folder / "bench.svg")


def _sizes(words: list[str]) -> tuple[tuple[int, int], ...]:
    """`--size 1280x768 --size 1024x1024`, or both after one `--size` with a comma."""
    return tuple(dict.fromkeys(size_of(part.strip()) for word in words for part in word.split(",")))
