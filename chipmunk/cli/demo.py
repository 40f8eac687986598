"""`chipmunk demo`: a small FLUX repository, and a walk through every command on it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from chipmunk.cli.failure import Failure, command

STEPS = "50"
"""Of the pictures: the whole walk takes less than three minutes on two cores."""


@command
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to make, for the starter repository.")],
    pictures: Annotated[bool, typer.Option(help="Draw pictures, dense and sparse: two minutes on two cores.")] = True,
) -> None:
    """Write a small FLUX repository and try it all.

    Every step is a command that you could type: patch, diff, status, verify, revert, patch again, config init, and
    pictures side by side with a report.
    """
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import exact, say, screen
    from chipmunk.registry import data_path

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Failure(f"{folder} is there already; nothing was written", next_command="chipmunk demo ANOTHER-FOLDER")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(data_path("templates") / "flux-starter", folder, ignore=ignored, dirs_exist_ok=True)
    out = screen()
    root = str(folder)
    count = sum(1 for path in folder.rglob("*.py"))
    trained = any(folder.rglob("*.safetensors"))
    weights = "trained on drawn scenes" if trained else "with random weights"
    say(out, f"A small FLUX repository {weights}, {count} Python files, is in {root}.")
    for title, words in (
        ("Patch it: the plan, site by site, then the change", ["patch", root]),
        ("Look at the change", ["diff", root]),
        ("Where it stands", ["status", root]),
        ("Prove that it computes what it did", ["verify", root]),
        ("Take it out again, to the byte", ["revert", root]),
        ("And back in, to play with", ["patch", root]),
        ("A configuration turns Chipmunk on", ["config", "init", root]),
    ):
        _step(title, words)
    drawn = _pictures(folder) if pictures else []
    _heading("Your turn")
    python = quoted(Path(sys.executable))
    exact(out, f"  cd {quoted(folder)}\n  {python} -m flux --seed 1")
    for what, path in drawn:
        exact(out, f"{what.ljust(8)}{path}", "bold")
    say(
        out,
        "Edit chipmunk-config.yml and run it again. To compare with the dense model, move that file away and add "
        "--output-dir dense. On a CPU the operators are plain PyTorch: the speed-up needs a GPU.",
    )


def _pictures(folder: Path) -> list[tuple[str, Path]]:
    """Draw the same picture dense and sparse, and write the report; what was written, and what it is."""
    missing = [package for package in ("skimage", "PIL", "jinja2") if importlib.util.find_spec(package) is None]
    if missing:
        from chipmunk.cli.terminal import say, screen
        from chipmunk.fidelity.metrics import INSTALL

        _heading("Pictures")
        say(screen(), f"Left out, for they need {missing[0]}: {INSTALL}")
        return []
    results, page = folder / "fidelity", folder / "report.html"
    drawing = ["--prompts", "1", "--seeds", "1", "--steps", STEPS, "--no-floor", "--no-coverage"]
    _step("The same picture, dense and sparse", ["fidelity", str(folder), *drawing, "--output", str(results)])
    _step("All of it as a page", ["report", str(results / "results.json"), "--output", str(page)])
    return [("Pair", results / "dense-and-sparse.png"), ("Report", page)]


def _step(title: str, words: list[str]) -> None:
    """Run one command as the user would, and stop the walk if it does not end with 0."""
    _heading(title)
    typer.secho(f"$ chipmunk {shlex.join(words)}", bold=True)
    sys.stdout.flush()
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}  # this Python runs the starter, not the one on the PATH
    code = subprocess.run([sys.executable, "-m", "chipmunk.cli", *words], env=environment, check=False).returncode
    if code != 0:
        raise Failure(f"this step ended with exit code {code}", exit_code=code if code in (1, 2, 3, 130) else 2)


def _heading(title: str) -> None:
    from rich.rule import Rule
    from rich.text import Text

    from chipmunk.cli.terminal import screen

    out = screen()
    out.print()
    if out.is_terminal:
        out.print(Rule(Text(title, style="bold"), align="left"))
    else:
        out.print(f"== {title} ==")
