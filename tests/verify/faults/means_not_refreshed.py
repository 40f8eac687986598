"""Block means stay those of the last full step, whatever was computed anew since."""

from typing import Any

from chipmunk.runtime.layer_state import LayerState


def set_means(self: LayerState, value: Any) -> None:
    if self.mlp != "sparse":
        self.__dict__["means"] = value


LayerState.means = property(lambda self: self.__dict__.get("means"), set_means)  # type: ignore[assignment]
