"""Shapes and random tensors, as `inputs` and `values_of` of a target need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from chipmunk.target.signature import CannotRun

if TYPE_CHECKING:
    from torch import Tensor, nn


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter, by name: what `values_of` reads."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def depth(names: Iterable[str], blocks: str) -> int:
    """How many blocks the list `blocks` has, by the names of their tensors (`double_blocks.0.img_attn.qkv.weight`)."""
    prefix = f"{blocks}."
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)]
    return 1 + max(numbers, default=-1)


def widths(model: nn.Module, name: str) -> tuple[int, int]:
    """How wide the input and the output of the linear layer called `name` are, wrapped in a LoRA or quantised as it be.

    Its weight tells, else the layer itself, else the largest matrix in it. Raises CannotRun where none of them does.
    """
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError as error:
        raise CannotRun(f"{type(model).__name__} has no layer '{name}'") from error
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is not None and weight.dim() == 2:
        return weight.shape[1], weight.shape[0]
    told = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(told[0], int) and isinstance(told[1], int):
        return told[0], told[1]
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
    if not matrices:
        kind = type(layer).__name__
        raise CannotRun(f"the layer '{name}', a {kind}, does not tell how wide its input and output are")
    base = max(matrices, key=lambda matrix: matrix.numel())  # next to it, a LoRA's are thin
    return base.shape[1], base.shape[0]


def random_tensors(like: Tensor, generator: Any) -> Callable[..., Tensor]:
    """`noise(*shape)`: normal numbers that `generator` draws on the CPU, on the device and in the dtype of `like`."""
    import torch

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    return noise


def grid(height: int, width: int, image: int, axes: int) -> Tensor:
    """Positions (height · width, axes) of an image's tokens in row-major order, float32.

    The columns hold the number of the image, the row and the column, and 0 where there is a fourth; with two axes only
    row and column.
    """
    import torch

    ids = torch.cartesian_prod(torch.tensor([float(image)]), torch.arange(float(height)), torch.arange(float(width)))
    return ids[:, 3 - axes :] if axes < 3 else torch.nn.functional.pad(ids, (0, axes - 3))
