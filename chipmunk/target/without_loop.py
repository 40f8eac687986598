"""A sampling loop for models whose own loops need more than a model and tensors: text encoders, a VAE, a server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Call = Callable[["Callable[..., Any]", "nn.Module", "Mapping[str, Any]", float], "Tensor"]


def run_loop(
    function: Callable[..., Any],
    model_parameter: str,
    model: nn.Module,
    given: Mapping[str, Any],
    timesteps: Sequence[float],
    variant: str = "plain",
) -> Tensor:
    """Euler steps from noise (`timesteps` fall from 1 to 0) through `function`, the target's `sample`: last latents."""
    result: Tensor = function(**{model_parameter: model}, given=given, timesteps=timesteps)
    return result


def sample(
    call: Call, model: nn.Module, given: Mapping[str, Any], timesteps: Sequence[float], counted: bool = False
) -> Tensor:
    """Euler steps with one call of the model each, by the target's `call`.

    counted: whether steps are counted as in a marked loop, where no scheduler need ask the device for the timestep.
    """
    import chipmunk

    image: Tensor = given["img"]
    steps: Any = list(itertools.pairwise(timesteps))
    for now, after in chipmunk.steps(model, steps) if counted else steps:
        image = image + (after - now) * call(model, model, {**given, "img": image}, now)
    return image
