"""Any other model with FLUX's structure, built and called by the names in its signatures.

Where no target knows a model that was patched: its constructor's defaults, made smaller by what their names say (heads,
layers, dimensions), or the constants in its constructor; its forward's arguments by what their names say (image, text,
time, mask), as wide as its layers want them, which is found out by calling it. Its sampling loops are not run: verify
uses one of its own.

No repository is recognised by this target. It is called by `chipmunk verify` alone, in processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk.rewrite.plan import ModelFacts
from chipmunk.target import SHRINK, CannotRun, construct
from chipmunk.target import call as call
from chipmunk.target import inputs as inputs
from chipmunk.target import run_loop as run_loop
from chipmunk.target import sample as euler

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "by-signature"
API = 1

SMALL: dict[str, Any] = {SHRINK: True, "lora_rank": 4}
FULL: dict[str, Any] = {}
"""As the constructor's defaults say."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """Never: verify takes this target for a model that no other one recognises."""
    return False


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the class. Raises CannotRun for a required parameter: there is no default to go by."""
    return construct(model_class, values, NAME)


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The names of tensors in a checkpoint say nothing here; raises CannotRun."""
    raise CannotRun("the sizes of a model of no known family cannot be read from its checkpoint")


def loop_variants(function: Callable[..., Any], model_parameter: str) -> tuple[str, ...]:
    """A loop has to be known to be run; raises CannotRun."""
    raise CannotRun("what it needs beside the model is known for the families that have a target of their own")


def sample(model: nn.Module, given: Mapping[str, Any], timesteps: Sequence[float]) -> Tensor:
    """Euler steps with one call of the model each."""
    return euler(call, model, given, timesteps)
