"""FLUX.1 and FLUX.2 as their official repositories have them, and relatives with the same blocks.

Covers the official repositories from the first release to Fill, Control, Redux, Kontext and FLUX.2, their wheels, the
starter repository, and forks that kept the blocks and the names of the tensors: PuLID (identity and true CFG),
RF-Solver-Edit and FireFlow (an `info` dictionary, inversion, second-order loops), x-flux and UNO (processors),
sd-scripts (a trainer), flux-fp8-api (quantised linears), TaylorSeer (a cache of features of its own).

`recognise` is called while a repository is being patched, where nothing of it is imported. The rest is called by
`chipmunk verify` and `chipmunk bench` in processes of their own, where the repository's own classes and loops are run
by the names in their signatures.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk import target as shared
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.target import CannotRun, flux1
from chipmunk.target.official_pipeline import pipeline as pipeline

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "flux"
API = 1

SMALL, FULL = flux1.SMALL, flux1.FULL
_FULL_2: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "context_in_dim": 15360,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "num_heads": 48,
    "depth": 8,
    "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "use_guidance_embed": True,
}
"""FLUX.2-dev."""

_KLEIN: dict[str, Any] = {**_FULL_2, "use_guidance_embed": False}
MODELS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"schnell": {**FULL, "guidance_embed": False}},
    2: {
        "klein-4b": {**_KLEIN, "context_in_dim": 7680, "hidden_size": 3072, "num_heads": 24, "depth": 5}
        | {"depth_single_blocks": 20},
        "klein-9b": {**_KLEIN, "context_in_dim": 12288, "hidden_size": 4096, "num_heads": 32, "depth": 8}
        | {"depth_single_blocks": 24},
    },
}
"""Other published models, by generation and name."""

_GIVEN = {"img", "img_ids", "txt", "txt_ids", "vec", "timesteps", "guidance"}
_FORWARD = {"img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance", "info", "x", "x_ids", "ctx", "ctx_ids"}
_NEGATIVE = {"neg_txt", "neg_txt_ids", "neg_vec"}
_LOOP = _GIVEN | _NEGATIVE | {"inverse", "info"}
_TAYLOR = {"interval": 3, "max_order": 1, "first_enhance": 3}
"""What TaylorSeer's loop reads from its `**kwargs`: a computed step in three."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model whose image tokens and positions have FLUX's names, and whose joint attention was found.

    Where tokens keep their order, no facts say what positions are called: the model's file does.
    """
    names = {"img": "img_ids", "x": "x_ids"}
    for model in models:
        ids = names.get(model.image, "?")
        is_named = model.ids == ids or (model.ids is None and ids.encode() in files.get(model.file, b""))
        if is_named and model.forward == "forward" and model.double_block.attention:
            return True
    return False


# Building the model.


def prepare(load: Callable[[str], Any], model_file: str, device: str) -> None:
    """Called before the model's file is imported. A torch for CPUs passes for one that has CUDA: there are files that
    ask for a version of it when they are imported, whatever they are used for."""
    import torch

    if torch.version.cuda is None:
        torch.version.cuda = "12.8"


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the repository's class, its constructor filled from `values` (`SMALL`, `FULL`) by parameter name.

    The parameters may be spelled out or gathered in a dataclass or a pydantic model (`params: FluxParams`), which may
    be a field of another one. A LoRA wrapper around the model is built with a small rank, in the default dtype where
    the constructor takes a dtype. Raises CannotRun where a required parameter is unknown.
    """
    return shared.construct(model_class, {"lora_rank": 4, **values}, NAME)


