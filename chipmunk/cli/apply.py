"""`chipmunk apply`: apply a saved patch file to another copy of the repository, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chipmunk.cli.failure import UNMET, command
from chipmunk.cli.options import Json


@command
def apply(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="What `chipmunk diff --output` wrote.")],
    repo: Annotated[Path, typer.Argument(metavar="REPO", help="The copy of the repository.")] = Path("."),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change and write nothing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if there is work to do.")] = False,
    as_json: Json = False,
) -> None:
    """Apply a saved patch to another copy.

    The lines may have moved; each must be there exactly, or nothing is written. `chipmunk revert` undoes it.
    """
    from chipmunk.apply import ApplyError, carry_out, plan_patch_file, recover
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.plan_view import plan_object, show_sites, size_of
    from chipmunk.cli.terminal import next_commands, print_json, say, screen

    patch = patch_file.read_bytes()
    writes = not (dry_run or check)
    if writes:
        recover(repo)
    try:
        update = plan_patch_file(repo, patch)
    except ApplyError as error:
        if error.next_command is not None:
            error.next_command = error.next_command.replace("PATCH", quoted(patch_file))
        raise
    if writes:
        carry_out(update)
    work = bool(update.changes)
    if as_json:
        status = "up to date" if not work else "patched" if writes else "unpatched"
        print_json(plan_object(status, update.plan.target, update.changes, update.plan.sites))
    else:
        out = screen()
        show_sites(out, update.plan.sites, past=writes)
        if not work:
            out.print("\nNothing to do: the change is there already.")
        else:
            say(out, f"\n{'Patched' if writes else 'Would change'} {size_of(update.changes)}.")
        if work and writes:
            root = quoted(repo)
            next_commands(out, [(f"chipmunk verify {root}", "prove it"), (f"chipmunk revert {root}", "undo it")])
    if check and work:
        raise typer.Exit(UNMET)
