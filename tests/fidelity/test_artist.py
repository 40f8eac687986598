"""How far the dense model is from itself, where another dtype does not hold its numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chipmunk.fidelity.artist import Artist
from chipmunk.fidelity.recording import Recording
from chipmunk.fidelity.spec import Picture
from chipmunk.fidelity.studio import BuildError, Drawing


class Overflowing(Artist):
    """Draws dense pictures without a model; in float16 they are not finite."""

    def __init__(self, folder: Path, holds: bool) -> None:
        self.spec: Any = SimpleNamespace(floor=1, steps=2, dense=folder / "dense", out=folder)
        self.studio: Any = SimpleNamespace(dtype=torch.bfloat16, notes=[], cast=self.cast)
        self.pictures = [Picture("a chipmunk", 0)]
        self._dense = {}
        self.holds = holds
        self.save_dense(0, *self.draw(self.pictures[0], 2, "dense"))

    def cast(self, dtype: torch.dtype) -> None:
        self.studio.dtype = dtype

    def draw(self, picture: Picture, steps: int, what: str, watched: bool = False) -> tuple[Drawing, Recording]:
        if self.studio.dtype == torch.float16 and not self.holds:
            raise BuildError("the picture of 'a chipmunk', seed 0, is not finite")
        return Drawing([torch.ones(1, 4, 2)] * steps), Recording(marks=[(0.0, 1.0)] * steps)


@pytest.mark.parametrize("holds", [True, False])
def test_a_floor_that_cannot_be_drawn_is_left_out_and_costs_nothing_else(holds: bool, tmp_path: Path) -> None:
    artist = Overflowing(tmp_path, holds)
    found = artist.floor()
    assert {name: len(pictures) for name, pictures in found.items()} == (
        {"again": 1, "math SDPA": 1} | ({"float16": 1} if holds else {})
    )
    assert artist.studio.notes == (
        [] if holds else ["no floor in float16: the picture of 'a chipmunk', seed 0, is not finite"]
    )
