"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Repo = Annotated[Path, typer.Argument(help="The FLUX repository: the folder that holds its code.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Apply only these patches, separated by commas (mlp: both MLPs).", metavar="NAMES"),
]
Target = Annotated[
    str | None, typer.Option("--target", help="Name the target instead of recognising it.", metavar="NAME")
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugins", help="A folder with patches and targets of your own. Its code is run.", metavar="DIR"),
]
Python = Annotated[
    str | None, typer.Option("--python", help="The Python that runs the repository.", metavar="EXECUTABLE")
]


def names(only: list[str] | None) -> list[str] | None:
    """Take `--only a,b --only c` apart."""
    if only is None:
        return None
    return [name.strip() for part in only for name in part.split(",") if name.strip()]
