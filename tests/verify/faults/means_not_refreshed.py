"""Block means stay those of the last full step, whatever was computed anew since."""

from typing import Any

from chipmunk import ops


def select_neurons(new: Any, means: Any, *rest: Any) -> Any:
    return original(new, means.clone(), *rest)


original = ops.select_neurons
ops.select_neurons = select_neurons
