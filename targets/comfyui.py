"""ComfyUI's own models (`comfy/ldm`), called as its samplers call them.

A model takes latents, cuts them into tokens itself, and does its work in a method below `forward`. FLUX and Chroma are
known by the names of their parameters; others (AuraFlow) are built and called by the names in their signatures.
Samplers are far from it, so verify and bench use a loop of their own. Layers are those of a stock workflow
(`comfy.ops`), in float32; attention is PyTorch's.

`recognise` is called while a repository is being patched, where nothing of it is imported. The rest is called by
`chipmunk verify` and `chipmunk bench` in processes of their own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk import target as shared
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.target import SHRINK, CannotRun, flux1
from chipmunk.target import run_loop as run_loop

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "comfyui"
API = 1

SMALL: dict[str, Any] = {
    SHRINK: True,
    **flux1.SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "in_dim": 64,
    "hidden_dim": 48,
    "out_dim": 128,
    "n_layers": 2,
}
"""FLUX.1's parameters, where channels are those of latents, and Chroma's: a model that a CPU runs in milliseconds."""

FULL: dict[str, Any] = {
    **flux1.FULL,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "in_dim": 64,
    "hidden_dim": 5120,
    "out_dim": 3072,
    "n_layers": 5,
}
"""FLUX.1-dev, and Chroma."""

_CALLED = {"x", "timestep", "context", "y", "guidance"}


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model of ComfyUI's own package whose work is done by a method below `forward`."""
    return any("comfy/ldm/" in f"/{model.file}" and model.forward != "forward" for model in models)


# Building the model.


def prepare(load: Callable[[str], Any], model_file: str, device: str) -> None:
    """Called before the model's file is imported: what the command line says about device and attention."""
    args = load(model_file.partition("comfy/ldm/")[0] + "comfy/cli_args.py").args
    args.use_pytorch_cross_attention = True
    args.cpu = device == "cpu"


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the class: from the one dataclass of parameters in its file, or from its constructor alone.

    Raises CannotRun where one of the parameters is unknown.
    """
    import torch

    module = sys.modules[model_class.__module__]
    layers = {"dtype": torch.float32, "operations": sys.modules["comfy.ops"].disable_weight_init}
    records = [record for name, record in vars(module).items() if name.endswith("Params") and isinstance(record, type)]
    if len(records) != 1:
        shrink = {SHRINK: True} if values.get(SHRINK) else {}
        return shared.construct(model_class, {**layers, **shrink}, NAME)
    shared.refuse_unknown(records[0].__name__, inspect.signature(records[0]).parameters, values, NAME)
    given = {name: values[name] for name in inspect.signature(records[0]).parameters if name in values}
    if "in_dim" in given:  # Chroma counts the channels of a token, FLUX those of a latent
        given |= {name: given[name] * given["patch_size"] ** 2 for name in ("in_channels", "out_channels")}
        given["out_dim"] = given["hidden_size"]
    return model_class(**layers, **given)


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Parameters of the model that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of FLUX.
    """

    found = {**flux1.values_of(shapes), "patch_size": 2}
    found |= {name: found[name] // 4 for name in ("in_channels", "out_channels")}
    try:
        if "vec_in_dim" not in found:
            found["hidden_dim"], found["in_dim"] = shapes["distilled_guidance_layer.in_proj.weight"]
            layers = [name for name in shapes if name.startswith("distilled_guidance_layer.norms.")]
            found |= {"out_dim": found["hidden_size"], "n_layers": len(layers)}
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of FLUX or Chroma") from missing
    return found


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Tensor]:
    """Random arguments of one image of `height` x `width` tokens, drawn on the CPU by `generator`.

    Returns `img`, latents (batch, channels, 2 · height, 2 · width), `txt` (batch, tokens, channels) and for FLUX `vec`,
    on the model's device in its dtype.
    """
    if not _is_flux(model):
        return shared.inputs(model, batch, height, width, text_tokens, generator)
    found = values_of(shared.shapes_of(model))
    noise = shared.random_tensors(model.get_parameter("img_in.weight"), generator)
    given = {
        "img": noise(batch, found["in_channels"], 2 * height, 2 * width),
        "txt": noise(batch, text_tokens, found["context_in_dim"]),
    }
    return {**given, "vec": noise(batch, found["vec_in_dim"])} if "vec_in_dim" in found else given


def _is_flux(model: nn.Module) -> bool:
    """Whether it is FLUX or Chroma, by its parts; another model is asked for what it needs."""
    return hasattr(model, "img_in") and hasattr(model, "double_blocks")


def call(
    call_model: Callable[..., Any],
    model: nn.Module,
    given: Mapping[str, Tensor],
    time: float,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the model, through `call_model` (the model or a call slot): velocity, shaped like the latents.

    `extra`: arguments of the model's forward that this target does not know of.
    """
    import torch

    if not _is_flux(model):
        return shared.call(call_model, model, given, time, extra)
    forward = inspect.signature(model.forward).parameters
    shared.refuse_unknown(f"{type(model).__name__}.forward", forward, _CALLED | set(extra or ()), NAME)
    times = given["img"].new_full((given["img"].shape[0],), time)
    arguments = {
        "x": given["img"],
        "timestep": times,
        "context": given["txt"],
        "y": given.get("vec"),
        "guidance": torch.full_like(times, 3.5),
    }
    velocity: Tensor = call_model(**{n: v for n, v in arguments.items() if n in forward}, **(extra or {}))
    return velocity


# Running a sampling loop.


def loop_variants(function: Callable[..., Any], model_parameter: str) -> tuple[str, ...]:
    """ComfyUI's samplers call the model through many layers; raises CannotRun."""
    raise CannotRun("a sampler of ComfyUI runs with a loaded checkpoint alone")


def sample(model: nn.Module, given: Mapping[str, Tensor], timesteps: Sequence[float]) -> Tensor:
    """What the sampler `euler` does, without guidance by a second call."""
    return shared.sample(call, model, given, timesteps)
