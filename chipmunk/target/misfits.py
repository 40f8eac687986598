"""Which input of a model has the wrong width, told by the layer that refuses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LINEAR = {F.linear}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}


class Watch(TorchFunctionMode):
    """While this is open, follow `inputs` through all that keeps their channels, up to the layer that takes them in."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.misfit: tuple[str, int, int] | None = None
        """The input that a layer refused, the width that it had there, and the one that the layer takes."""
        self._names: dict[int, set[str]] = {id(tensor): {name} for name, tensor in inputs.items()}
        self._alive: list[Any] = list(inputs.values())  # so that no other tensor gets the identity of one of these

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in _flat((*args, *(kwargs or {}).values())) if isinstance(x, Tensor)]
        names = set().union(*(self._names.get(id(x), set()) for x in tensors))
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self._note(func, tensors, names, args)
            raise
        if names and func not in _LINEAR | _CONVOLUTIONS:
            for x in _flat((result,)):
                if isinstance(x, Tensor):
                    self._names[id(x)] = names
                    self._alive.append(x)
        return result

    def _note(self, func: Any, tensors: Sequence[Tensor], names: set[str], args: Sequence[Any]) -> None:
        if len(names) != 1:
            return  # of none of the inputs, or of several
        (name,) = names
        x = next(x for x in tensors if id(x) in self._names)
        others = [other for other in tensors if id(other) not in self._names]
        wanted: int | None = None
        dimension = 1 if func in _CONVOLUTIONS else -1
        if func in (F.layer_norm, F.rms_norm) and len(args) > 1:
            wanted = int(args[1][-1])
        elif others and func in _CONVOLUTIONS | _LINEAR:
            wanted = others[0].shape[1]
        elif others and func in (Tensor.matmul, Tensor.__matmul__):
            wanted = others[0].shape[-2]
        elif others and others[0].dim() == 1:  # a norm written out
            wanted = others[0].shape[0]
        if wanted is not None and x.dim() > 1 and wanted != x.shape[dimension]:
            self.misfit = name, x.shape[dimension], wanted


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, (list, tuple)) else [value]
    return found
