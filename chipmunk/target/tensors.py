"""Shapes and random tensors, as `inputs` and `values_of` of a target need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

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
