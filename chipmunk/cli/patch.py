"""`chipmunk patch`: show the plan site by site, then carry it out, all files or none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipmunk.cli import planning
from chipmunk.cli.failure import UNMET, Failure, command
from chipmunk.cli.options import Json, Only, Plugins, Python, Repo, Target

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.apply import Recovery, Update


@command
def patch(
    repo: Repo,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if there is work to do.")] = False,
    only: Only = None,
    target: Target = None,
    plugins: Plugins = None,
    verify: Annotated[bool, typer.Option("--verify", help="Go on with `chipmunk verify`.")] = False,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Make a FLUX repository run through Chipmunk.

    The repository is read, never imported or run. The plan is shown site by site and then carried out: all files are
    changed or none, and `chipmunk revert` gives every byte back.
    """
    from chipmunk import apply
    from chipmunk.cli.plan_view import plan_object, show_plan, size_of, tally
    from chipmunk.cli.terminal import print_json, say, screen

    writes = not (dry_run or check)
    recovery = apply.recover(repo) if writes else apply.Recovery.NOTHING
    update = planning.plan(repo, only=only, target=target, plugins=plugins)
    if not as_json:
        out = screen()
        _say_recovered(out, recovery)
        show_plan(out, update.plan)
        out.file.flush()  # if nobody reads the plan, nothing is done
    planning.refuse_if_nothing_fits(update)
    if writes:
        apply.carry_out(update)
    work = bool(update.changes)
    status = "up to date" if not work else "patched" if writes else "unpatched"
    if as_json and not (verify and writes):
        print_json(plan_object(status, update.plan.target, update.changes, update.plan.sites))
    elif not as_json:
        with suppress(BrokenPipeError):  # the files are written: nothing that happens now changes that
            say(out, f"\n{tally(update.plan.sites, past=writes)}.")
            if not work:
                say(out, "Nothing to do: everything that can be patched is.")
            else:
                say(out, f"{'Patched' if writes else 'Would change'} {size_of(update.changes)}.")
                _say_next(out, repo, written=writes, verifying=verify)
            if writes:
                _say_what_is_missing(out, update, python)
            out.file.flush()
    if check and work:
        raise typer.Exit(UNMET)
    if verify and writes:
        from chipmunk.cli.verify import verify_repository

        if not as_json:
            out.print()
        verify_repository(repo, target=target, plugins=plugins, python=python, as_json=as_json)


def _say_recovered(out: Console, recovery: Recovery) -> None:
    from chipmunk.apply import Recovery
    from chipmunk.cli.terminal import say

    if recovery is not Recovery.NOTHING:
        say(out, f"An earlier run had been stopped half-way; it was {recovery.value} first.\n")


def _say_next(out: Console, repo: Path, *, written: bool, verifying: bool) -> None:
    """Name the next commands."""
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import next_commands

    root = quoted(repo)
    if not written:
        lines = [(f"chipmunk diff {root}", "the change, line by line"), (f"chipmunk patch {root}", "carry it out")]
    else:
        lines = [
            (f"chipmunk diff {root}", "the change, line by line"),
            (f"chipmunk verify {root}", "prove that it computes what it did"),
            (f"chipmunk config init {root}", "turn it on: a chipmunk-config.yml to edit"),
            (f"chipmunk revert {root}", "undo it, to the byte"),
        ]
        if verifying:
            del lines[1]
    next_commands(out, lines)


def _say_what_is_missing(out: Console, update: Update, python: str | None) -> None:
    """Say why the Python that runs the repository would not run the patched code, if it would not."""
    from chipmunk.cli.environment import inspect, package_findings, packages_of, runtime_finding
    from chipmunk.cli.terminal import exact, sentence

    root = update.repository.root
    packages = packages_of((file.path for file in update.journal.files), root)
    try:
        found = inspect(root, python, packages)
    except Failure as failure:
        sentence(out, failure.message, label="Note", style="bold yellow", indent=0)
        return
    for finding in [runtime_finding(found), *package_findings(root, packages, found)]:
        if finding.level == "problem":
            out.print()
            says = f"{finding.subject}: {finding.says} ({found.executable}, {found.chosen})"
            sentence(out, says, label="Note", style="bold yellow", indent=0)
            exact(out, f"       {finding.next_command}", "bold")
