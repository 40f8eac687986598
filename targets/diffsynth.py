"""DiffSynth-Studio's FLUX.1, whose work is done by a function beside the model (its FLUX.2 is like diffusers').

The function takes latents and the model among its arguments. The class has its sizes written into its constructor, so
`build` puts a small model together from the same parts. Its pipelines need encoders and a VAE: verify and bench use a
loop of their own.

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
from chipmunk.target import CannotRun, flux1
from chipmunk.target import run_loop as run_loop

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "diffsynth"
API = 1

_SIZES = ["in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "depth"]
_SIZES += ["depth_single_blocks", "axes_dim", "guidance_embed"]

SMALL: dict[str, Any] = {name: flux1.SMALL[name] for name in _SIZES}
FULL: dict[str, Any] = {name: flux1.FULL[name] for name in _SIZES}
"""FLUX.1-dev."""

_CALLED = ("latents", "timestep", "prompt_emb", "pooled_prompt_emb", "guidance", "text_ids")


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
            "depth": shared.depth(shapes, "blocks"),
            "depth_single_blocks": shared.depth(shapes, "single_blocks"),
            "axes_dim": flux1.axes_of(head),
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
    found = values_of(shared.shapes_of(model))
    noise = shared.random_tensors(model.get_parameter("x_embedder.weight"), generator)
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


def sample(model: nn.Module, given: Mapping[str, Tensor], timesteps: Sequence[float]) -> Tensor:
    """What the pipeline does between noise and VAE, without guidance by a second call."""
    return shared.sample(call, model, given, timesteps)
