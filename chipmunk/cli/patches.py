"""`chipmunk patches`: what is known, from where, and what each one does."""

from __future__ import annotations

from typing import Annotated

import typer

from chipmunk.cli.failure import command
from chipmunk.cli.options import Plugins

app = typer.Typer(help="The changes that Chipmunk makes, and where they come from.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
@command
def _patches(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _list(None)


@app.command("list")
@command
def list_patches(plugins: Plugins = None) -> None:
    """List the patches by name."""
    _list(plugins)


@app.command("show")
@command
def show_patch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The patch's name, as the list gives it.")],
    plugins: Plugins = None,
) -> None:
    """Explain one change that Chipmunk makes, with its examples."""
    from chipmunk import registry
    from chipmunk.cli import catalogue

    patch = catalogue.find(name, registry.load(plugins or ()).patches, "patches")
    out = catalogue.explain(f"{patch.name} {patch.version}", patch.origin, patch.documentation)
    for example in patch.examples:
        catalogue.show_example(out, example)


def _list(plugins: Plugins) -> None:
    from chipmunk import registry
    from chipmunk.cli import catalogue

    catalogue.show_list(registry.load(plugins or ()).patches, "patches")
