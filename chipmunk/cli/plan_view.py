"""A plan, site by site: what is changed, what is left, and why."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from chipmunk.apply import changed_lines
from chipmunk.apply.merge import line_edits
from chipmunk.cli.terminal import clean, cropped, exact, hanging
from chipmunk.rewrite import FileChange, Site, SiteStatus

if TYPE_CHECKING:
    from chipmunk.rewrite import Plan

_LOOK = {
    SiteStatus.PATCHED: ("patch", "bold green"),
    SiteStatus.ALREADY: ("already patched", "green"),
    SiteStatus.LEFT_DENSE: ("left dense", "yellow"),
    SiteStatus.REFUSED: ("refused", "bold red"),
}
_FORWARD = re.compile(rb"\bdef\s+forward\b")
_LINE = 6
_WIDE = 110
"""Columns from which on the code stands on the same line as its status."""


def show_plan(out: Console, plan: Plan) -> None:
    """Print the models that were found and every site."""
    for model in plan.models:
        loops = ", ".join(f"{loop.function} in {loop.file}" for loop in model.loops) or "none found"
        where = f" in {clean(model.file)}"
        if model.installed:
            where, loops = f" of the installed {model.file.partition('/')[0]}", "the pipeline's own"
        head = Text.assemble("Model  ", (clean(model.name), "bold"), where)
        out.print(head, soft_wrap=True)
        hanging(out, Text("       "), Text(clean(f"target: {plan.target or 'none'}; sampling loops: {loops}"), "dim"))
    if plan.models:
        out.print()
    show_sites(out, plan.sites)


def show_sites(out: Console, sites: Iterable[Site], *, past: bool = False) -> None:
    """Print sites, file by file; `past`: what was planned has been done."""
    ordered = sorted(sites, key=lambda site: (site.file, site.line, site.patch))
    words = {status: word for status, (word, _) in _LOOK.items()}
    if past:
        words[SiteStatus.PATCHED] = SiteStatus.PATCHED.value
    statuses = max((len(words[site.status]) for site in ordered), default=0)
    patches = max((len(site.patch) for site in ordered), default=0)
    margin = Text(" " * (_LINE + 2))
    for file, group in groupby(ordered, key=lambda site: site.file):
        exact(out, file, "bold")
        for site in group:
            head = Text.assemble(
                (f"{site.line:>{_LINE}}  ", "dim"),
                (words[site.status].ljust(statuses + 2), _LOOK[site.status][1]),
                (clean(site.patch).ljust(patches + 2), "cyan"),
            )
            code = Text(clean(" ".join(site.matched.split())) if site.matched != site.file else "")
            if out.width >= _WIDE:
                cropped(out, head, code)
            else:
                head.rstrip()
                out.print(head, soft_wrap=True)
                if code:
                    cropped(out, margin, code)
            if site.status is not SiteStatus.ALREADY:
                hanging(out, margin, Text(clean(site.reason), style="dim"))


def tally(sites: Iterable[Site], *, past: bool = False) -> str:
    """Count sites by status: "9 to patch, 2 left dense"."""
    counts = Counter(site.status for site in sites)
    words = {status: status.value for status in SiteStatus}
    if not past:
        words[SiteStatus.PATCHED] = "to patch"
    return ", ".join(f"{counts[status]} {words[status]}" for status in SiteStatus if counts[status]) or "none"


def size_of(changes: Sequence[FileChange]) -> str:
    """How large a change is, in words."""
    added, removed = (sum(numbers) for numbers in zip((0, 0), *map(changed_lines, changes), strict=True))
    forward = sum(map(lines_in_forward, changes))
    files = "1 file" if len(changes) == 1 else f"{len(changes)} files"
    inside = f"; {forward} of the new lines are in forward methods" if forward else ""
    return f"{files}: {added} lines added, {removed} removed{inside}"


def lines_in_forward(change: FileChange) -> int:
    """How many new or changed lines stand inside functions called `forward`."""
    if _FORWARD.search(change.after) is None:
        return 0
    try:
        tree = ast.parse(change.after)
    except (SyntaxError, ValueError):
        return 0
    spans = [
        (min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno or node.lineno)
        for node in _statements(tree.body)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "forward"
    ]
    new = (
        line
        for edit in line_edits(change.before, change.after)
        for line in range(edit.new_start + 1, edit.new_stop + 1)
    )
    return sum(any(first <= line <= last for first, last in spans) for line in new)


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements, and those that stand in them."""
    for node in body:
        yield node
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            yield from _statements(getattr(node, name, ()))


def plan_object(
    status: str, target: str | None, changes: Iterable[FileChange], sites: Iterable[Site]
) -> dict[str, Any]:
    """The `--json` object of patch, diff, revert and apply."""
    changes = list(changes)
    added, removed = (sum(numbers) for numbers in zip((0, 0), *map(changed_lines, changes), strict=True))
    return {
        "status": status,
        "target": target,
        "files": [change.path for change in changes],
        "sites": list(map(site_object, sites)),
        "lines": {"added": added, "removed": removed, "in_forward": sum(map(lines_in_forward, changes))},
    }


def site_object(site: Site) -> dict[str, Any]:
    return {
        "file": site.file,
        "line": site.line,
        "patch": site.patch,
        "status": site.status.value,
        "matched": site.matched,
        "reason": site.reason,
    }
