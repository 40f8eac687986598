"""Calling a model of any family: arguments by the names of its forward's parameters, shapes by asking the model.

What a parameter is for, its name tells (`encoder_hidden_states`, `txt`, `context`: text). How wide its tensor has to
be, the model tells: `probe` calls it with tensors of some width, sees which layer refuses which of them, and mends it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from chipmunk.target.signature import CannotRun, is_required
from chipmunk.target.tensors import grid, random_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT = frozenset({"txt", "text", "ctx", "context", "encoder", "prompt", "caption", "byt5", "t5"})
IMAGE = frozenset({"img", "image", "x", "hidden", "latents", "latent", "sample", "noisy"})
TIME = frozenset({"timestep", "timesteps", "time", "t", "sigma", "sigmas"})
POOLED = frozenset({"pooled", "y", "vec", "vector"})

TRIAL = (2, 4, 6, 5)
"""Batch, height, width in tokens, and text tokens of the calls that ask the model for widths."""


@dataclass(frozen=True)
class Signature:
    """How a model is called: its forward's parameters by what they are for, and how wide their tensors are."""

    roles: Mapping[str, str]
    """Parameter → `image`, `image ids`, `text`, `text ids`, `pooled`, `mask`, `time`, `guidance`."""
    dimensions: int
    """Of the image: 3 for tokens (B, N, C), 4 for latents (B, C, H, W), 5 with frames (B, C, 1, H, W)."""
    patch: int = 1
    """Rows and columns of latents that make one token."""
    axes: int = 3
    """Columns of the positions."""
    ids_by_image: bool = False
    """Whether positions are given for each image of the batch, (B, N, axes); else (N, axes)."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Channels of the tensors, by parameter."""
    outputs: int = 0
    """Channels of what comes out; where more go in, the others are a condition beside the image."""

    def named(self, role: str) -> list[str]:
        return [name for name, its in self.roles.items() if its == role]

    @property
    def image(self) -> str:
        return self.named("image")[0]

    @property
    def prompt(self) -> str | None:
        """The parameter of the text; others of that kind are of further encoders."""
        return next(iter(self.named("text")), None)


_KNOWN: WeakKeyDictionary[nn.Module, Signature] = WeakKeyDictionary()


