"""Weights in parts small enough to be passed around one by one, and the way back to one file.

python -m training.weights PART PART ... flux-mini.safetensors
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PART = 15_000_000
"""Bytes in a part, at most, as long as no single tensor is larger."""


def save_parts(weights: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write `weights` in float16 as model-1.safetensors, model-2.safetensors, ...; each file is replaced as a whole."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if size + half.nbytes > PART and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = half
        size += half.nbytes
    paths = []
    for number, part in enumerate(parts, start=1):
        path = folder / f"model-{number}.safetensors"
        unfinished = path.with_suffix(".tmp")
        save_file(part, unfinished, metadata=dict(metadata))
        os.replace(unfinished, path)
        paths.append(path)
    return paths


def join(parts: Sequence[Path], path: Path) -> None:
    """Write one file with the tensors of all parts. Raises ValueError where two parts have the same tensor."""
    weights: dict[str, Tensor] = {}
    for part in parts:
        tensors = load_file(part)
        if twice := weights.keys() & tensors.keys():
            raise ValueError(f"{part}: {min(twice)} is in an earlier part already")
        weights |= tensors
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


if __name__ == "__main__":
    *given, target = [Path(argument) for argument in sys.argv[1:]]
    join(given, target)
