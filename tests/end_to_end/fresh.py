"""What each picture comes to in a process that has done nothing before: `python -m tests.end_to_end.fresh ROOT OUT`."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import chipmunk
import chipmunk.runtime
from tests.end_to_end.starter import Repository, inputs, load, small_config


@dataclass(frozen=True)
class Picture:
    steps: int = 12
    height: int = 5
    width: int = 7
    batch: int = 1
    seed: int = 1


PICTURES = {
    "first": Picture(),
    "second": Picture(seed=2),
    "28 steps": Picture(steps=28, seed=3),
    "another resolution": Picture(height=6, width=9, seed=4),
    "batch of two": Picture(batch=2, seed=5),
    "fewer steps": Picture(steps=9, seed=6),
}


def draw(repository: Repository, model: Any, picture: Picture) -> Tensor:
    """The latents at the end of the repository's own sampling loop."""
    given = inputs(picture.height, picture.width, batch=picture.batch, seed=picture.seed)
    sampling = repository.modules["flux.sampling"]
    with torch.no_grad():
        latents: Tensor = sampling.denoise(
            model,
            given["img"],
            given["img_ids"],
            given["txt"],
            given["txt_ids"],
            given["y"],
            sampling.get_schedule(picture.steps, given["img"].shape[1]),
            3.5,
        )
    return latents


def denoising(repository: Repository, model: Any, picture: Picture) -> Generator[None, None, Tensor]:
    """The same loop, pausing after each step."""
    given = inputs(picture.height, picture.width, batch=picture.batch, seed=picture.seed)
    img, batch = given.pop("img"), picture.batch
    times = repository.modules["flux.sampling"].get_schedule(picture.steps, img.shape[1])
    for now, after in chipmunk.steps(model, list(pairwise(times))):
        with torch.no_grad():
            img = img + (after - now) * model(img=img, timesteps=torch.full((batch,), now), **given)
        yield
    return img


def main(root: str, out: str) -> None:
    """Imports are done once, above; all else by processes forked from this one, which only imports."""
    repository = load(Path(root))

    def work(name: str) -> None:
        torch.set_num_threads(1)
        model = repository.model()
        dense = draw(repository, model, PICTURES[name])
        assert not chipmunk.statistics(model).enabled
        chipmunk.enable(model, small_config())
        torch.save((dense, draw(repository, model, PICTURES[name])), Path(out) / f"{name}.pt")

    for name in PICTURES:
        process = multiprocessing.get_context("fork").Process(target=work, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