def named(model_class: type[nn.Module], name: str | None) -> dict[str, Any]:
    """Constructor arguments of a published model of this class; without a name of the largest.

    FLUX.2 has no pooled text. Raises CannotRun where the name is none of `MODELS`.
    """
    taken = shared.parameter_names(model_class)
    generation = 1 if "vec_in_dim" in taken or not {"hidden_size", "depth"} <= taken else 2
    if name is None:
        return FULL if generation == 1 else _FULL_2
    if name not in MODELS[generation]:
        known = tuple(MODELS[generation])
        kinds = f"it knows, of FLUX.{generation}: {', '.join(known)}; without a name it is dev"
        raise CannotRun(f"target '{NAME}' knows no model '{name}' of {model_class.__name__} ({kinds})", known)
    return MODELS[generation][name]


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Constructor arguments of the model that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of FLUX.
    """

    found = flux1.values_of(shapes)
    if "vec_in_dim" not in found:
        raise CannotRun("the checkpoint has no tensor 'vector_in.in_layer.weight': it is not one of FLUX.1")
    return found


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Any]:
    """Random arguments of one image: `height` x `width` tokens in row-major order, drawn on the CPU by `generator`.

    Returns `img` (batch, tokens, channels of the output), `img_ids`, `txt`, `txt_ids`, and for FLUX.1 `vec`, on the
    model's device in its dtype (ids in float32, with a column for each axis); with `reference` also the tokens of a
    smaller reference image, `img_cond_seq` and `img_cond_seq_ids`, and the same as lists, `ref_img` and `ref_img_ids`;
    where the model takes more channels than it returns, the rest as `img_cond`; TaylorSeer's caches as `state`.
    Raises CannotRun where a layer does not tell its width.
    """
    import torch

    (in_channels, _), (_, out_channels) = shared.widths(model, "img_in"), shared.widths(model, "final_layer.linear")
    text, _ = shared.widths(model, "txt_in")
    first = itertools.chain(model.get_submodule("img_in").parameters(), model.parameters())
    like = next(parameter for parameter in first if parameter.is_floating_point())
    axes = len(getattr(getattr(model, "pe_embedder", None), "axes_dim", "123"))

    noise = shared.random_tensors(like, generator)
    given: dict[str, Any] = {
        "img": noise(batch, height * width, out_channels),
        "img_ids": _grid(batch, height, width, 0, axes).to(like.device),
        "txt": noise(batch, text_tokens, text),
        "txt_ids": torch.zeros(batch, text_tokens, axes, device=like.device),
    }
    if axes == 4:
        given["txt_ids"][:, :, 3] = torch.arange(text_tokens)
    if hasattr(model, "vector_in"):
        given["vec"] = noise(batch, shared.widths(model, "vector_in.in_layer")[0])
    if in_channels > out_channels:
        given["img_cond"] = noise(batch, height * width, in_channels - out_channels)
    if reference:
        given["img_cond_seq"] = noise(batch, (height - 2) * (width - 1), out_channels)
        given["img_cond_seq_ids"] = _grid(batch, height - 2, width - 1, 1, axes).to(like.device)
        given["ref_img"], given["ref_img_ids"] = [given["img_cond_seq"]], [given["img_cond_seq_ids"]]
    state = _own_cache(model)
    return given if state is None else {**given, "state": state}


def _grid(batch: int, height: int, width: int, image: int, axes: int) -> Tensor:
    return shared.grid(height, width, image, axes).repeat(batch, 1, 1)


def _own_cache(model: nn.Module) -> Any:
    """What TaylorSeer's model keeps in its arguments from call to call: every step a computed one. None elsewhere."""
    decide = getattr(sys.modules[type(model).__module__], "cal_type", None)
    if decide is None:
        return None
    package = importlib.import_module(decide.__module__.rpartition(".")[0])
    cache, current = package.cache_init([1.0, 0.0], _TAYLOR)
    return {"cache_dic": cache | {"fresh_threshold": 1}, "current": current | {"step": 0, "num_steps": 1000}}


