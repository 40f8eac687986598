"""The order of image tokens in which a group of consecutive ones is compact in the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from chipmunk import ops
from chipmunk.config import Patchify


class TokenOrder:
    """A permutation of the tokens of the first image; what follows them (reference images) keeps its place."""

    def __init__(self, order: Tensor, image_tokens: int) -> None:
        self.order = order
        """(L) int64 on the model's device: `order[i]` is the old index of new token i."""
        self.image_tokens = image_tokens
        """How many of them belong to the first image."""
        self._inverse = torch.argsort(order)

    def apply(self, x: Tensor, implementation: str) -> Tensor:
        """Image tokens (B, L, …) in the new order."""
        return ops.reorder_tokens(x, self.order, implementation)

    def apply_to_ids(self, ids: Tensor) -> Tensor:
        """Positions (L, axes) or (B, L, axes) in the new order."""
        return ids.index_select(-2, self.order.to(ids.device))

    def undo_ids(self, ids: Tensor) -> Tensor:
        """Positions (L, axes) or (B, L, axes) in the old order."""
        return ids.index_select(-2, self._inverse.to(ids.device))

    def undo(self, x: Tensor, implementation: str) -> Tensor:
        """Tokens (B, R, …), R ≥ `image_tokens`, in the old order; rows past the first image keep their place."""
        rest = torch.arange(self.image_tokens, x.shape[1], device=self._inverse.device)
        inverse = torch.cat((self._inverse[: self.image_tokens], rest))
        return ops.reorder_tokens(x, inverse, implementation)


def find_grid(ids: Tensor) -> tuple[int, int] | str:
    """Height and width of the first image's grid, from its positions; or why there is none.

    ids: (L, axes) or (B, L, axes) with at least three axes: image, row, column. The first image ends where a later row
    equals the first one again, or where column 0 differs. Its tokens must stand row by row, at even distances (1, or
    what FLUX.3 scales that to). Reads values on the host.
    """
    if ids.dim() not in (2, 3) or ids.shape[-1] < 3 or ids.shape[-2] < 2:
        return "the ids are not (tokens, axes) with three axes or more"
    host = ids.detach().to("cpu", torch.float64)
    if host.dim() == 3:
        if not bool((host == host[:1]).all()):
            return "the ids differ between batch elements"
        host = host[0]
    starts_again = (host == host[0]).all(dim=1) | (host[:, 0] != host[0, 0])
    starts_again[0] = False
    tokens = int(starts_again.int().argmax()) if bool(starts_again.any()) else host.shape[0]
    rows, columns = host[:tokens, 1] - host[0, 1], host[:tokens, 2] - host[0, 2]
    next_row = rows != 0
    width = int(next_row.int().argmax()) if bool(next_row.any()) else tokens
    index = torch.arange(tokens, device="cpu")  # whatever torch.set_default_device says
    if tokens % width or not (_is_even(rows, index // width, width) and _is_even(columns, index % width, 1)):
        return "the ids are not a grid"
    return tokens // width, width


def _is_even(positions: Tensor, number: Tensor, second: int) -> bool:
    """Whether each position (float64) is its number times the position of token `second`, rounding in float32 aside."""
    step = positions[second] if second < len(positions) and number[second] else positions.new_ones(())
    return bool(step > 0) and bool(((positions - number * step).abs() <= 1e-3 * step).all())


def find_order(ids: Tensor, tokens: int, patchify: Patchify, device: torch.device) -> tuple[TokenOrder | None, str]:
    """The order for image tokens at positions `ids`, with what to tell the user; None where none is to be changed."""
    if ids.dim() < 2 or ids.shape[-2] != tokens:
        return None, "kept: there is not one id for each image token"
    grid = find_grid(ids)
    if isinstance(grid, str):
        return None, f"kept: {grid}"
    height, width = grid
    order = patch_order(height, width, patchify.chunk_size_1, patchify.chunk_size_2)
    if bool((order == torch.arange(height * width, device="cpu")).all()):
        return None, "kept: the grid is in patch order already"
    order = torch.cat((order, torch.arange(height * width, tokens, device="cpu")))
    return TokenOrder(order.to(device), height * width), "reordered"


def patch_order(height: int, width: int, outer: int, inner: int) -> Tensor:
    """Old index of each new token: (height · width) int64.

    Tokens are sorted by outer patch, then by inner patch inside it, then by row and column; 1 turns a level off.
    """
    rows = torch.arange(height, device="cpu")[:, None].expand(height, width)
    columns = torch.arange(width, device="cpu")[None].expand(height, width)
    keys = (rows // outer, columns // outer, rows % outer // inner, columns % outer // inner, rows, columns)
    rank = torch.zeros(height, width, dtype=torch.int64, device="cpu")
    for key in keys:
        rank = rank * max(height, width) + key
    return torch.argsort(rank.flatten(), stable=True)
