"""FLUX.1 and its relatives with the same blocks.

Covers the official repository from its first release to Fill, Control, Redux and Kontext, its wheels, the starter
repository, and forks that kept the blocks and the names of the tensors: PuLID (identity and true CFG), RF-Solver-Edit
and FireFlow (an `info` dictionary, inversion, second-order loops).

`recognise` is called while a repository is being patched, where nothing of it is imported. The rest is called by
`chipmunk verify` and `chipmunk bench` in processes of their own, where the repository's own classes and loops are run
by the names in their signatures.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chipmunk.rewrite.plan import ModelFacts

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "flux"
API = 1

SMALL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 5,
    "depth_single_blocks": 3,
    "axes_dim": [8, 28, 28],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": True,
}
"""Constructor arguments of a model that a CPU runs in milliseconds: three blocks of each kind after two dense ones."""

FULL: dict[str, Any] = {
    **SMALL,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
}
"""FLUX.1-dev."""

_GIVEN = {"img", "img_ids", "txt", "txt_ids", "vec", "timesteps", "guidance"}
_FORWARD = {"img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance", "info"}
_LOOP = _GIVEN | {"inverse", "info"}


class CannotRun(Exception):
    """This target does not know how to build or call what it found; the message says what and why."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model whose image tokens and positions have FLUX's names, and whose joint attention was found."""
    return any(model.image == "img" and model.ids == "img_ids" and model.double_block.attention for model in models)


# Building the model.


def build(model_class: type[nn.Module], values: Mapping[str, Any]) -> nn.Module:
    """An instance of the repository's class, its constructor filled from `values` (`SMALL`, `FULL`) by parameter name.

    The parameters may be spelled out or gathered in a dataclass (`params: FluxParams`). A LoRA wrapper around the model
    is built with a small rank. Raises CannotRun where a required parameter is unknown.
    """
    arguments: dict[str, Any] = {}
    for name, (parameter, hint) in _parameters(model_class).items():
        if name in values:
            arguments[name] = values[name]
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            arguments[name] = hint(**_fields(hint, values))
        elif name == "lora_rank":
            arguments[name] = 4
        elif parameter.default is parameter.empty:
            raise CannotRun(f"{model_class.__name__}() needs '{name}', which target '{NAME}' does not know")
    return model_class(**arguments)


