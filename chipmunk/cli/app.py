"""The commands and their order in `chipmunk --help`."""

from __future__ import annotations

from typing import Annotated

import typer

from chipmunk import __version__
from chipmunk.cli import config, patches, targets
from chipmunk.cli.apply import apply
from chipmunk.cli.bench import bench
from chipmunk.cli.demo import demo
from chipmunk.cli.diff import diff
from chipmunk.cli.doctor import doctor
from chipmunk.cli.fidelity import fidelity
from chipmunk.cli.patch import patch
from chipmunk.cli.report import report
from chipmunk.cli.revert import revert
from chipmunk.cli.status import status
from chipmunk.cli.tune import tune
from chipmunk.cli.verify import verify

app = typer.Typer(
    name="chipmunk",
    help="Patch your own FLUX repository so that attention and MLPs run sparse; prove it, measure it, undo it.",
    epilog="First steps: chipmunk demo DIR. Exit codes: 0 done, 1 a check did not hold, 2 refused, 3 conflict.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help is plain text: quick, and `[str]` stays what it is
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chipmunk-flux {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(patch)
app.command()(diff)
app.command()(status)
app.command()(revert)
app.command()(apply)
app.command()(verify)
app.command()(bench)
app.command()(fidelity)
app.command()(tune)
app.command()(report)
app.add_typer(patches.app, name="patches")
app.add_typer(targets.app, name="targets")
app.add_typer(config.app, name="config")
app.command()(doctor)
app.command()(demo)
