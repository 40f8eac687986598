"""Crops of photographs that ship inside scikit-image and scikit-learn.

    python -m training.photographs photographs.npz

collects them once, small, so that a machine without those packages can train from that file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.scenes.paint import Dice

SHORT_SIDE = 320


@dataclass(frozen=True)
class Photograph:
    subject: str
    package: str
    file: str
    licence: str
    author: str


PHOTOGRAPHS = (
    Photograph("a cat", "skimage", "data/chelsea.png", "CC0 1.0", "Stéfan van der Walt"),
    Photograph("a cup of coffee", "skimage", "data/coffee.png", "CC0 1.0", "Rachel Michetti, Pikolo Espresso Bar"),
    Photograph("a rocket", "skimage", "data/rocket.jpg", "public domain", "SpaceX"),
    Photograph("galaxies", "skimage", "data/hubble_deep_field.jpg", "public domain", "NASA"),
    Photograph("a temple", "sklearn", "datasets/images/china.jpg", "CC BY 2.0", "danielbuechele on Flickr"),
    Photograph("a flower", "sklearn", "datasets/images/flower.jpg", "CC BY 2.0", "vultilion on Flickr"),
)


def collect() -> dict[str, np.ndarray]:
    """The photographs by subject, (height, width, 3) uint8, their short side SHORT_SIDE pixels.

    Reads the files where the packages are installed, without importing them. Raises FileNotFoundError that names the
    package to install.
    """
    from PIL import Image

    found = {}
    for photograph in PHOTOGRAPHS:
        spec = find_spec(photograph.package)
        path = Path(spec.origin).parent / photograph.file if spec is not None and spec.origin else None
        if path is None or not path.exists():
            package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
            raise FileNotFoundError(f"'{photograph.subject}' is {photograph.file} of {package}: pip install {package}")
        image = Image.open(path).convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        found[photograph.subject] = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return found


def load(path: Path | None) -> dict[str, Tensor]:
    """The photographs by subject, (3, height, width) in [0, 1], from the collected file or from the packages."""
    if path is None:
        arrays = collect()
    else:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
    return {name: torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255 for name, array in arrays.items()}


def crops(dice: Dice, photograph: Tensor, size: int) -> Tensor:
    """Square crops (n, 3, size, size) of one photograph: 62 to 100 % of its short side, half of them mirrored."""
    _, height, width = photograph.shape
    side = dice.number(0.62, 1.0) * min(height, width)
    left, top = dice.number(0, 1) * (width - side), dice.number(0, 1) * (height - side)
    mirror = 1 - 2 * dice.on(dice.chance(0.5))
    line = torch.linspace(-1, 1, size, device=dice.device)
    x = (left + (line.reshape(1, 1, -1) * mirror + 1) / 2 * side) / width * 2 - 1
    y = (top + (line.reshape(1, -1, 1) + 1) / 2 * side) / height * 2 - 1
    grid = torch.stack((x.expand(-1, size, -1), y.expand(-1, -1, size)), dim=-1)
    source = photograph.to(dice.device).expand(dice.n, -1, -1, -1)
    return torch.nn.functional.grid_sample(source, grid, mode="bicubic", align_corners=False).clamp(0, 1)


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **collect())
