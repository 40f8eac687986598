"""From rules, or from a saved patch file, to the change that brings a repository up to date, patched before or not.

A patched repository is planned as if Chipmunk had never touched it: Chipmunk's lines are taken out in memory (the
user's own edits stay), the rules see plain FLUX code, and what they make of it is compared with the disk. So patching
twice is patching once, new rules replace old ones, and the journal's originals never hold a line of Chipmunk's.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chipmunk.apply import disk
from chipmunk.apply.errors import Conflict, quoted
from chipmunk.apply.journal import Journal, JournalFile, Store
from chipmunk.apply.merge import map_line, same_code, same_program
from chipmunk.apply.patchfile import apply_patch
from chipmunk.apply.repository import Repository, read
from chipmunk.apply.state import FileState, FileStatus, examine
from chipmunk.apply.transaction import commit, resolve_links
from chipmunk.rewrite.plan import FileChange, Plan, Site, SiteStatus


@dataclass(frozen=True)
class Update:
    """A planned change of a repository; nothing has been written."""

    repository: Repository
    plan: Plan
    """The rules' plan, told from the files on the disk: its changes lead from there, its lines are lines there, and
    what is on the disk already is `already patched`. Files that could not be read are among its sites."""
    journal: Journal
    """In force once the change is made."""
    replaces: str | None
    """Id of the journal in force now."""

    @property
    def changes(self) -> tuple[FileChange, ...]:
        return self.plan.changes


def plan_update(root: Path, planner: Callable[[dict[str, bytes]], Plan]) -> Update:
    """Plan a repository with rules. Changes nothing.

    `planner` gets the Python files by path, without Chipmunk's earlier change. In a file where the user's edits
    cannot be told from it, the rules see the file as it is; if they want to change it, `Conflict` says where the
    edits are, and so it does if a patch would go out of other files because its lines there were edited or deleted.
    If the rules find nothing to change at all, an earlier patch stays as it is: taking it out is what
    `revert` is for.

    Raises what `read` and `Store.load` raise.
    """
    repository = read(root)
    in_force = Store(repository.root).load()
    journal = in_force or Journal()
    standing = _standing(repository, journal)
    files = dict(repository.files)
    for path in files:
        file = standing.get(repository.links.get(path, path))
        if file is not None and file.unpatched is not None:
            files[path] = file.unpatched
    plan = planner(files)
    planned = {change.path: change for change in resolve_links(repository.root, plan.changes)}
    entries: list[JournalFile] = []
    changes: list[FileChange] = []
    for path in sorted({*planned, *standing}) if planned else ():
        entry = _entry(repository.root, journal.file(path), standing.get(path), planned.get(path))
        if entry is not None:
            entries.append(entry)
        # as planned on, not as it is by now: a run that ended meanwhile is noticed when the change is made
        current = planned[path].before if path not in standing else standing[path].current
        wanted = _wanted(standing.get(path), planned.get(path))
        if current is None or wanted is None or wanted == current:
            continue
        edited = path in standing and standing[path].state is FileState.EDITED
        formatted = edited and (same_code(wanted, current) or same_program(wanted, current))
        if not formatted:  # a formatter's work on patched lines is left as it is
            changes.append(FileChange(path, current, wanted))
    taken_out = _taken_out(journal, plan, changes)
    _refuse_to_take_out(repository, journal, standing, plan, taken_out)
    touched = {change.path for change in changes}
    untouched = {path for path in files if repository.links.get(path, path) not in touched}
    told_by_rules = plan.sites
    # what another file does for a place (a loop's steps are told at the model's forward) was done before if that stays
    before = set() if touched & standing.keys() else {_identity(site) for site in journal.sites}
    sites = [_as_on_disk(site, repository, files, untouched, taken_out, before) for site in told_by_rules]
    plan = replace(plan, changes=tuple(changes), sites=(*repository.problems, *sites))
    # The journal tells the sites from the originals: a line number there means the same whatever is on the disk.
    recorded = (*repository.problems, *told_by_rules)
    after = Journal(tuple(entries), plan.target, dict(plan.patches), recorded) if changes else journal
    return Update(repository, plan, after, in_force.id if in_force else None)


def _taken_out(journal: Journal, plan: Plan, changes: Sequence[FileChange]) -> dict[str, set[str]]:
    """By file, the patches that are asked for, were in it, and no longer will be."""
    before, now = _patches_by_file(journal.sites), _patches_by_file(plan.sites)
    return {change.path: (before[change.path] - now[change.path]) & plan.patches.keys() for change in changes}


def _refuse_to_take_out(
    repository: Repository,
    journal: Journal,
    standing: Mapping[str, FileStatus],
    plan: Plan,
    taken_out: Mapping[str, set[str]],
) -> None:
    """Raise `Conflict` if a patch would be taken out of files because of what the user did to its lines in another.

    One patch may change several files: the calls in the blocks hand down what the attention function takes. Where its
    lines in one of them are gone, the rules find no reason for those in the others.
    """
    before, now = _patches_by_file(journal.sites), _patches_by_file(plan.sites)
    gone = [file for file in standing.values() if file.unpatched is None and file.now_at is None]
    patches = set().union(*taken_out.values()) & set().union(*(before[file.path] - now[file.path] for file in gone))
    if not patches:
        return
    names, rest = ", ".join(sorted(patches)), ",".join(sorted(plan.patches.keys() - patches))
    files = ", ".join(path for path, lost in taken_out.items() if not lost.isdisjoint(patches))
    command = f"chipmunk patch {quoted(repository.root)} --only {rest}   (to leave {names} out)"
    raise Conflict(
        f"lines of {names} were edited or deleted since, and without them this would take {names} out of {files}; "
        "nothing was changed. Put the lines back as Chipmunk left them, or leave the patch out",
        places=[p for file in gone if not before[file.path].isdisjoint(patches) for p in file.places],
        next_command=command if rest else f"chipmunk diff {quoted(repository.root)}",
    )


def _patches_by_file(sites: Iterable[Site]) -> defaultdict[str, set[str]]:
    """Which patches have changed something in a file, or are to."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for site in sites:
        if site.status in (SiteStatus.PATCHED, SiteStatus.ALREADY):
            found[site.file].add(site.patch)
    return found


