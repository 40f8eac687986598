"""Random keys and neurons are the same at every step of every layer."""

from typing import Any

from chipmunk import ops


def select_columns(scores: Any, seed: Any, *rest: Any) -> Any:
    return original(scores, seed * 0, *rest)


original = ops.select_columns
ops.select_columns = select_columns
