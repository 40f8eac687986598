"""`chipmunk diff`: what patch would do or did, as a patch in a pipe and in colours in a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chipmunk.cli import planning
from chipmunk.cli.failure import UNMET, Failure, command
from chipmunk.cli.options import Json, Only, Plugins, Repo, Target


@command
def diff(
    repo: Repo,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the diff to a file, for git apply.", metavar="FILE")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if patch would find work to do.")] = False,
    only: Only = None,
    target: Target = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show what patch would change, or did change.

    In a terminal the diff is coloured, and side by side from 160 columns on. In a pipe or a file it is a patch that
    `git apply` takes, to the byte.
    """
    from chipmunk.apply import Store, locate, unified
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.diff_view import show_diff
    from chipmunk.cli.plan_view import plan_object, size_of
    from chipmunk.cli.terminal import print_json, say, screen, write_bytes, write_file

    root = locate(repo)
    journal = Store(root).load()
    if journal is not None and journal.files and not check:
        changes, sites, name, status = journal.changes, journal.sites, journal.target, "patched"
    else:
        update = planning.plan(root, only=only, target=target, plugins=plugins)
        planning.refuse_if_nothing_fits(update)
        changes, sites, name = update.changes, update.plan.sites, update.plan.target
        status = "unpatched" if changes else "up to date"
    data = unified(changes)
    if output is not None:
        if output.is_dir():
            raise Failure(f"{output} is a folder: name a file", next_command=f"chipmunk diff {quoted(repo)} -o x.patch")
        write_file(output, data)
    if as_json:
        print_json({**plan_object(status, name, changes, sites), "diff": data.decode("utf-8", "surrogateescape")})
    elif output is not None:
        say(screen(stderr=True), f"{output}: {size_of(changes)}")
    elif not sys.stdout.isatty():
        write_bytes(data)
    else:
        out = screen()
        show_diff(out, data)
        did = "Changed" if status == "patched" else "Would change"
        say(out, f"{did} {size_of(changes)}." if changes else "Nothing to do.")
    if check and changes:
        raise typer.Exit(UNMET)
