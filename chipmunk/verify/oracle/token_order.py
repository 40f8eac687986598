"""The order of the image tokens: patches of patches, where nothing else in the call goes by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from chipmunk.config import Patchify
from chipmunk.rewrite.plan import ModelFacts


def token_order(ids: Tensor, config: Patchify) -> list[int] | None:
    """Old index of each new image token, or None where the ids (L, axes) are no grid. Reference images stay."""
    positions: list[list[float]] = ids.tolist()
    first = positions[0]
    tokens = 1
    while tokens < len(positions) and positions[tokens] != first and positions[tokens][0] == first[0]:
        tokens += 1
    width = 1
    while width < tokens and positions[width][1] == first[1]:
        width += 1
    down = positions[width][1] - first[1] if width < tokens else 1.0
    right = positions[1][2] - first[2] if width > 1 else 1.0
    for index in range(tokens):
        row, column = divmod(index, width)
        off = positions[index][1] - first[1] - row * down, positions[index][2] - first[2] - column * right
        if min(down, right) <= 0 or abs(off[0]) > 1e-3 * down or abs(off[1]) > 1e-3 * right:
            return None
    if tokens % width:
        return None
    outer, inner = config.chunk_size_1, config.chunk_size_2

    def key(index: int) -> tuple[int, ...]:
        row, column = divmod(index, width)
        return row // outer, column // outer, row % outer // inner, column % outer // inner, row, column

    return [*sorted(range(tokens), key=key), *range(tokens, len(positions))]


def restored(order: list[int], output: Any) -> Any:
    """The model's output, or the first of several, (B, L, …), with its tokens where they were before `order`."""
    first = output[0] if isinstance(output, tuple) else output
    moved_back = torch.empty_like(first)
    for new, old in enumerate(order):
        moved_back[:, old] = first[:, new]
    return (moved_back, *output[1:]) if isinstance(output, tuple) else moved_back


def others_by_token(arguments: inspect.BoundArguments, facts: ModelFacts) -> list[Tensor]:
    """What else than image and ids has a row for each image token, or masks them."""
    given = dict(arguments.arguments)
    for parameter in arguments.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    tokens = given.pop(facts.image).shape[1]
    given.pop(facts.ids or "", None)
    found = []
    for tensor in _tensors_in(list(given.values()), 6):
        if tensor.ndim >= 2 and tokens > 1:
            *rows, width = tensor.shape[1:]
            is_mask = tensor.dtype == torch.bool or tensor.shape[-2] == width
            if tokens in rows or (not rows and width == tokens) or (is_mask and width >= tokens):
                found.append(tensor)
    return found


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in lists and dictionaries, so many deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and depth:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(entry, depth - 1)
