"""Random keys and neurons are the same at every step of every layer."""

from typing import Any

from chipmunk import ops


def select_columns(scores: Any, seed: Any, *rest: Any) -> Any:
    return columns(scores, seed * 0, *rest)


def select_neurons(new: Any, means: Any, seed: Any, *rest: Any) -> Any:
    return neurons(new, means, seed * 0, *rest)


columns, neurons = ops.select_columns, ops.select_neurons
ops.select_columns, ops.select_neurons = select_columns, select_neurons
