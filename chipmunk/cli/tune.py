"""`chipmunk tune`: find the configuration that is cheapest while pictures stay above a floor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipmunk.cli.failure import Failure, command
from chipmunk.cli.fidelity import (
    Autoencoder,
    Device,
    Dtype,
    Factory,
    Prompts,
    Size,
    Steps,
    Weights,
    fidelity_options,
)
from chipmunk.cli.options import Json, Plugins, Python, Repo, Target

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.tune import TuneReport


@command
def tune(
    repo: Repo,
    floor: Annotated[
        str, typer.Option("--floor", help="PSNR that the mean has to keep, 30dB say.", metavar="DB")
    ] = "30dB",
    config: Annotated[
        Path | None, typer.Option("--config", help="Begin with this one. [the defaults]", metavar="FILE")
    ] = None,
    prompt: Prompts = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="How many of the target's own prompts.")] = 2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Pictures of each prompt to tune on.")] = 1,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="Seed of the first one.")] = 0,
    confirm: Annotated[int, typer.Option("--confirm", min=1, help="Others of each, to confirm on.")] = 1,
    cost: Annotated[
        str | None,
        typer.Option("--cost", help="What is to be small. [seconds on a GPU, FLOPs on a CPU]", metavar="seconds|FLOPs"),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=10, help="Configurations to try at most.")] = 60,
    steps: Steps = 50,
    size: Size = None,
    weights: Weights = None,
    factory: Factory = None,
    autoencoder: Autoencoder = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. [chipmunk-config.yml in the repository]", metavar="FILE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    target: Target = None,
    plugins: Plugins = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest configuration above a floor.

    Tries keep fractions, full steps, token order, random keys and step caching on your model: cheapest in seconds on a
    GPU, in FLOPs on a CPU. The choice is confirmed on other seeds and written, commented, with its figures. Ctrl-C ends
    the search and keeps the best so far. Your code is run.
    """
    from chipmunk.cli.terminal import Waiting, print_json, screen, write_file
    from chipmunk.config import FILE_NAME
    from chipmunk.tune import TuneOptions, run

    decibels = _decibels(floor)
    if cost not in (None, "seconds", "FLOPs"):
        raise Failure(f"--cost {cost} is neither seconds nor FLOPs")
    path = output or repo / FILE_NAME
    if path.is_dir():
        path = path / FILE_NAME
    if not path.absolute().parent.is_dir():
        raise Failure(f"there is no folder {path.parent} to write {path.name} to")
    if path.exists() and not force:
        raise Failure(f"{path} is there already; nothing was tried (--force replaces it, --output names another file)")
    options = TuneOptions(
        fidelity=fidelity_options(
            repo, prompt=prompt, prompts=prompts, seeds=range(first_seed, first_seed + seeds), steps=steps, size=size,
            weights=weights, factory=factory, autoencoder=autoencoder, dtype=dtype, device=device, floor=False,
            target=target, plugins=plugins, python=python,
        ),
        floor=decibels,
        confirm_seeds=tuple(range(first_seed + 1000, first_seed + 1000 + confirm)),
        start=config,
        trials=trials,
        cost=cost,
    )  # fmt: skip
    with Waiting(time_left=True, lines=True) as waiting:
        report = run(repo, options, waiting)
    if report.text:
        write_file(path, report.text.encode())
    if as_json:
        print_json({**report.to_json(), "file": str(path) if report.text else None})
    else:
        show_report(screen(), report, path)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def show_report(out: Console, report: TuneReport, path: Path) -> None:
    """Print the way there, what was found, and where it is."""
    from rich import box
    from rich.table import Table

    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import next_commands, say, sentence

    say(out, f"Tried {len(report.tried)} configurations in {report.seconds:.0f} s, floor {report.floor:g} dB.")
    about = report.about
    sentence(out, f"{about['model']}, weights: {about['weights']}, {about['dtype']}", label="Model")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("taken, one after the other", overflow="fold")
    for name in ("PSNR", report.cost):
        table.add_column(name, justify="right", no_wrap=True)
    names = {str(trial["config"]): trial["what"].removesuffix(", all pictures") for trial in report.tried[::-1]}
    for trial in report.trail:
        table.add_row(names.get(str(trial["config"]), ""), f"{trial['fidelity']:.1f}", f"{trial['cost']:.1%}")
    if report.confirmed is not None:
        table.add_section()
        confirmed = report.confirmed
        table.add_row("confirmed on other seeds", f"{confirmed['fidelity']:.1f}", f"{confirmed['cost']:.1%}")
    out.print(table)
    if about["weights"] == "random":
        says = "random weights say nothing about pictures: --weights, or --factory, tunes on your model"
        sentence(out, says, label="Note", style="yellow", indent=0)
    if report.tuned is None:
        best = max(report.tried, key=lambda trial: trial["fidelity"])
        say(out, f"Nothing holds {report.floor:g} dB; the closest had {best['fidelity']:.1f} dB.", "bold red")
        next_commands(
            out, [(f"chipmunk tune --floor {best['fidelity'] - 1:.0f}dB {quoted(report.root)}", "a lower floor")]
        )
        return
    if report.interrupted:
        say(out, "Interrupted: this is the best so far, and not confirmed on other seeds.", "bold yellow")
    say(out, f"Wrote {path}.", "bold green")
    command_line = f"chipmunk fidelity --config {quoted(path)} {quoted(report.root)}"
    next_commands(out, [(command_line, "look at it on more pictures")])


def _decibels(word: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:dB)?\s*", word, re.IGNORECASE)
    if found is None:
        raise Failure(f"--floor {word}: a floor is a number of decibels, 30dB say")
    return float(found[1])
