"""DiffSynth-Studio's FLUX.1, whose work is done by a function beside the model (its FLUX.2 is like diffusers').

The function takes latents and the model among its arguments. The class has its sizes written into its constructor, so
`build` puts a small model together from the same parts. Its pipelines need encoders and a VAE: verify and bench use a
loop of their own.

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

NAME = "diffsynth"
API = 1

SMALL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 128,
    "num_heads": 2,
    "depth": 5,
    "depth_single_blocks": 3,
    "axes_dim": [8, 28, 28],
    "guidance_embed": True,
}
"""Sizes of a model that a CPU runs in milliseconds: three blocks of each kind after two dense ones."""

FULL: dict[str, Any] = {
    **SMALL,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
}
"""FLUX.1-dev."""

_CALLED = ("latents", "timestep", "prompt_emb", "pooled_prompt_emb", "guidance", "text_ids")


class CannotRun(Exception):
    """This target does not know how to build or call what it found; the message says what and why."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model that is the argument `dit` of a function, whose image are latents."""
    return any(model.receiver == "dit" and model.image == "latents" for model in models)


# Building the model.


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """A model of the class, put together from the parts that its constructor uses, in the sizes of `values`.

    Raises CannotRun where the file has no such parts.
    """
    from torch import nn

    parts = vars(sys.modules[model_class.__module__])
    width, heads = values["hidden_size"], values["num_heads"]
    model: Any = model_class.__new__(model_class)
    nn.Module.__init__(model)
    try:
        times = parts["TimestepEmbeddings"]
        model.pos_embedder = parts["RoPEEmbedding"](width, 10_000, values["axes_dim"])
        model.time_embedder = times(256, width)
        model.guidance_embedder = times(256, width) if values["guidance_embed"] else None
        model.pooled_text_embedder = nn.Sequential(
            nn.Linear(values["vec_in_dim"], width), nn.SiLU(), nn.Linear(width, width)
        )
        model.context_embedder = nn.Linear(values["context_in_dim"], width)
        model.x_embedder = nn.Linear(values["in_channels"], width)
        double, single = parts["FluxJointTransformerBlock"], parts["FluxSingleTransformerBlock"]
        model.blocks = nn.ModuleList([double(width, heads) for _ in range(values["depth"])])
        model.single_blocks = nn.ModuleList([single(width, heads) for _ in range(values["depth_single_blocks"])])
        model.final_norm_out = parts["AdaLayerNormContinuous"](width)
        model.final_proj_out = nn.Linear(width, values["out_channels"])
    except KeyError as missing:
        raise CannotRun(f"the file of {model_class.__name__} has no {missing}") from missing
    model.input_dim = values["in_channels"]
    built: nn.Module = model
    return built


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Sizes of the model that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of this FLUX.
    """

    def depth(blocks: str) -> int:
        return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(blocks + ".")), default=-1)

    try:
        width, channels = shapes["x_embedder.weight"]
        head = shapes["single_blocks.0.norm_q_a.weight"][0]
        return {
            "in_channels": channels,
            "out_channels": shapes["final_proj_out.weight"][0],
            "vec_in_dim": shapes["pooled_text_embedder.0.weight"][1],
            "context_in_dim": shapes["context_embedder.weight"][1],
            "hidden_size": width,
            "num_heads": width // head,
            "depth": depth("blocks"),
            "depth_single_blocks": depth("single_blocks"),
            "axes_dim": [head - 2 * (head * 7 // 16), head * 7 // 16, head * 7 // 16],
            "guidance_embed": any(name.startswith("guidance_embedder.") for name in shapes),
        }
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of DiffSynth's FLUX") from missing


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Tensor]:
    """Random arguments of one image of `height` x `width` tokens, drawn on the CPU by `generator`.

    Returns `img`, latents (batch, channels, 2 · height, 2 · width), `txt` (batch, tokens, channels) and `vec`, on the
    model's device in its dtype.
    """
    import torch

    found = values_of({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    weight = model.get_parameter("x_embedder.weight")

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    return {
        "img": noise(batch, found["out_channels"] // 4, 2 * height, 2 * width),
        "txt": noise(batch, text_tokens, found["context_in_dim"]),
        "vec": noise(batch, found["vec_in_dim"]),
    }


def call(
    call_model: Callable[..., Any],
    model: nn.Module,
    given: Mapping[str, Tensor],
    time: float,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the model, through `call_model` (the model or a call slot): velocity, shaped like the latents.

    `extra`: arguments of the function that this target does not know of.
    """
    forward = inspect.signature(model.forward).parameters
    missing = [name for name in _CALLED if name not in forward]
    if missing:
        raise CannotRun(f"the function of {type(model).__name__} does not take {', '.join(missing)}")
    img, txt = given["img"], given["txt"]
    velocity: Tensor = call_model(
        latents=img,
        timestep=img.new_full((len(img),), 1000 * time),
        prompt_emb=txt,
        pooled_prompt_emb=given["vec"],
        guidance=img.new_full((len(img),), 3.5),
        text_ids=img.new_zeros(*txt.shape[:2], 3),
        **(extra or {}),
    )
    return velocity


# Running a sampling loop.


def loop_variants(function: Callable[..., Any], model_parameter: str) -> tuple[str, ...]:
    """Pipelines are no functions of a model and tensors; raises CannotRun."""
    raise CannotRun("a pipeline of DiffSynth-Studio runs with its encoders and VAE alone")


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
    """What the pipeline does between noise and VAE, without guidance by a second call."""
    image = given["img"]
    for now, after in itertools.pairwise(timesteps):
        image = image + (after - now) * call(model, model, {**given, "img": image}, now)
    return image