def call(
    call_model: Callable[..., Any],
    model: nn.Module,
    given: Mapping[str, Any],
    time: float,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the model, through `call_model` (the model or a call slot): velocity (batch, tokens, channels).

    `extra`: arguments of the model's forward that this target does not know of.
    """
    import torch

    forward = inspect.signature(model.forward).parameters
    shared.refuse_unknown(f"{type(model).__name__}.forward", forward, _FORWARD | set(extra or ()), NAME)
    batch, dtype, device = given["img"].shape[0], given["img"].dtype, given["img"].device
    img = given["img"]
    if "img_cond" in given:
        img = torch.cat((img, given["img_cond"]), dim=-1)
    arguments: dict[str, Any] = {
        "img": img,
        **{name: given[name] for name in ("img_ids", "txt", "txt_ids")},
        "y": given.get("vec"),
        "timesteps": given["img"].new_full((batch,), time, dtype=dtype, device=device),
        "guidance": given["img"].new_full((batch,), 3.5, dtype=dtype, device=device),
        "info": _info(0, given),
    }
    for theirs, ours in (("x", "img"), ("x_ids", "img_ids"), ("ctx", "txt"), ("ctx_ids", "txt_ids")):
        arguments[theirs] = arguments[ours]
    arguments = {name: value for name, value in arguments.items() if name in forward} | dict(extra or {})
    state = given.get("state", {})
    result = call_model(**arguments, **state)
    if state:
        state["current"]["step"] += 1
    velocity: Tensor = result[0] if isinstance(result, tuple) else result
    return velocity


# Running the repository's own sampling loop.


def loop_variants(function: Callable[..., Any], model_parameter: str) -> tuple[str, ...]:
    """The ways in which `run_loop` can run this loop.

    `plain`; `cfg`, a second call of the model from a later step on; `reference`, with the tokens of a reference image
    (Kontext); `channels`, with more channels in than out (Fill, Control); `inversion`, to noise and back.
    Raises CannotRun where a required parameter is unknown.
    """
    parameters = inspect.signature(function).parameters
    shared.refuse_unknown(function.__name__, parameters, _LOOP | {model_parameter}, NAME)
    if "inverse" in parameters:
        return ("inversion",)
    if any(parameter.name in _NEGATIVE and parameter.default is parameter.empty for parameter in parameters.values()):
        return ("cfg",)
    ways = (
        ("cfg", "neg_txt"),
        ("cfg", "neg_cond"),
        ("reference", "img_cond_seq"),
        ("reference", "ref_img"),
        ("channels", "img_cond"),
    )
    return ("plain", *(way for way, needs in ways if needs in parameters))


def run_loop(
    function: Callable[..., Any],
    model_parameter: str,
    model: nn.Module,
    given: Mapping[str, Any],
    timesteps: Sequence[float],
    variant: str = "plain",
) -> Tensor:
    """Run the repository's sampling loop from noise (`timesteps` fall from 1 to 0); returns the last latents.

    For `cfg`, `given` also holds the other prompt as `neg_txt`, `neg_txt_ids` and `neg_vec`.
    """
    accepted = {name: True for name in (*inspect.signature(function).parameters, *_read_from_keywords(function))}
    arguments: dict[str, Any] = {
        "guidance": 3.5,
        model_parameter: model,
        **given,
        "timesteps": list(timesteps),
        **_TAYLOR,
    }
    if variant != "channels":
        arguments.pop("img_cond", None)
    if variant == "cfg":
        arguments |= {"true_cfg": 2.0, "true_gs": 2.0, "cfg_scale": 2.0, "timestep_to_start_cfg": 2}
        arguments["neg_cond"] = (2.0, given.get("neg_vec"), given["neg_txt"], None)
    if variant == "inversion":
        arguments["info"] = _info(2, given)
        arguments["img"] = _latents(function(**_accepted(arguments | {"inverse": True}, accepted)))
        arguments["inverse"] = False
    return _latents(function(**_accepted(arguments, accepted)))


def _read_from_keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """What TaylorSeer's loop takes out of its `**kwargs` by name."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    constants = function.__code__.co_consts
    has_keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    return tuple(name for name in _TAYLOR if has_keywords and name in constants)


def _accepted(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in parameters}


def _latents(result: Any) -> Tensor:
    latents: Tensor = result[0] if isinstance(result, tuple) else result
    return latents


def _info(inject_steps: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What RF-Solver-Edit and FireFlow carry through the model: which features to keep and to put back."""
    # putting them back is written for a GPU (`.cuda()`)
    strategy = "replace_v" if given["img"].is_cuda else ""
    return {
        "inject_step": inject_steps,
        "inject": False,
        "inverse": False,
        "second_order": False,
        "t": 0.0,
        "id": 0,
        "type": "double",
        "feature": {},
        "start_layer_index": 0,
        "end_layer_index": 37,
        "reuse_v": False,
        "editing_strategy": strategy,
        "qkv_ratio": [1.0, 1.0, 1.0],
    }
