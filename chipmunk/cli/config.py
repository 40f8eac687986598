"""`chipmunk config`: write, check and show a `chipmunk-config.yml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chipmunk.cli.failure import SUFFIXES, UNMET, Failure, command
from chipmunk.cli.options import Json

if TYPE_CHECKING:
    from chipmunk.config import Config

app = typer.Typer(help="Write, check and show a chipmunk-config.yml.", no_args_is_help=True, rich_markup_mode=None)

Place = Annotated[
    Path | None,
    typer.Argument(metavar="PLACE", help="The file, or its folder; left out, the one that applies here."),
]


@app.command()
@command
def init(
    place: Annotated[Path, typer.Argument(metavar="PLACE", help="Where to write it: a folder or a file.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the default configuration, commented."""
    from chipmunk.apply.errors import quoted
    from chipmunk.cli.terminal import next_commands, say, screen, write_file
    from chipmunk.config import FILE_NAME
    from chipmunk.registry import data_path

    path = place / FILE_NAME if place.is_dir() else place
    if not place.exists() and place.suffix not in SUFFIXES:
        raise Failure(
            f"there is no folder {place}; nothing was written (a file's name would end in .yml)",
            next_command="chipmunk config init",
        )
    data = data_path(FILE_NAME).read_bytes()
    if path.exists() and not force:
        raise Failure(
            f"{path} is there already; nothing was written",
            next_command=f"chipmunk config check {quoted(path)}   (or: chipmunk config init --force {quoted(place)})",
        )
    write_file(path, data)
    out = screen()
    say(out, f"Wrote {path}, the default configuration.")
    if (path.absolute().parent / ".chipmunk").is_dir():
        say(
            out,
            "The patched code runs with it from now on, started from any folder; without the file it is dense again.",
        )
    next_commands(out, [(f"chipmunk config check {quoted(path)}", "once you have edited it")])


@app.command()
@command
def check(place: Place = None, as_json: Json = False) -> None:
    """Check a file: each error with its line."""
    from chipmunk.cli.failure import explain, report
    from chipmunk.cli.terminal import print_json, screen, sentence
    from chipmunk.config import ConfigError, load, notes

    path = _path(place)
    try:
        config = load(path)
    except ConfigError as error:
        if any(problem.line is None for problem in error.problems):  # there is no such file, or nothing to check in it
            raise
        problems = [{"line": p.line, "key": p.key, "message": p.message} for p in error.problems]
        if as_json:
            print_json({"status": "check failed", "file": str(path), "problems": problems, "notes": []})
        failure = explain(error)
        report(failure, as_json=False)
        raise typer.Exit(UNMET) from None
    found = notes(config)
    if as_json:
        about = [{"key": note.key, "reason": note.reason} for note in found]
        print_json({"status": "valid", "file": str(path), "problems": [], "notes": about})
        return
    out = screen()
    sentence(out, f"{path} is a valid configuration.", indent=0, label="OK", style="green")
    for note in found:
        sentence(out, f"{note.key} has no effect: {note.reason}", indent=0, label="Note", style="yellow")


@app.command()
@command
def show(place: Place = None, as_json: Json = False) -> None:
    """Show what applies, defaults filled in."""
    import yaml

    from chipmunk.cli.terminal import exact, print_json, screen
    from chipmunk.config import Config, find, load

    path = _path(place) if place is not None else find()
    config = load(path) if path is not None else Config()
    values = _values(config)
    if as_json:
        print_json({"file": None if path is None else str(path), "config": values})
        return
    source = str(path) if path is not None else "no file applies here: these are the defaults"
    out = screen()
    exact(out, f"# {source}")
    exact(out, yaml.safe_dump(values, sort_keys=False).rstrip())


@app.command()
@command
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it to a file instead.", metavar="FILE")
    ] = None,
) -> None:
    """Print the JSON schema, for editors."""
    from chipmunk.cli.terminal import exact, print_json, screen
    from chipmunk.config import json_schema

    if output is None:
        print_json(json_schema())
        return
    output.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    line = f"# yaml-language-server: $schema={output}"
    exact(screen(), f"Wrote {output}. As the first line of your chipmunk-config.yml:\n  {line}")


def _path(place: Path | None) -> Path:
    """The file that was named, or the one that applies in the working directory."""
    from chipmunk.config import FILE_NAME, find

    path = find() if place is None else place / FILE_NAME if place.is_dir() else place
    if path is None:
        raise Failure(f"there is no {FILE_NAME} here", next_command="chipmunk config init")
    return path


def _values(config: Config) -> dict[str, object]:
    """Everything that has an effect."""
    from chipmunk.config import Config

    values = config.model_dump(mode="json", by_alias=True, exclude={"offloading"})
    without = {"steps", "num_model_invocations_per_inference_step", "world_size"}
    tuned = {"should_compress_indices", "pad_qkv_before_kernel", "local_voxels", "local_1d_window"}
    values["attn"] = {key: value for key, value in values["attn"].items() if key not in tuned}
    assert without <= set(Config.model_fields)
    return {key: value for key, value in values.items() if key not in without}
