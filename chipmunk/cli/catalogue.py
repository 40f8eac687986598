"""How patches and targets are listed and explained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from chipmunk.apply import unified
from chipmunk.cli.diff_view import show_diff
from chipmunk.cli.failure import Failure
from chipmunk.cli.terminal import clean, exact, hanging, next_commands, say, screen
from chipmunk.registry import Example, Patch, Target
from chipmunk.rewrite import FileChange

Item = TypeVar("Item", Patch, Target)


def show_list(known: Mapping[str, Patch] | Mapping[str, Target], kind: str) -> None:
    """Print name, summary and origin of each, and the next command."""
    out = screen()
    width = max((len(name) for name in known), default=0)
    for name, item in known.items():
        hanging(out, Text(f"{name.ljust(width)}  ", "bold"), Text(clean(item.summary)))
        hanging(out, Text(" " * (width + 2)), Text(clean(item.origin), "dim"))
    next_commands(out, [(f"chipmunk {kind} show {next(iter(known), 'NAME')}", "")])


def find(name: str, known: Mapping[str, Item], kind: str) -> Item:
    """Return one by its name. Raises `Failure` that names the nearest one."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"chipmunk {kind} show {near[0]}" if near else f"chipmunk {kind} list"
    raise Failure(f"there is nothing called {name} among the {kind}; known are {', '.join(known)}", (), remedy)


def explain(title: str, origin: str, documentation: str) -> Console:
    """Print a title and a docstring: paragraphs are filled, lists and indented blocks stay as they are."""
    out = screen()
    out.print(Text.assemble((clean(title), "bold"), (f"   {clean(origin)}", "dim")), soft_wrap=True)
    for paragraph in documentation.split("\n\n"):
        out.print()
        if paragraph.startswith((" ", "- ", "|")):
            exact(out, paragraph)
        else:
            say(out, " ".join(paragraph.split()))
    return out


def show_example(out: Console, example: Example) -> None:
    """Print an example as a diff, or its code where the patch leaves it alone."""
    out.print()
    title = example.title if example.after is not None else f"{example.title}: left alone"
    out.print(Text.assemble((clean(title), "bold"), (f"   {clean(example.path)}", "dim")), soft_wrap=True)
    if example.after is None:
        exact(out, example.before.rstrip("\n"))
    else:
        show_diff(out, unified([FileChange(example.path, example.before.encode(), example.after.encode())]))