def _parameters(model_class: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Constructor parameters with their types; a class that passes `*args, **kwargs` on also has those of its base."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for owner in model_class.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        hints = typing.get_type_hints(constructor)
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in named:
            found.setdefault(parameter.name, (parameter, hints.get(parameter.name)))
        if len(named) == len(parameters):
            break
    return found


def _fields(record: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for field in dataclasses.fields(record):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name in values:
            given[field.name] = values[field.name]
        elif not optional:
            raise CannotRun(f"{record.__name__} has a field '{field.name}' that target '{NAME}' does not know")
    return given


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Constructor arguments of the model that a checkpoint was saved from, read from the shapes of its tensors.

    Raises CannotRun where the names are not those of FLUX.
    """

    def depth(blocks: str) -> int:
        return 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith(blocks + ".")), default=-1)

    try:
        hidden, channels = shapes["img_in.weight"]
        head = shapes["single_blocks.0.norm.query_norm.scale"][0]
        return {
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0],
            "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
            "context_in_dim": shapes["txt_in.weight"][1],
            "hidden_size": hidden,
            "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
            "num_heads": hidden // head,
            "depth": depth("double_blocks"),
            "depth_single_blocks": depth("single_blocks"),
            # the ratio of FLUX.1, where one eighth of a head belongs to the first axis
            "axes_dim": [head - 2 * (head * 7 // 16), head * 7 // 16, head * 7 // 16],
            "theta": 10_000,
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
            "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        }
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of FLUX") from missing


# Calling the model.


def inputs(
    model: nn.Module, batch: int, height: int, width: int, text_tokens: int, generator: Any, reference: bool = False
) -> dict[str, Tensor]:
    """Random arguments of one image: `height` x `width` tokens in row-major order, drawn on the CPU by `generator`.

    Returns `img` (batch, tokens, channels of the output), `img_ids`, `txt`, `txt_ids`, `vec`, on the model's device in
    its dtype (ids in float32); with `reference` also the tokens of a smaller reference image, `img_cond_seq` and
    `img_cond_seq_ids`; where the model takes more channels than it returns, the rest as `img_cond`.
    """
    import torch

    weight = model.get_parameter("img_in.weight")
    out_channels = model.get_parameter("final_layer.linear.weight").shape[0]
    text = model.get_parameter("txt_in.weight").shape[1]
    pooled = model.get_parameter("vector_in.in_layer.weight").shape[1]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    given = {
        "img": noise(batch, height * width, out_channels),
        "img_ids": _grid(batch, height, width, 0).to(weight.device),
        "txt": noise(batch, text_tokens, text),
        "txt_ids": torch.zeros(batch, text_tokens, 3, device=weight.device),
        "vec": noise(batch, pooled),
    }
    if weight.shape[1] > out_channels:
        given["img_cond"] = noise(batch, height * width, weight.shape[1] - out_channels)
    if reference:
        given["img_cond_seq"] = noise(batch, (height - 2) * (width - 1), out_channels)
        given["img_cond_seq_ids"] = _grid(batch, height - 2, width - 1, 1).to(weight.device)
    return given


def _grid(batch: int, height: int, width: int, image: int) -> Tensor:
    """Ids (batch, height · width, 3): number of the image, row, column."""
    import torch

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.full_like(rows, image), rows, columns), dim=-1).reshape(1, height * width, 3)
    return ids.float().repeat(batch, 1, 1)


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

    forward = inspect.signature(model.forward).parameters
    _refuse_unknown(f"{type(model).__name__}.forward", forward, _FORWARD | set(extra or ()))
    batch, dtype, device = given["img"].shape[0], given["img"].dtype, given["img"].device
    img = given["img"]
    if "img_cond" in given:
        img = torch.cat((img, given["img_cond"]), dim=-1)
    arguments: dict[str, Any] = {
        "img": img,
        **{name: given[name] for name in ("img_ids", "txt", "txt_ids")},
        "y": given["vec"],
        "timesteps": given["img"].new_full((batch,), time, dtype=dtype, device=device),
        "guidance": given["img"].new_full((batch,), 3.5, dtype=dtype, device=device),
        "info": _info(0, given),
        **(extra or {}),
    }
    result = call_model(**{name: value for name, value in arguments.items() if name in forward})
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
    _refuse_unknown(function.__name__, parameters, _LOOP | {model_parameter})
    if "inverse" in parameters:
        return ("inversion",)
    ways = {"cfg": {"true_cfg", "neg_txt"}, "reference": {"img_cond_seq"}, "channels": {"img_cond"}}
    return ("plain", *(way for way, needs in ways.items() if needs <= set(parameters)))


def run_loop(
    function: Callable[..., Any],
    model_parameter: str,
    model: nn.Module,
    given: Mapping[str, Tensor],
    timesteps: Sequence[float],
    variant: str = "plain",
) -> Tensor:
    """Run the repository's sampling loop from noise (`timesteps` fall from 1 to 0); returns the last latents.

    For `cfg`, `given` also holds the other prompt as `neg_txt`, `neg_txt_ids` and `neg_vec`.
    """
    accepted = inspect.signature(function).parameters
    arguments: dict[str, Any] = {"guidance": 3.5, model_parameter: model, **given, "timesteps": list(timesteps)}
    if variant != "channels":
        arguments.pop("img_cond", None)
    if variant == "cfg":
        arguments |= {"true_cfg": 2.0, "timestep_to_start_cfg": 2}
    if variant == "inversion":
        arguments["info"] = _info(2, given)
        arguments["img"] = _latents(function(**_accepted(arguments | {"inverse": True}, accepted)))
        arguments["inverse"] = False
    return _latents(function(**_accepted(arguments, accepted)))


def _accepted(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in parameters}


def _latents(result: Any) -> Tensor:
    latents: Tensor = result[0] if isinstance(result, tuple) else result
    return latents


def _refuse_unknown(where: str, parameters: Mapping[str, inspect.Parameter], known: Iterable[str]) -> None:
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in known:
            raise CannotRun(f"{where}() needs '{parameter.name}', which target '{NAME}' does not know")


def _info(inject_steps: int, given: Mapping[str, Tensor]) -> dict[str, Any]:
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


# Drawing pictures, for `chipmunk fidelity`.


class Pipeline:
    """What the repository itself draws pictures with: its text encoders, its schedule, its decoder.

    load: imports a file of the repository. Raises CannotRun where a part is asked for that this repository has not.
    """

    def __init__(self, load: Callable[[str], Any], model_file: str, autoencoder: str | None = None) -> None:
        folder = model_file.rpartition("/")[0]
        self._util, self._sampling = load(f"{folder}/util.py"), load(f"{folder}/sampling.py")
        self.name: str = next(iter(self._util.configs))
        self._autoencoder = autoencoder
        encoders = inspect.signature(self._util.load_t5).parameters
        self.encodes = list(encoders) == ["name"]
        """Whether prompts can be encoded without a download, and the model has weights of its own: the starter."""
        self.decodes = self.encodes or autoencoder is not None
        spec = self._util.configs[self.name]
        self.prompts: tuple[str, ...] = tuple(getattr(self._util, "example_prompts", ())) or _PROMPTS
        self.size: tuple[int, int] = (getattr(spec, "width", 512), getattr(spec, "height", 512))
        """Width and height, pixels."""
        self.token_size: int = getattr(spec, "token_size", 16)
        """Pixels along one side of a token."""
        self._guidance: float = getattr(spec, "guidance", 3.5)
        self._sized = {"token_size": self.token_size} if hasattr(spec, "token_size") else {}
        self.weights = "random" if getattr(spec, "ckpt_path", None) is None else "of the repository"

    def model(self, device: str) -> nn.Module:
        """The repository's model with the weights that it comes with, in float32."""
        model: nn.Module = self._util.load_flow_model(self.name, device=device)
        return model

    def inputs(self, model: nn.Module, prompt: str, seed: int, width: int, height: int) -> dict[str, Any]:
        """Arguments of the sampling loop for a picture of `width` x `height` pixels."""
        weight = model.get_parameter("img_in.weight")
        given = (height, width, weight.device, weight.dtype)
        noise = self._sampling.get_noise(1, *given, seed=seed, **self._sized)
        encoders = (self._util.load_t5(self.name), self._util.load_clip(self.name))
        arguments: dict[str, Any] = self._sampling.prepare(*encoders, noise, prompt=prompt)
        return {**arguments, "guidance": self._guidance}

    def times(self, steps: int, tokens: int) -> list[float]:
        """From 1 (noise) to 0 (picture)."""
        times: list[float] = self._sampling.get_schedule(steps, tokens)
        return times

    def decode(self, latents: Tensor, width: int, height: int) -> Tensor:
        """Pictures (batch, height, width, 3) uint8, on the CPU, of the loop's latents."""
        import torch

        if self._autoencoder is None:
            autoencoder = self._util.load_ae(self.name, device=latents.device)
        else:
            from safetensors.torch import load_file

            params = self._util.configs[self.name].ae_params
            autoencoder = self._util.AutoEncoder(params)
            autoencoder.load_state_dict(load_file(self._autoencoder), strict=True)
            autoencoder = autoencoder.to(latents.device).eval()
        with torch.no_grad():
            unpacked = self._sampling.unpack(latents.float(), height, width, **self._sized)
            pixels = autoencoder.decode(unpacked).float()
        levels: Tensor = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu()


_PROMPTS = (
    "a happy chipmunk with a red scarf on a meadow",
    "a white boat on the sea with hills at night clear sky the moon in the middle",
    "a big blue ball and a small yellow cube and a big red vase on a wooden table before a grey wall",
    "a sleepy fox with a blue scarf and glasses in the snow",
    "a big red house on the left and two pine trees on a meadow with mountains by day cloudy sky",
    "two big striped orange fish swimming left in the clear sea with seaweed and bubbles",
    "three green apples on a checked table before a striped pink wall",
    "a photograph of a cat",
)
"""In the words that the starter's model was trained with."""


def pipeline(load: Callable[[str], Any], model_file: str, autoencoder: str | None = None) -> Pipeline | None:
    """The repository's own way from a prompt to a picture; None where its files are not those of FLUX.

    autoencoder: a checkpoint of the user's own, to decode with.
    """
    try:
        found = Pipeline(load, model_file, autoencoder)
    except Exception:  # another fork's util.py: whatever its import needs or its names are, latents can be compared
        if autoencoder is not None:
            raise
        return None
    return found
