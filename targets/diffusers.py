"""FLUX.1, FLUX.2 and FLUX.3 as diffusers has them: installed, checked out, or a copy in the user's repository.

A model is known by what it calls its inputs, and its generation by the parts that it is built from, so forks and copies
under other names are covered. Relatives (Bria, Chroma, LongCat, Ovis) are built and called by the names in their
signatures. Sampling loops are pipelines' `__call__`, which need encoders and a VAE: verify and bench use one of their
own.

`recognise` is called while a repository is being patched, where nothing of it is imported. The rest is called by
`chipmunk verify` and `chipmunk bench` in processes of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk import target as shared
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.target import SHRINK, CannotRun, flux1
from chipmunk.target import run_loop as run_loop

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "diffusers"
API = 1

SMALL: dict[str, Any] = {
    SHRINK: True,
    "in_channels": 16,
    "out_channels": 16,
    "cond_in_channels": 16,
    "num_layers": 5,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "timestep_guidance_channels": 32,
    "timestep_channels": 32,
    "mlp_ratio": 2.0,
}
"""Constructor arguments of a model that a CPU runs in milliseconds: three blocks of each kind after two dense ones.

Others are made smaller too, where they are sizes; flags keep the class's own defaults.
"""

FULL: dict[str, Any] = {"guidance_embeds": True}
"""The classes' own defaults are FLUX.1-dev, FLUX.2-dev and FLUX.3."""

