"""From a path and options to a plan, for the commands that need one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chipmunk.cli.failure import Failure

if TYPE_CHECKING:
    from chipmunk.apply import Update


def plan(root: Path, *, only: list[str] | None, target: str | None, plugins: list[Path] | None) -> Update:
    """Plan what patching `root` would change. Changes nothing."""
    from chipmunk import registry, rewrite
    from chipmunk.apply import plan_update
    from chipmunk.cli.options import names
    from chipmunk.cli.terminal import Waiting

    known = registry.load(plugins or ())
    with Waiting() as waiting:
        return plan_update(
            root,
            lambda files: rewrite.plan_repository(files, known, only=names(only), target=target, progress=waiting),
        )


def refuse_if_nothing_fits(update: Update) -> None:
    """Raise `Failure` where there is nothing to patch because this is no FLUX repository, or one not understood."""
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.failure import Where
    from chipmunk.rewrite import SiteStatus

    if update.changes or any(site.status is SiteStatus.ALREADY for site in update.plan.sites):
        return
    root = update.repository.root
    refused = [site for site in update.plan.sites if site.status is SiteStatus.REFUSED]
    places = tuple(Where(site.file, site.line, site.reason) for site in refused)
    again = f"chipmunk patch --dry-run {quoted(root)}   (once these files can be read)"
    if not update.plan.models:
        count = len(update.repository.files)
        why = "no forward is known to go through one list of blocks with two streams, then one with a single stream"
        near = [site for site in update.plan.sites if site.status is SiteStatus.LEFT_DENSE]
        if near:
            why = "what is nearest to one is left as it is"
        raise Failure(
            f"no FLUX model that can be patched was found in {root} ({count} Python "
            f"{'file' if count == 1 else 'files'}): {why}. Nothing was written",
            (*places, *(Where(site.file, site.line, site.reason) for site in near)),
            again if refused else "chipmunk targets   (what is known)",
        )
    if refused:
        raise Failure("the repository cannot be patched as it stands. Nothing was written", places, again)
    raise Failure(
        "a FLUX model was found, but nothing in it can be handed to Chipmunk. Nothing was written",
        tuple(Where(site.file, site.line, site.reason) for site in update.plan.sites),
        f"chipmunk patch --dry-run {quoted(root)}",
    )
