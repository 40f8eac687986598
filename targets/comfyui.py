"""ComfyUI's own FLUX and Chroma (`comfy/ldm`), called as its samplers call them.

The model takes latents, cuts them into tokens itself, and does its work in a method below `forward`. Samplers are far
from it, so verify and bench use a loop of their own. Layers are those of a stock workflow (`comfy.ops`), in float32;
attention is PyTorch's.

`recognise` is called while a repository is being patched, where nothing of it is imported. The rest is called by
`chipmunk verify` and `chipmunk bench` in processes of their own.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk.rewrite.plan import ModelFacts

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "comfyui"
API = 1

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 5,
    "depth_single_blocks": 3,
    "axes_dim": [8, 28, 28],
    "theta": 10_000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "in_dim": 64,
    "hidden_dim": 48,
    "out_dim": 128,
    "n_layers": 2,
}
"""Parameters of a model that a CPU runs in milliseconds: three blocks of each kind after two dense ones."""

FULL: dict[str, Any] = {
    **SMALL,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "hidden_dim": 5120,
    "out_dim": 3072,
    "n_layers": 5,
}
"""FLUX.1-dev, and Chroma."""

_CALLED = {"x", "timestep", "context", "y", "guidance"}


class CannotRun(Exception):
    """This target does not know how to build or call what it found; the message says what and why."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model of ComfyUI's own package whose work is done by a method that takes tokens and their positions."""
    return any(
        "comfy/ldm/" in f"/{model.file}" and model.ids == "img_ids" and model.forward != "forward" for model in models
    )


# Building the model.


def prepare(load: Callable[[str], Any], model_file: str, device: str) -> None:
    """Called before the model's file is imported: what the command line says about device and attention."""
    args = load(model_file.partition("comfy/ldm/")[0] + "comfy/cli_args.py").args
    args.use_pytorch_cross_attention = True
    args.cpu = device == "cpu"


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the class, with the parameters that its dataclass in the same file has.

    Raises CannotRun where one of them is unknown.
    """
    import torch

    module = sys.modules[model_class.__module__]
    operations = sys.modules["comfy.ops"].disable_weight_init
    records = [record for name, record in vars(module).items() if name.endswith("Params") and isinstance(record, type)]
    if len(records) != 1:
        raise CannotRun(f"{model_class.__name__}: its parameters are in none or several classes of {module.__name__}")
    names = list(inspect.signature(records[0]).parameters)
    unknown = sorted(set(names) - set(values))
    if unknown:
        raise CannotRun(f"{records[0].__name__} has the fields {unknown}, which target '{NAME}' does not know")
    given = {name: values[name] for name in names}
    if "in_dim" in given:  # Chroma counts the channels of a token, FLUX those of a latent
        given |= {name: given[name] * given["patch_size"] ** 2 for name in ("in_channels", "out_channels")}
        given["out_dim"] = given["hidden_size"]
    model: nn.Module = model_class(dtype=torch.float32, operations=operations, **given)
    return model


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Parameters of the model that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of FLUX.
    """

    def depth(blocks: str) -> int:
        return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(blocks + ".")), default=-1)

    try:
        hidden, channels = shapes["img_in.weight"]
        head = shapes["single_blocks.0.norm.query_norm.scale"][0]
        found: dict[str, Any] = {
            "in_channels": channels // 4,
            "out_channels": shapes["final_layer.linear.weight"][0] // 4,
            "context_in_dim": shapes["txt_in.weight"][1],
            "hidden_size": hidden,
            "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
            "num_heads": hidden // head,
            "depth": depth("double_blocks"),
            "depth_single_blocks": depth("single_blocks"),
            "axes_dim": [head - 2 * (head * 7 // 16), head * 7 // 16, head * 7 // 16],
            "theta": 10_000,
            "patch_size": 2,
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
            "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        }
        if "distilled_guidance_layer.in_proj.weight" in shapes:
            found["hidden_dim"], found["in_dim"] = shapes["distilled_guidance_layer.in_proj.weight"]
            layers = [name for name in shapes if name.startswith("distilled_guidance_layer.norms.")]
            found |= {"out_dim": hidden, "n_layers": len(layers)}
        else:
            found["vec_in_dim"] = shapes["vector_in.in_layer.weight"][1]
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of FLUX") from missing
    return found


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Tensor]:
    """Random arguments of one image of `height` x `width` tokens, drawn on the CPU by `generator`.

    Returns `img`, latents (batch, channels, 2 · height, 2 · width), `txt` (batch, tokens, channels) and for FLUX `vec`,
    on the model's device in its dtype.
    """
    import torch

    found = values_of({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    weight = model.get_parameter("img_in.weight")

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    given = {
        "img": noise(batch, found["in_channels"], 2 * height, 2 * width),
        "txt": noise(batch, text_tokens, found["context_in_dim"]),
    }
    return {**given, "vec": noise(batch, found["vec_in_dim"])} if "vec_in_dim" in found else given


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

    forward = inspect.signature(model.forward).parameters
    for parameter in forward.values():
        required = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if required and parameter.name not in _CALLED | set(extra or ()):
            raise CannotRun(f"{type(model).__name__}.forward() needs '{parameter.name}', which '{NAME}' does not know")
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


def run_loop(
    function: Callable[..., Any],
    model_parameter: str,
    model: nn.Module,
    given: Mapping[str, Tensor],
    timesteps: Sequence[float],
    variant: str = "plain",
) -> Tensor:
    """Euler steps from noise (`timesteps` fall from 1 to 0) through `function`, which is `sample`; the last latents."""
    result: Tensor = function(**{model_parameter: model}, given=given, timesteps=timesteps)
    return result


def sample(model: nn.Module, given: Mapping[str, Tensor], timesteps: Sequence[float]) -> Tensor:
    """What the sampler `euler` does, without guidance by a second call."""
    image = given["img"]
    for now, after in itertools.pairwise(timesteps):
        image = image + (after - now) * call(model, model, {**given, "img": image}, now)
    return image
