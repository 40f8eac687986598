"""Many pictures on one sheet."""

from __future__ import annotations

from pathlib import Path

import torch
from flux.util import save_image
from torch import Tensor


def save_sheet(pixels: Tensor, path: Path, columns: int) -> None:
    """Write pictures (n, 3, height, width) in [-1, 1] as one PNG, `columns` in a row; white where none is left."""
    pixels = pixels.float().cpu()
    n, channels, height, width = pixels.shape
    missing = -n % columns
    pixels = torch.cat((pixels, torch.ones(missing, channels, height, width)))
    sheet = pixels.reshape(-1, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    save_image(sheet.reshape(channels, -1, columns * width), path)
