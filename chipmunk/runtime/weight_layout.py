"""How the second linear of an MLP is stored on a GPU: transposed, so that a neuron's weights lie side by side.

`sparse_mlp_out` gathers columns of the weight (C, F). PyTorch stores rows contiguously, which scatters a column over
memory. The parameter keeps its name, shape and identity; only the strides of its data change, so that no second copy of
the weight stays in memory. Dense products run as fast either way. Taking a state_dict gives the parameter its own
layout back until the next image: safetensors refuses any other, and a LoRA merged into a state_dict must arrive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_NARROWING = 2
"""A linear with at least this many times more inputs than outputs is taken for the second of an MLP."""


class WeightLayout:
    """Transposes weights in place; `undo` gives every one its layout back."""

    def __init__(self) -> None:
        self._hooks: weakref.WeakKeyDictionary[nn.Linear, RemovableHandle] = weakref.WeakKeyDictionary()

    def prepare(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Transpose what is on `device`, a GPU, and is not transposed yet. Cheap where nothing is to do."""
        if device.type != "cuda":
            return
        for block in blocks:
            for linear in block.modules():
                # exactly nn.Linear: a subclass may keep its weight in a form of its own
                if type(linear) is not nn.Linear or linear.in_features < _NARROWING * linear.out_features:
                    continue
                if (
                    linear.weight.device == device
                    and linear.weight.is_contiguous()
                    and _owns_its_storage(linear.weight)
                ):
                    _store(linear, transposed=True)
                    if linear not in self._hooks:
                        self._hooks[linear] = linear.register_state_dict_pre_hook(_restore)  # type: ignore[no-untyped-call]

    def undo(self) -> None:
        for linear, hook in list(self._hooks.items()):
            hook.remove()
            _store(linear, transposed=False)
        self._hooks.clear()


def _store(linear: nn.Linear, *, transposed: bool) -> None:
    # data of the other kind than the parameter could not be trained, or not be read in inference mode
    with torch.inference_mode(linear.weight.is_inference()), torch.no_grad():
        data = linear.weight.detach()
        linear.weight.data = data.t().contiguous().t() if transposed else data.contiguous()


def _owns_its_storage(weight: Tensor) -> bool:
    """Whether nothing but this weight lives in its storage, as parameters flattened into one buffer do."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _restore(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state_dict is taken: its tensors share the parameters' memory, and are to be contiguous."""
    if isinstance(module, nn.Linear) and not module.weight.is_contiguous():
        _store(module, transposed=False)
