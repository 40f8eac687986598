"""`chipmunk report`: one self-contained HTML page of a fidelity run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from chipmunk.cli.failure import Failure, command
from chipmunk.cli.fidelity import Autoencoder, Configs, Device, Dtype, Factory, Prompts, Size, Steps, Weights
from chipmunk.cli.options import Json, Python, Target


@command
def report(
    source: Annotated[
        Path, typer.Argument(metavar="REPO|RESULTS.json", help="A patched repository, or what fidelity has written.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.", metavar="FILE")] = Path("report.html"),
    config: Configs = None,
    prompt: Prompts = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="How many of the target's own prompts.")] = 2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Pictures of each prompt.")] = 1,
    steps: Steps = 50,
    size: Size = None,
    weights: Weights = None,
    factory: Factory = None,
    autoencoder: Autoencoder = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    compare: Annotated[bool, typer.Option("--compare", help="Draw the curves of fidelity over cost too.")] = False,
    target: Target = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Write pictures, curves and costs as one HTML page.

    Of a repository, it measures first, as `chipmunk fidelity` does (your code is run). Of a results.json that
    `chipmunk fidelity --output DIR` has written, nothing is measured and the other options have no effect.
    """
    import tempfile

    from chipmunk.cli.terminal import print_json, say, screen, write_file

    if output.is_dir():
        output = output / "report.html"
    if not output.absolute().parent.is_dir():
        raise Failure(f"there is no folder {output.absolute().parent} for the page")
    if source.is_dir() and (source / "results.json").is_file() and not (source / ".chipmunk").is_dir():
        source = source / "results.json"
    measured = None
    if source.is_file():
        results = _read(source)
        page = _page(results, source.absolute().parent)
    else:
        from chipmunk.cli.fidelity import end_if_stopped, fidelity_options, run_with_bar

        with tempfile.TemporaryDirectory(prefix="chipmunk-report-") as folder:
            options = fidelity_options(
                source, config=config, prompt=prompt, prompts=prompts, seeds=range(seeds), steps=steps, size=size,
                weights=weights, factory=factory, autoencoder=autoencoder, dtype=dtype, device=device,
                output=Path(folder), target=target, python=python, compare=compare,
            )  # fmt: skip
            measured = run_with_bar(source, options)
            results = measured.to_json()
            page = _page(results, Path(folder))
    write_file(output, page.encode())
    if as_json:
        print_json({"status": "written", "target": results["target"], "files": [str(output)], "sites": []})
    else:
        say(screen(), f"Wrote {output} ({len(page) / 1e6:.1f} MB): open it in a browser.")
    if measured is not None:
        end_if_stopped(measured)


def _page(results: dict[str, Any], folder: Path) -> str:
    from chipmunk.report import render

    return render(results, folder)


def _read(path: Path) -> dict[str, Any]:
    """What `chipmunk fidelity --output` or `--json` has written."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        needed = {"variants", "dense", "pictures", "environment", "cost"}
        if not isinstance(results, dict) or not needed <= set(results):
            raise ValueError("it is not what chipmunk fidelity writes")
    except ValueError as error:
        raise Failure(f"{path} cannot be read: {error}", next_command="chipmunk fidelity --output DIR REPO") from None
    return results