def inputs(
    model: nn.Module,
    batch: int,
    height: int,
    width: int,
    text_tokens: int,
    generator: Any,
    reference: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Random arguments of one image of `height` x `width` tokens, drawn on the CPU by `generator`.

    Returns `img` (tokens or latents, with the channels that come out), `txt`, `vec` where there is a pooled prompt,
    `img_cond` where more channels go in than come out, and the others by the names of forward's parameters; on the
    model's device in its dtype, positions in float32 and masks (of ones) boolean. `extra`: arguments of
    forward that no name tells, needed to ask the model for widths. Raises CannotRun.
    """
    return _tensors(signature_of(model, extra), model, batch, height, width, text_tokens, generator)


def call(
    call_model: Callable[..., Any],
    model: nn.Module,
    given: Mapping[str, Any],
    time: float,
    extra: Mapping[str, Any] | None = None,
) -> Tensor:
    """One call of the model, through `call_model` (the model or a call slot): velocity, shaped like `img`.

    `extra`: arguments of the model's forward that no name tells. Raises CannotRun.
    """
    velocity = _first(call_model(**_arguments(signature_of(model, extra), model, given, time, extra)))
    return velocity[:, : given["img"].shape[1]]


def signature_of(model: nn.Module, extra: Mapping[str, Any] | None = None) -> Signature:
    """How the model is called, found out at its first call. Raises CannotRun."""
    if model not in _KNOWN:
        _KNOWN[model] = probe(model, extra)
    return _KNOWN[model]


# What the names tell.


def roles_of(parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """What each of forward's parameters is for; those that no name tells are left out."""
    roles: dict[str, str] = {}
    for name, parameter in parameters.items():
        role = _role(name)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or role is None:
            continue
        if role != "text" and role != "mask" and role in roles.values():
            continue  # the first one is it; a second one is of another image or time
        roles[name] = role
    return roles


def _role(name: str) -> str | None:
    words = set(re.split(r"[_\d]+", name.lower())) - {""}
    of_text = bool(words & TEXT)
    if "ids" in words:
        return "text ids" if of_text else "image ids" if words & IMAGE else None
    if words & {"kwargs", "samples", "options", "controlnet", "cache"}:
        return None
    if "mask" in words or "masks" in words:
        return "mask" if of_text or "attention" in words else None
    if words & POOLED:
        return "pooled"
    if of_text:
        return "text"
    if "guidance" in words:
        return "guidance"
    if words <= TIME:
        return "time"
    return "image" if words & IMAGE else None


def _variants(parameters: Mapping[str, inspect.Parameter]) -> Iterator[dict[str, str]]:
    """Roles with more and less of what forward can do without: guidance, masks, texts of further encoders."""
    roles = roles_of(parameters)
    texts = [name for name, role in roles.items() if role == "text"]
    optional = {name for name in roles if not is_required(parameters[name])}
    more = {name for name in optional if roles[name] == "mask"} | (optional & set(texts[1:]))
    guidance = {name for name in optional if roles[name] == "guidance"}
    seen = []
    for without in (more, more | guidance, set(), guidance):
        if without not in seen:
            seen.append(without)
            yield {name: role for name, role in roles.items() if name not in without}


# What the model tells.


def probe(model: nn.Module, extra: Mapping[str, Any] | None = None) -> Signature:
    """How the model is called, by calling it. Raises CannotRun, with what each kind of image failed with."""
    import torch

    parameters = inspect.signature(model.forward).parameters
    roles = roles_of(parameters)
    for parameter in parameters.values():
        if is_required(parameter) and parameter.name not in {*roles, *(extra or {})}:
            raise CannotRun(
                f"{type(model).__name__}.forward() needs '{parameter.name}', and its name does not tell what it is"
            )
    if "image" not in roles.values():
        raise CannotRun(f"no parameter of {type(model).__name__}.forward() has the name of an image")
    patch, axes = _patch_of(model), _axes_of(model)
    failed: dict[int, str] = {}
    # positions belong to tokens; without them an image is a grid
    has_ids = "image ids" in roles.values()
    for dimensions in (3,) if has_ids else (4, 5, 3):
        for variant, by_image in itertools.product(_variants(parameters), (False, True) if has_ids else (False,)):
            signature = Signature(variant, dimensions, patch, axes, by_image)
            try:
                with torch.no_grad():
                    return _with_widths(signature, model, extra)
            except Exception as error:
                says = str(error).partition("\n")[0]
                failed.setdefault(dimensions, f"{_DIMENSIONS[dimensions]}: {type(error).__name__}: {says}")
    why = "; ".join(failed.values())
    raise CannotRun(f"{type(model).__name__} cannot be called by the names of its arguments ({why})")


_DIMENSIONS = {3: "with image tokens", 4: "with latents", 5: "with latents of one frame"}


def _with_widths(signature: Signature, model: nn.Module, extra: Mapping[str, Any] | None) -> Signature:
    """The signature with widths that the model takes. Raises what the model raises for another reason."""
    import torch

    from chipmunk.target.misfits import Watch

    widths = {name: 8 for name, role in signature.roles.items() if role in ("image", "text", "pooled")}
    for _ in range(4 * len(widths)):
        signature = replace(signature, widths=widths, outputs=widths[signature.image])
        given = _tensors(signature, model, *TRIAL, torch.Generator().manual_seed(0))
        arguments = _arguments(signature, model, given, 0.5, extra)
        watch = Watch({name: arguments[name] for name in widths})
        try:
            with watch:
                output = _first(model(**arguments))
        except Exception:
            if watch.misfit is None:
                raise
            name, got, wanted = watch.misfit
            if widths[name] * wanted % got:
                raise
            widths[name] = widths[name] * wanted // got
            continue
        return replace(signature, outputs=_channels_out(signature, arguments[signature.image], output))
    raise CannotRun(f"{type(model).__name__}: no widths of its inputs were found that it takes")


def _channels_out(signature: Signature, image: Tensor, output: Tensor) -> int:
    if output.dim() != image.dim():
        raise CannotRun(f"it returns {tuple(output.shape)} for an image of {tuple(image.shape)}")
    last = signature.dimensions == 3
    channels = output.shape[-1] if last else output.shape[1]
    wanted = (*image.shape[:-1], channels) if last else (image.shape[0], channels, *image.shape[2:])
    if tuple(output.shape) != tuple(wanted) or channels > signature.widths[signature.image]:
        raise CannotRun(f"it returns {tuple(output.shape)} for an image of {tuple(image.shape)}")
    return channels


def _patch_of(model: nn.Module) -> int:
    """Rows and columns of latents that make one token, as the model or its configuration says; else 1."""
    for owner in (getattr(model, "config", None), model, *model.modules()):
        patch = getattr(owner, "patch_size", None)
        if isinstance(patch, (list, tuple)) and patch:
            patch = patch[-1]
        if isinstance(patch, int):
            return patch
    return 1


def _axes_of(model: nn.Module) -> int:
    """How many columns positions have: as many as the rotary embedding has axes."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "axes" in name and isinstance(value, (list, tuple)) and value:
                return len(value)
    return 3


# Tensors and arguments.


def _tensors(
    signature: Signature, model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any
) -> dict[str, Tensor]:
    import torch

    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    noise = random_tensors(like, generator)

    def image(channels: int) -> Tensor:
        if signature.dimensions == 3:
            return noise(batch, height * width, channels)
        frames = [1] * (signature.dimensions - 4)
        return noise(batch, channels, *frames, signature.patch * height, signature.patch * width)

    given = {"img": image(signature.outputs)}
    if signature.widths[signature.image] > signature.outputs:
        given["img_cond"] = image(signature.widths[signature.image] - signature.outputs)
    for name, role in signature.roles.items():
        if role == "text":
            key = "txt" if name == signature.prompt else name
            given[key] = noise(batch, text_tokens, signature.widths[name])
        elif role == "pooled":
            given["vec"] = noise(batch, signature.widths[name])
        elif role == "mask":
            given[name] = torch.ones(batch, text_tokens, dtype=torch.bool, device=like.device)
        elif role == "image ids":
            given[name] = _by_image(grid(height, width, 0, signature.axes), signature, batch).to(like.device)
        elif role == "text ids":
            ids = torch.zeros(text_tokens, signature.axes)
            if signature.axes > 3:
                ids[:, 3] = torch.arange(text_tokens)
            given[name] = _by_image(ids, signature, batch).to(like.device)
    return given


def _by_image(ids: Tensor, signature: Signature, batch: int) -> Tensor:
    return ids.repeat(batch, 1, 1) if signature.ids_by_image else ids


def _arguments(
    signature: Signature, model: nn.Module, given: Mapping[str, Any], time: float, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    import torch

    image: Tensor = given["img"]
    times = image.new_full((image.shape[0],), time)
    if "img_cond" in given:
        image = torch.cat((image, given["img_cond"]), dim=-1 if signature.dimensions == 3 else 1)
    by_role = {
        "image": image,
        "pooled": given.get("vec"),
        "time": times,
        "guidance": torch.full_like(times, 3.5),
    }
    arguments = {name: by_role.get(role, given.get(name)) for name, role in signature.roles.items()}
    if signature.prompt is not None:
        arguments[signature.prompt] = given["txt"]
    if "return_dict" in inspect.signature(model.forward).parameters:
        arguments["return_dict"] = False
    return {**arguments, **(extra or {})}


def _first(result: Any) -> Tensor:
    """The tensor of what a model returns: it alone, the first of several, or an entry `sample`."""
    while not hasattr(result, "shape"):
        result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    tensor: Tensor = result
    return tensor
