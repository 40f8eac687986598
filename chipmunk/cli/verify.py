"""`chipmunk verify`: prove that the patched repository computes what the original did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipmunk.cli.failure import Failure, command
from chipmunk.cli.options import Json, Plugins, Python, Repo, Target, device_of, factory_of, weights_file

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.verify import VerifyReport


@command
def verify(
    repo: Repo,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="Verify with a checkpoint of your own too.", metavar="SAFETENSORS"),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(
            "--factory", help="A function that builds the model, if the target cannot.", metavar="MODULE:FUNCTION"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Verify this one, of several that were patched. [all]", metavar="CLASS"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to run it.", metavar="cpu|cuda")] = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of the random weights and inputs.")] = 0,
    target: Target = None,
    plugins: Plugins = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Prove that the patched code computes the same.

    The original, rebuilt from the journal, and the patched code run in processes of their own, with the repository's
    own classes at a small size and the same random weights. Your code is run.
    """
    verify_repository(
        repo, weights=weights, factory=factory, model=model, device=device, seed=seed, target=target, plugins=plugins,
        python=python, as_json=as_json,
    )  # fmt: skip


def verify_repository(
    repo: Path,
    *,
    weights: Path | None = None,
    factory: str | None = None,
    model: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    target: str | None = None,
    plugins: list[Path] | None = None,
    python: str | None = None,
    as_json: bool = False,
) -> None:
    """Run all checks on a patched repository and report them; exits with 1 if one does not hold."""
    from chipmunk.cli.terminal import Waiting, print_json, screen
    from chipmunk.verify import VerifyOptions, run

    options = VerifyOptions(
        device=device_of(device),
        target=target,
        plugins=tuple(plugins or ()),
        weights=weights_file(weights),
        factory=factory_of(factory),
        model=model,
        seed=seed,
        python=python_of(repo, python),
    )
    with Waiting(lines=True) as waiting:
        report = run(repo, options, waiting)
    if as_json:
        print_json(report.to_json())
    else:
        show_report(screen(), report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def show_report(out: Console, report: VerifyReport) -> None:
    """Print each check with the figure that decides."""
    from rich.text import Text

    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import clean, hanging, next_commands, say, sentence
    from chipmunk.config import FILE_NAME

    where = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    say(out, f"Verified {report.root} in {report.seconds:.0f} s ({where})")
    width = max((len(check.name) for check in report.checks), default=0)
    for check in report.checks:
        word, style = ("holds", "green") if check.holds else ("FAILS", "bold red")
        hanging(out, Text.assemble((f"  {word}  ", style), f"{check.name.ljust(width)}  "), Text(clean(check.says)))
    for model in report.unverified:
        says = f"{model.model} of {model.file}: {model.reason}"
        hanging(out, Text.assemble(("  not verified  ", "bold yellow")), Text(clean(says)))
    for note in report.notes:
        sentence(out, note, label="Note", style="yellow")
    if report.holds and report.unverified:
        out.print(
            f"All {len(report.checks)} checks hold; {len(report.unverified)} patched models were not verified.",
            style="bold yellow",
        )
        commands = [(each.next_command, f"for {each.model}") for each in report.unverified if each.next_command]
        next_commands(out, commands)
    elif report.holds:
        out.print(f"All {len(report.checks)} checks hold.", style="bold green")
        if not (report.root / FILE_NAME).exists():
            root = quoted(report.root)
            next_commands(out, [(f"chipmunk config init {root}", "turn it on: a chipmunk-config.yml to edit")])
    else:
        failed = sum(not check.holds for check in report.checks)
        out.print(f"{failed} of {len(report.checks)} checks fail: do not use the patched code.", style="bold red")
        root = quoted(report.root)
        next_commands(
            out, [(f"chipmunk verify --json {root}", "all figures"), (f"chipmunk revert {root}", "undo the change")]
        )


def python_of(repo: Path, python: str | None) -> str:
    """The Python that was named; else the repository's, if it has both Chipmunk and torch; else this one."""
    import os
    import shutil
    import sys

    from chipmunk.apply import locate
    from chipmunk.cli.environment import inspect

    if python is not None:
        found = shutil.which(python)
        if found is None:
            raise Failure(f"there is no Python at {python}", next_command="chipmunk doctor --python EXECUTABLE")
        return os.path.abspath(found)
    try:
        environment = inspect(locate(repo), None, ("torch",))
    except Failure:
        return sys.executable
    return environment.executable if environment.importable and environment.packages.get("torch") else sys.executable
