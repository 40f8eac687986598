"""`chipmunk revert`: take the change out again, to the byte, around edits that were made since."""

from __future__ import annotations

from typing import Annotated

import typer

from chipmunk.cli.failure import command
from chipmunk.cli.options import Json, Repo


@command
def revert(
    repo: Repo,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be restored and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Undo what patch did.

    A file that was not touched since gets its bytes back; from a file that you went on editing only Chipmunk's lines
    are taken out. Where the two overlap nothing is written, and the places are named.
    """
    from chipmunk import apply
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.plan_view import plan_object
    from chipmunk.cli.terminal import next_commands, print_json, say, screen, sentence

    before = apply.status(repo)
    target = before.journal.target if before.journal else None
    done = apply.plan_revert(repo) if dry_run else apply.revert(repo)
    patched = bool(done.changes) or done.recovery is not apply.Recovery.NOTHING
    if as_json:
        status = "unpatched" if not dry_run or not patched else "patched"
        extra = {
            "merged": list(done.merged),
            "leftovers": [{"file": p.file, "line": p.line, "reason": p.reason} for p in done.leftovers],
        }
        print_json({**plan_object(status, target, done.changes, ()), **extra})
        return
    out = screen()
    if done.recovery is not apply.Recovery.NOTHING:
        say(out, f"An earlier run had been stopped half-way; it was {done.recovery.value}.")
    for change in done.changes:
        how = "without Chipmunk's lines; your edits stay" if change.path in done.merged else "to the byte"
        verb = "would be restored" if dry_run else "restored"
        say(out, f"{change.path}: {verb}, {how}")
    for place in done.leftovers:
        sentence(out, str(place), label="Note", style="yellow", indent=0)
    if not patched:
        say(out, "Nothing to do: the repository is not patched.")
    elif not dry_run:
        next_commands(out, [(f"chipmunk patch {quoted(repo)}", "patch it again")])