def plan_patch_file(root: Path, patch: bytes) -> Update:
    """Plan a saved patch file (as `chipmunk diff --output` writes it) on a repository. Changes nothing.

    On top of an earlier patch it joins that one's journal, and one revert takes both out; a later `plan_update` puts
    what the rules make of the originals in place of both. Raises `PatchInvalid`, and `Conflict` where the lines that
    the patch wants to change are not there.
    """
    repository = read(root)
    in_force = Store(repository.root).load()
    journal = in_force or Journal()
    changes, sites = apply_patch(repository.root, patch)
    standing = _standing(repository, journal)
    kept = {file.path: file for file in journal.files}
    for change in changes:
        entry = _entry(repository.root, kept.get(change.path), standing.get(change.path), change)
        if entry is not None:
            kept[change.path] = entry
    plan = Plan(journal.target, changes, sites, patches=dict(journal.patches))
    recorded = (*journal.sites, *(_as_in_original(site, standing) for site in sites))
    after = Journal(tuple(kept[path] for path in sorted(kept)), journal.target, plan.patches, recorded)
    return Update(repository, plan, after if changes else journal, in_force.id if in_force else None)


def carry_out(update: Update) -> None:
    """Make a planned change; with nothing to change, nothing is written. Raises what `commit` raises."""
    if update.changes:
        commit(update.repository.root, update.changes, update.journal, replaces=update.replaces)


def _standing(repository: Repository, journal: Journal) -> dict[str, FileStatus]:
    """The journal's files by path. Raises `Busy` if another run has changed one since the repository was read."""
    standing = {file.path: file for file in examine(repository.root, journal)}
    for path, file in standing.items():
        if file.current is not None and repository.files.get(path, file.current) != file.current:
            raise disk.busy(repository.root)
    return standing


def _entry(
    root: Path, before: JournalFile | None, standing: FileStatus | None, planned: FileChange | None
) -> JournalFile | None:
    """What the journal will say of a file, None if Chipmunk's change to it is gone."""
    if before is None or standing is None:
        if planned is None:
            return None
        mode = stat.S_IMODE(os.stat(root / planned.path).st_mode)
        return JournalFile(planned.path, planned.before, planned.after, mode)
    if standing.unpatched is None:
        if planned is not None:
            raise Conflict(
                "there is more to patch in a file whose patched lines were edited since; nothing was changed. "
                "Take your edits of these lines out, patch again, and then redo them",
                places=standing.places,
                next_command=f"chipmunk diff {quoted(root)}",
            )
        return before
    if planned is None:
        return None
    return JournalFile(before.path, standing.unpatched, planned.after, before.mode)


def _wanted(standing: FileStatus | None, planned: FileChange | None) -> bytes | None:
    """What a file is to hold: what the rules make of it, else what it is without Chipmunk; None to leave it alone."""
    if planned is not None:
        return planned.after
    return standing.unpatched if standing is not None else None


def _as_on_disk(
    site: Site,
    repository: Repository,
    planned_on: Mapping[str, bytes],
    untouched: set[str],
    taken_out: Mapping[str, set[str]],
    before: set[tuple[str, ...]],
) -> Site:
    """A site of the unpatched file, told from the file on the disk. `before`: what an earlier patch did for a place."""
    current, unpatched = repository.files.get(site.file), planned_on.get(site.file)
    line, differs = site.line, False
    if current is not None and unpatched is not None and current != unpatched:
        line, differs = map_line(unpatched, current, site.line), True
    if site.status is SiteStatus.PATCHED and site.file in untouched and (differs or _identity(site) in before):
        return replace(site, line=line, status=SiteStatus.ALREADY, reason="Chipmunk patched it before")
    if differs and site.patch in taken_out.get(site.file, ()):
        return replace(site, line=line, reason=f"{site.reason}; what Chipmunk had changed here is taken out")
    return replace(site, line=line)


def _identity(site: Site) -> tuple[str, ...]:
    """What a site is known by when the lines around it have moved."""
    return site.file, site.patch, site.status.value, site.matched or "", site.reason


def _as_in_original(site: Site, standing: Mapping[str, FileStatus]) -> Site:
    """A site of the file on the disk, told from the file as it would be without Chipmunk."""
    file = standing.get(site.file)
    if file is None or file.current is None or file.unpatched is None:
        return site
    return replace(site, line=map_line(file.current, file.unpatched, site.line))
