"""A small size for any model: constructor arguments made smaller by the roles that their names tell.

All widths shrink by one factor, so that those that are equal, or sum up to one another, still do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HEADS, HEAD_DIM = 2, 64
DOUBLE, SINGLE = 5, 3
"""Blocks of each kind: three after the two that stay dense."""
RATIO = 2.0
"""Width of an MLP, in widths of the model."""
_NARROW = 256
"""A width up to this stays as it is."""

_WIDTH_OF_MODEL = ("hidden_size", "hidden_dim", "inner_dim", "embed_dim", "model_dim", "d_model", "dim", "width")
_DEPTH = {"layers", "depth", "blocks"}
_COUNT = {"n", "num", "number", "of", "total"}


def shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """Smaller values for those of `values` (by name) that make a model large; the others are left out.

    A width shrinks only where the model's own is known: as `hidden_size` or the like, or as heads times their width.
    """
    numbers = {name: value for name, value in values.items() if _is_whole(value)}
    heads = [name for name in numbers if "heads" in _words(name) and not _is_width(name)]
    head_dim = next((name for name in numbers if _words(name) & {"head", "heads"} and _is_width(name)), None)
    width = next((name for name in _WIDTH_OF_MODEL if name in numbers), None)
    found: dict[str, Any] = {name: _depth(name, numbers) for name in numbers if _words(name) & _DEPTH}
    found |= {name: type(value)(RATIO) for name, value in values.items() if _is_ratio(name, value)}
    if not heads:
        return found
    if head_dim is not None:
        of_head = numbers[head_dim]
    elif width is not None:
        of_head = numbers[width] // numbers[heads[0]]
    else:
        return found
    factor = min(1.0, HEADS * HEAD_DIM / (numbers[heads[0]] * of_head))
    found |= dict.fromkeys(heads, HEADS)
    if head_dim is not None:
        found[head_dim] = HEAD_DIM
    for name, number in numbers.items():
        if name == width or (_is_width(name) and name != head_dim and number > _NARROW):
            found[name] = max(8, round(number * factor / 8) * 8)
    for name, value in values.items():
        # the axes of the rotary embedding share a head's channels
        if isinstance(value, (list, tuple)) and value and all(map(_is_whole, value)) and sum(value) == of_head:
            found[name] = type(value)(part * HEAD_DIM // of_head for part in value)
    return found


def _depth(name: str, numbers: Mapping[str, int]) -> int:
    if "single" in _words(name):
        return min(numbers[name], SINGLE)
    others = [_words(other) for other in numbers if other != name and _words(other) & _DEPTH]
    is_total = _words(name) <= _DEPTH | _COUNT and any("double" in other for other in others)
    if is_total and not any("single" in other for other in others):
        return min(numbers[name], DOUBLE + SINGLE)
    return min(numbers[name], DOUBLE)


def _words(name: str) -> set[str]:
    return set(re.split(r"[_\d]+", name.lower()))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_width(name: str) -> bool:
    return re.search(r"dim|channel|width|hidden|feature", name.lower()) is not None and not _is_ratio(name, 1)


def _is_ratio(name: str, value: Any) -> bool:
    return "ratio" in _words(name) and isinstance(value, (int, float)) and not isinstance(value, bool)
