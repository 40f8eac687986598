"""One side of a fidelity run, in a process of its own: `python -m chipmunk.fidelity.worker SPEC.json`.

The original's process draws all pictures densely, and measures how far the dense model is from itself; the patched one
draws them with each configuration. Figures go to `result.json`, pictures to a folder; what there is of the patched
side's figures stands in `so-far.json` at every moment.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chipmunk.fidelity.artist import Artist
from chipmunk.fidelity.spec import Spec
from chipmunk.fidelity.studio import BuildError, CheckoutError, OtherModelError
from chipmunk.verify.order import read_order
from chipmunk.verify.placeholders import PlaceholderUsed, to_install
from chipmunk.verify.worker import environment, failure, require_device

SO_FAR = "so-far.json"


def original(spec: Spec) -> dict[str, Any]:
    """Dense pictures, shorter dense loops, and the floor."""
    artist = Artist(spec, 0)
    count = len(artist.pictures)
    artist.total = count * (1 + len(spec.variants)) + 3 * min(spec.floor, count)
    if artist.cuda and _compiles(spec):
        for block in artist.blocks:
            block.compile(dynamic=False)
        artist.total += 1
        artist.draw(artist.pictures[0], spec.steps, "dense: compiling")
    for index, picture in enumerate(artist.pictures):
        drawing, recorded = artist.draw(picture, spec.steps, f"dense: picture {index + 1}")
        artist.save_dense(index, drawing, recorded)
        artist.save_pixels(f"dense/{index}", drawing.pixels)
    for variant in spec.variants:
        if variant.method == "cache-dit":
            artist.rival(variant)
        else:
            artist.variant(variant, None)
    found: dict[str, Any] = {"variants": artist.variants}
    found["dense"] = {
        "pictures": [
            {
                "prompt": picture.prompt,
                "seed": picture.seed,
                "seconds": artist.dense(index).seconds,
                "step_seconds": artist.dense(index).step_seconds,
            }
            for index, picture in enumerate(artist.pictures)
        ]
    }
    found["floor"] = artist.floor() if spec.floor else {}
    return finish(artist, found)


def patched(spec: Spec) -> dict[str, Any]:
    """Every variant's pictures beside the dense ones."""
    artist = Artist(spec, 0)
    artist.total = len(spec.variants) * (len(artist.pictures) + spec.coverage + artist.cuda)
    cost = artist.cost()
    found: dict[str, Any] = {
        "variants": artist.variants,
        "cost": {
            "dense_call": cost.dense,
            "dense_sparsifiable_call": cost.dense_sparsifiable,
            "outside": cost.outside,
            "blocks": cost.blocks,
            "layers": [asdict(layer) for layer in cost.layers],
        },
    }
    artist.keep = lambda: _write(spec.out / SO_FAR, finish(artist, found))
    for variant in spec.variants:
        artist.variant(variant, cost)
    return finish(artist, found)


def finish(artist: Artist, found: dict[str, Any]) -> dict[str, Any]:
    """Add what a reader has to know about the run."""
    spec, studio = artist.spec, artist.studio
    return {
        **found,
        "notes": [*studio.notes, *studio.checkout.notes],
        "environment": {**environment(spec.device), **_about(artist)},
        "size": [studio.width, studio.height],
        "decodes": studio.decodes,
        "layers": [_name(spec, artist.model, index) for index in range(len(artist.blocks))],
    }


def _about(artist: Artist) -> dict[str, str]:
    spec = artist.spec
    parameters = sum(parameter.numel() for parameter in artist.model.parameters())
    count = f"{parameters / 1e9:.1f} billion" if parameters > 1e9 else f"{parameters / 1e6:.1f} million"
    found = {
        "model": f"{spec.facts.name} of {spec.facts.file}, {count} parameters",
        "weights": artist.studio.weights,
        "dtype": str(artist.studio.dtype).removeprefix("torch."),
    }
    if not artist.cuda:
        found["device"] = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    else:
        found["cuda"] = str(torch.version.cuda)
    return found


def _name(spec: Spec, model: nn.Module, index: int) -> str:
    doubles = len(attrgetter(spec.facts.double)(model))
    return f"{spec.facts.double}.{index}" if index < doubles else f"{spec.facts.single}.{index - doubles}"


def _compiles(spec: Spec) -> bool:
    """Whether the original's blocks are compiled: a fair rival for configurations that compile theirs."""
    if spec.tune is not None and spec.tune["cost"] != "seconds":
        return False
    return all((variant.config or {}).get("compile", "auto") is not False for variant in spec.variants)


def main(path: str) -> None:
    spec = read_order(Spec, Path(path))
    os.chdir(spec.out)
    try:
        require_device(spec.device)
        torch.set_grad_enabled(False)
        if spec.tune is not None and spec.side == "patched":
            from chipmunk.tune.worker import search

            result = search(spec)
        else:
            result = original(spec) if spec.side == "original" else patched(spec)
    except CheckoutError as error:
        result = failure("import", error, error.next_command)
    except PlaceholderUsed as error:
        result = failure("import", error, to_install(error.name or ""))
    except (BuildError, OtherModelError) as error:
        result = failure("build", error)
    except torch.cuda.OutOfMemoryError as error:
        result = failure("memory", error)
    except Exception as error:
        kind = "build" if type(error).__name__ == "CannotRun" else "crash"  # the target's own
        result = failure(kind, error)
    _write(spec.out / "result.json", result)


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: the process may be killed meanwhile."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, path)


if __name__ == "__main__":
    main(sys.argv[1])
