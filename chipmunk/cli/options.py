"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from chipmunk.cli.failure import Failure

Repo = Annotated[Path, typer.Argument(metavar="REPO", help="The FLUX repository: the folder that holds its code.")]
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
    found = [name.strip() for part in only for name in part.split(",") if name.strip()]
    if not found:
        raise Failure("--only names no patch", next_command="chipmunk patches list")
    return found


def device_of(word: str) -> str:
    """`cpu`, `cuda`, or one of several GPUs, `cuda:1` say. Whether it is there is asked of the Python that runs it."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", word) is None:
        raise Failure(f"--device {word} is neither cpu nor cuda", next_command="chipmunk doctor")
    return word


def size_of(word: str) -> tuple[int, int]:
    """Width and height in pixels: whole tokens of 16 × 16."""
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", word)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if width and height and not width % 16 and not height % 16:
        return width, height
    near = "1280x768 say"
    if width and height:
        near = "x".join(str(max(16, 16 * round(side / 16))) for side in (width, height)) + " is near"
    raise Failure(f"--size {word}: a size is WIDTHxHEIGHT in pixels, both multiples of 16; {near}")


def weights_file(path: Path | None) -> Path | None:
    """A checkpoint that is there."""
    if path is not None and not path.is_file():
        is_folder = path.is_dir()
        raise Failure(f"{path} is a folder; --weights is a file" if is_folder else f"there is no file {path}")
    return path


def factory_of(word: str | None) -> str | None:
    """`MODULE:FUNCTION`, as far as that can be told without importing it."""
    module, _, function = (word or "").partition(":")
    if word is not None and not (function.isidentifier() and _is_module(module)):
        raise Failure(f"--factory {word}: a factory is MODULE:FUNCTION, verify_factory:build say")
    return word


def _is_module(word: str) -> bool:
    return all(map(str.isidentifier, word.split("."))) and not word.endswith(".py")


def folder_for(output: Path | None) -> Path | None:
    """Make the folder that a long run is to write to, before it begins."""
    if output is not None:
        if output.exists() and not output.is_dir():
            raise Failure(f"{output} is a file; --output is a folder")
        output.mkdir(parents=True, exist_ok=True)
    return output
