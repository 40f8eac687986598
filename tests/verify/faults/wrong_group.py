"""Each group of rows gets the keys or neurons that were chosen for its neighbour."""

from typing import Any

from chipmunk import ops


def select_columns(*args: Any) -> Any:
    return original(*args).roll(1, dims=-2)


original = ops.select_columns
ops.select_columns = select_columns
