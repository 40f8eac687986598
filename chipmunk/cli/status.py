"""`chipmunk status`: where a repository stands, site by site. Changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chipmunk.cli.failure import command
from chipmunk.cli.options import Json, Repo

if TYPE_CHECKING:
    from rich.console import Console

    from chipmunk.apply import RepositoryStatus
    from chipmunk.rewrite import Site

_NEXT = {
    "unpatched": (("chipmunk patch", "see what would change, and change it"),),
    "patched": (
        ("chipmunk diff", "the change, line by line"),
        ("chipmunk verify", "prove that it computes what it did"),
        ("chipmunk revert", "undo it, to the byte"),
    ),
    "patched and edited since": (
        ("chipmunk patch", "bring it up to date; your edits stay"),
        ("chipmunk revert", "undo it; your edits stay"),
    ),
}
_STUCK = (("chipmunk diff", "what Chipmunk changed: put the places above back like that, then revert or patch"),)


@command
def status(repo: Repo, as_json: Json = False) -> None:
    """Tell where a repository stands, site by site.

    Unpatched, patched, patched and edited since, interrupted half-way, or a journal that is damaged or gone. Changes
    nothing.
    """
    from chipmunk import apply
    from chipmunk.cli.plan_view import site_object
    from chipmunk.cli.terminal import print_json, screen

    found = apply.status(repo)
    sites = _sites_on_disk(found)
    if as_json:
        print_json(
            {
                "status": found.state.value,
                "target": found.journal.target if found.journal else None,
                "files": [file.path for file in found.files],
                "sites": list(map(site_object, sites)),
                "states": {file.path: file.state.value for file in found.files},
                "message": found.message,
                "next": found.next_command,
            }
        )
    else:
        _show(screen(), repo=str(repo), found=found, sites=sites)


def _show(out: Console, repo: str, found: RepositoryStatus, sites: list[Site]) -> None:
    from pathlib import Path

    from rich.text import Text

    from chipmunk.apply import FileState
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.plan_view import show_sites, tally
    from chipmunk.cli.terminal import clean, next_commands, say, sentence

    good = {"unpatched": "bold", "patched": "bold green"}
    out.print(
        Text.assemble(f"{clean(repo)}: ", (found.state.value, good.get(found.state.value, "bold yellow"))),
        soft_wrap=True,
    )
    if found.message is not None:
        sentence(out, found.message, indent=0, label="Note", style="yellow")
    if found.journal is not None and found.files:
        journal = found.journal
        when = f"{journal.created}, by chipmunk {journal.tool}, target: {journal.target or 'none'}"
        say(out, when, "dim")
        out.print()
        show_sites(out, sites, past=True)
        say(out, f"\n{tally(sites, past=True)}.")
        for file in found.files:
            if file.state is not FileState.PATCHED:
                sentence(out, f"{file.path}: {file.state.value}", label="Note", style="yellow", indent=0)
            for place in file.places:
                sentence(out, str(place), label="at", style="dim")
    if found.next_command is not None:
        next_commands(out, [(found.next_command, "")])
    else:
        stuck = any(file.places for file in found.files)
        steps = _STUCK if stuck else _NEXT.get(found.state.value, ())
        next_commands(out, [(f"{command} {quoted(Path(repo))}", what) for command, what in steps])


def _sites_on_disk(found: RepositoryStatus) -> list[Site]:
    """The journal's sites, their lines told from the files as they are now."""
    from chipmunk.apply.merge import map_line

    if found.journal is None:
        return []
    files = {file.path: file for file in found.files}
    sites = []
    for site in found.journal.sites:
        file, entry = files.get(site.file), found.journal.file(site.file)
        if file is not None and entry is not None and file.current is not None:
            site = replace(site, line=map_line(entry.original, file.current, site.line))
        sites.append(site)
    return sites
