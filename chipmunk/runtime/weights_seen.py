"""Whether weights are those under which caches were made: LoRAs are merged and models loaded while a loop runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_NO_VERSION = -1


class WeightsSeen:
    """The parameters of blocks at one moment: which they are, their dtypes, and how often they were written to.

    Nothing of their values is read, so a write that PyTorch does not count (through `weight.data`) stays unseen. Where
    the data lies is not asked either: offloading moves it at every step. Nor are parameters on the meta device, which
    stand for such data.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._seen = _look(blocks)

    def are_those_of(self, blocks: Sequence[nn.Module]) -> bool:
        now = _look(blocks)
        return len(now) == len(self._seen) and all(
            # The reference itself, which a parameter has one of: its address may be another's by now.
            a is b and kind is other_kind and version == other_version
            for (a, kind, version), (b, other_kind, other_version) in zip(now, self._seen, strict=True)
        )


def _look(blocks: Sequence[nn.Module]) -> list[tuple[weakref.ref[Tensor], torch.dtype, int]]:
    """Not `parameters()`, which takes five times as long."""
    found: list[tuple[weakref.ref[Tensor], torch.dtype, int]] = []
    modules: list[nn.Module | None] = list(blocks)
    while modules:
        module = modules.pop()
        if module is None:
            continue
        modules.extend(module._modules.values())
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                found.append((weakref.ref(parameter), parameter.dtype, _version(parameter)))
    return found


def _version(parameter: Tensor) -> int:
    try:
        return parameter._version
    except RuntimeError:  # made in inference mode
        return _NO_VERSION
