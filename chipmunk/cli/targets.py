"""`chipmunk targets`: what is known, from where, and what each one does."""

from __future__ import annotations

from typing import Annotated

import typer

from chipmunk.cli.failure import command
from chipmunk.cli.options import Plugins

app = typer.Typer(help="The families of FLUX code base that Chipmunk knows.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
@command
def _targets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _list(None)


@app.command("list")
@command
def list_targets(plugins: Plugins = None) -> None:
    """List the targets by name."""
    _list(plugins)


@app.command("show")
@command
def show_target(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The target's name, as the list gives it.")],
    plugins: Plugins = None,
) -> None:
    """Explain one family of code base, and what is built and run of it."""
    from chipmunk import registry
    from chipmunk.cli import catalogue

    target = catalogue.find(name, registry.load(plugins or ()).targets, "targets")
    catalogue.explain(target.name, target.origin, target.documentation)


def _list(plugins: Plugins) -> None:
    from chipmunk import registry
    from chipmunk.cli import catalogue

    catalogue.show_list(registry.load(plugins or ()).targets, "targets")