_KLEIN = {"timestep_guidance_channels": 256, "guidance_embeds": False, "num_layers": 5, "num_single_layers": 20}
MODELS: dict[str, dict[str, Any]] = {
    "schnell": {"pooled_projection_dim": 768, "guidance_embeds": False},
    "klein-4b": {**_KLEIN, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "klein-9b": {
        **_KLEIN,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "num_layers": 8,
        "num_single_layers": 24,
    },
}
"""Other published models, by what differs from the defaults of their class."""

_IMAGE = "hidden_states"
_CALLED = {_IMAGE, "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"}


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model whose image tokens and positions have the names that diffusers gives them.

    One of the repository's own comes before those of installed packages that its scripts load.
    """
    own = [model for model in models if not model.installed]
    return any(model.image == _IMAGE and model.ids == "img_ids" for model in own or models)


# Building the model.


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the class, its constructor filled from `values` (`SMALL`, `FULL`) by parameter name.

    The axes of the rotary embedding share the width of a head as in FLUX.1, or equally where there are four. Raises
    CannotRun where a required parameter is unknown.
    """
    parameters = inspect.signature(model_class).parameters
    given = dict(values)
    head, axes = given.get("attention_head_dim"), parameters.get("axes_dims_rope")
    if isinstance(head, int) and axes is not None and "axes_dims_rope" not in given:
        given["axes_dims_rope"] = tuple(flux1.axes_of(head)) if len(axes.default) == 3 else (head // 4,) * 4
    model = shared.construct(model_class, given, NAME)
    for name, module in model.named_modules():
        if any(part in name.split(".") for part in getattr(model, "_keep_in_fp32_modules", None) or ()):
            module.float()  # as `from_pretrained` does
    return model


def named(model_class: type[nn.Module], name: str | None) -> dict[str, Any]:
    """Constructor arguments of a published model of this class; without a name of the largest.

    Raises CannotRun where it is none of `MODELS`.
    """
    if name is None:
        return FULL
    known = [key for key, values in MODELS.items() if set(values) <= set(inspect.signature(model_class).parameters)]
    if name not in known:
        kinds = f"it knows {', '.join([*known, 'the full size without a name'])}"
        raise CannotRun(f"target '{NAME}' knows no {model_class.__name__} called '{name}': {kinds}", known)
    return MODELS[name]


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Constructor arguments of the transformer that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of diffusers.
    """

    is_flux3 = "x_embedders.image.weight" in shapes
    try:
        hidden, channels = shapes["x_embedders.image.weight" if is_flux3 else "x_embedder.weight"]
        head = shapes["single_transformer_blocks.0.attn.norm_q.weight"][0]
        found: dict[str, Any] = {
            "in_channels": channels,
            "out_channels": shapes["proj_out.weight"][0],
            "num_layers": shared.depth(shapes, "mode_blocks.image" if is_flux3 else "transformer_blocks"),
            "num_single_layers": shared.depth(shapes, "single_transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": hidden // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
        }
        if is_flux3:
            found["cond_in_channels"] = shapes["x_embedders.image_cond.weight"][1]
            found["timestep_channels"] = shapes["timestep_embedder.linear_1.weight"][1]
            found["mlp_ratio"] = shapes["single_transformer_blocks.0.ff.linear_out.weight"][1] / hidden
            found["flow_map"] = "target_timestep_embedder.linear_1.weight" in shapes
        elif "time_guidance_embed.timestep_embedder.linear_1.weight" in shapes:
            found["timestep_guidance_channels"] = shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1]
            found["mlp_ratio"] = shapes["transformer_blocks.0.ff.linear_out.weight"][1] / hidden
            found["guidance_embeds"] = "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes
        else:
            found["pooled_projection_dim"] = shapes["time_text_embed.text_embedder.linear_1.weight"][1]
            found["guidance_embeds"] = "time_text_embed.guidance_embedder.linear_1.weight" in shapes
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of diffusers' FLUX") from missing
    return found


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Tensor]:
    """Random arguments of one image: `height` x `width` tokens in row-major order, drawn on the CPU by `generator`.

    Returns `img` (batch, tokens, channels of the output), `img_ids` (tokens, axes), `txt`, `txt_ids`, and for FLUX.1
    `vec`, on the model's device in its dtype (ids in float32); where the model takes more channels than it returns, the
    rest as `img_cond`. With `reference` also the tokens of a smaller reference image, `ref` and `ref_ids`.
    """
    import torch

    if not _is_flux(model):
        return shared.inputs(model, batch, height, width, text_tokens, generator)
    found = values_of(shared.shapes_of(model))
    weight = model.get_parameter("proj_out.weight")
    axes = 3 if "pooled_projection_dim" in found else 4
    noise = shared.random_tensors(weight, generator)
    given = {
        "img": noise(batch, height * width, found["out_channels"]),
        "img_ids": shared.grid(height, width, 0, axes).to(weight.device),
        "txt": noise(batch, text_tokens, found["joint_attention_dim"]),
        "txt_ids": torch.zeros(text_tokens, axes, device=weight.device),
    }
    if axes == 4:
        given["txt_ids"][:, 3] = torch.arange(text_tokens)
    else:
        given["vec"] = noise(batch, found["pooled_projection_dim"])
    if found["in_channels"] > found["out_channels"]:
        given["img_cond"] = noise(batch, height * width, found["in_channels"] - found["out_channels"])
    if reference:
        given["ref"] = noise(batch, (height - 2) * (width - 1), found.get("cond_in_channels", found["in_channels"]))
        given["ref_ids"] = shared.grid(height - 2, width - 1, 1, axes).to(weight.device)
    return given


def _is_flux(model: nn.Module) -> bool:
    """Whether it is one of the three generations, by its parts; a relative of them is asked for what it needs."""
    embeds_pooled = hasattr(getattr(model, "time_text_embed", None), "text_embedder")
    return embeds_pooled or hasattr(model, "time_guidance_embed") or hasattr(model, "x_embedders")


def call(
    call_model: Callable[..., Any],
    model: nn.Module,
    given: Mapping[str, Tensor],
    time: float,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the model, through `call_model` (the model or a call slot): velocity (batch, tokens, channels).

    `extra`: arguments of the model's forward that this target does not know of.
    """
    import torch

    if not _is_flux(model):
        return shared.call(call_model, model, given, time, extra)
    forward = inspect.signature(model.forward).parameters
    shared.refuse_unknown(f"{type(model).__name__}.forward", forward, _CALLED | set(extra or ()), NAME)
    img = given["img"]
    if "img_cond" in given:
        img = torch.cat((img, given["img_cond"]), dim=-1)
    times = img.new_full((img.shape[0],), time)
    arguments: dict[str, Any] = {
        _IMAGE: img,
        "encoder_hidden_states": given["txt"],
        "pooled_projections": given.get("vec"),
        "timestep": times,
        "img_ids": given["img_ids"],
        "txt_ids": given["txt_ids"],
        "guidance": None if _has(model, "guidance_embeds", False) else torch.full_like(times, 3.5),
        "return_dict": False,
        **_references(model, forward, given, img),
        **(extra or {}),
    }
    if _has(model, "flow_map", True):
        arguments["target_timestep"] = torch.zeros_like(times)
    result = call_model(**{name: value for name, value in arguments.items() if name in forward})
    velocity: Tensor = result[0]
    return velocity[:, : img.shape[1]]


def _has(model: nn.Module, flag: str, value: bool) -> bool:
    """Whether the model's configuration has this flag, with this value."""
    return getattr(getattr(model, "config", None), flag, None) is value


def _references(
    model: nn.Module, forward: Mapping[str, Any], given: Mapping[str, Tensor], img: Tensor
) -> dict[str, Tensor]:
    """The arguments that hold the tokens of a reference image: beside the image's in FLUX.3, behind them elsewhere."""
    import torch

    if "ref" not in given:
        return {}
    if "image_cond_hidden_states" in forward:
        return {"image_cond_hidden_states": given["ref"], "image_cond_ids": given["ref_ids"]}
    both = torch.cat((img, given["ref"]), dim=1), torch.cat((given["img_ids"], given["ref_ids"]))
    return {_IMAGE: both[0], "img_ids": both[1]}


# Running a sampling loop.


def loop_variants(function: Callable[..., Any], model_parameter: str) -> tuple[str, ...]:
    """Pipelines are no functions of a model and tensors; raises CannotRun."""
    raise CannotRun("a pipeline of diffusers runs with its encoders and VAE alone")


def sample(model: nn.Module, given: Mapping[str, Tensor], timesteps: Sequence[float]) -> Tensor:
    """What pipelines do between noise and VAE, without guidance by a second call.

    Steps are counted as in a pipeline, whose scheduler need not ask the device for the timestep.
    """
    return shared.sample(call, model, given, timesteps, counted=True)
