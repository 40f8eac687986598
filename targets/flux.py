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

import ast
import dataclasses
import enum
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
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


class CannotRun(Exception):
    """This target does not know how to build or call what it found; the message says what and why."""


def recognise(models: Sequence[ModelFacts], files: Mapping[str, bytes]) -> bool:
    """A model whose image tokens and positions have FLUX's names, and whose joint attention was found."""
    names = {("img", "img_ids"), ("x", "x_ids")}
    return any(
        (model.image, model.ids) in names and model.forward == "forward" and model.double_block.attention
        for model in models
    )


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
    import torch

    arguments: dict[str, Any] = {}
    for name, (parameter, hint) in _parameters(model_class).items():
        if name in values:
            arguments[name] = values[name]
        elif _is_record(hint):
            arguments[name] = _filled(hint, values)
        elif hint is torch.dtype:
            arguments[name] = torch.get_default_dtype()
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
        hints = _hints(constructor)
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in named:
            found.setdefault(parameter.name, (parameter, hints.get(parameter.name)))
        if len(named) == len(parameters):
            break
    return found


def _hints(constructor: Any) -> dict[str, Any]:
    """Types of the parameters, also of such as are imported for type checkers alone."""
    module = sys.modules[constructor.__module__]
    known: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(constructor, localns=known)
        except NameError as missing:
            name = missing.name or ""
            known[name] = _imported_for_types(module, name)


def _imported_for_types(module: ModuleType, name: str) -> Any:
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            found = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            return getattr(found, next(alias.name for alias in node.names if (alias.asname or alias.name) == name))
    return Any


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields"))


def _filled(record: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass or pydantic model, in which fields that are not known keep their defaults."""
    given = {}
    for name, (hint, default) in _fields(record).items():
        if name in values:
            # as many axes of positions as the class has: three in FLUX.1, four in FLUX.2
            is_wider = name == "axes_dim" and isinstance(default, list) and len(default) > len(values[name])
            given[name] = [sum(values[name]) // len(default)] * len(default) if is_wider else values[name]
        elif default is not _MISSING:
            continue
        elif _is_record(hint):
            # of the autoencoder, say, where it has nothing in common with the model's
            given[name] = _filled(hint, values) if set(values) & set(_fields(hint)) - {"in_channels"} else _empty(hint)
        elif type(None) in typing.get_args(hint):
            given[name] = None
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            given[name] = next(iter(hint))
        else:
            raise CannotRun(f"{record.__name__} has a field '{name}' that target '{NAME}' does not know")
    return record(**given)


def _empty(record: Any) -> Any:
    return record.model_construct() if hasattr(record, "model_construct") else object.__new__(record)


def _fields(record: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each field."""
    if not dataclasses.is_dataclass(record):
        return {name: (field.annotation, _default(field)) for name, field in record.model_fields.items()}
    types = typing.get_type_hints(record)
    return {field.name: (types[field.name], _default(field)) for field in dataclasses.fields(record)}


def _default(field: Any) -> Any:
    """Of a field of a dataclass or pydantic model; `_MISSING` if it has none."""
    if field.default_factory not in (None, dataclasses.MISSING):
        return field.default_factory()
    none = field.default is dataclasses.MISSING or getattr(field, "is_required", bool)()
    return _MISSING if none else field.default


_MISSING = object()


def named(model_class: type[nn.Module], name: str | None) -> dict[str, Any]:
    """Constructor arguments of a published model of this class; without a name of the largest.

    FLUX.2 has no pooled text. Raises CannotRun where the name is none of `MODELS`.
    """
    taken: set[str] = set()
    for parameter, (_, hint) in _parameters(model_class).items():
        fields = [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []
        taken |= {parameter, *fields, *getattr(hint, "model_fields", {})}
    generation = 1 if "vec_in_dim" in taken or not {"hidden_size", "depth"} <= taken else 2
    if name is None:
        return FULL if generation == 1 else _FULL_2
    if name not in MODELS[generation]:
        kinds = f"FLUX.{generation}: {', '.join(MODELS[generation])}"
        raise CannotRun(f"target '{NAME}' knows no model '{name}' of {model_class.__name__} (it knows, of {kinds})")
    return MODELS[generation][name]


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
) -> dict[str, Any]:
    """Random arguments of one image: `height` x `width` tokens in row-major order, drawn on the CPU by `generator`.

    Returns `img` (batch, tokens, channels of the output), `img_ids`, `txt`, `txt_ids`, and for FLUX.1 `vec`, on the
    model's device in its dtype (ids in float32, with a column for each axis); with `reference` also the tokens of a
    smaller reference image, `img_cond_seq` and `img_cond_seq_ids`, and the same as lists, `ref_img` and `ref_img_ids`;
    where the model takes more channels than it returns, the rest as `img_cond`; TaylorSeer's caches as `state`.
    """
    import torch

    weight = model.get_parameter("img_in.weight")
    out_channels = model.get_parameter("final_layer.linear.weight").shape[0]
    text = model.get_parameter("txt_in.weight").shape[1]
    axes = len(getattr(getattr(model, "pe_embedder", None), "axes_dim", "123"))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    given: dict[str, Any] = {
        "img": noise(batch, height * width, out_channels),
        "img_ids": _grid(batch, height, width, 0, axes).to(weight.device),
        "txt": noise(batch, text_tokens, text),
        "txt_ids": torch.zeros(batch, text_tokens, axes, device=weight.device),
    }
    if axes == 4:
        given["txt_ids"][:, :, 3] = torch.arange(text_tokens)
    if hasattr(model, "vector_in"):
        given["vec"] = noise(batch, model.get_parameter("vector_in.in_layer.weight").shape[1])
    if weight.shape[1] > out_channels:
        given["img_cond"] = noise(batch, height * width, weight.shape[1] - out_channels)
    if reference:
        given["img_cond_seq"] = noise(batch, (height - 2) * (width - 1), out_channels)
        given["img_cond_seq_ids"] = _grid(batch, height - 2, width - 1, 1, axes).to(weight.device)
        given["ref_img"], given["ref_img_ids"] = [given["img_cond_seq"]], [given["img_cond_seq_ids"]]
    state = _own_cache(model)
    return given if state is None else {**given, "state": state}


def _grid(batch: int, height: int, width: int, image: int, axes: int) -> Tensor:
    """Ids (batch, height · width, axes): number of the image, row, column, and 0 where there is a fourth."""
    import torch

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.full_like(rows, image), rows, columns), dim=-1).reshape(1, height * width, 3)
    ids = torch.nn.functional.pad(ids, (0, axes - 3))
    return ids.float().repeat(batch, 1, 1)


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
    _refuse_unknown(f"{type(model).__name__}.forward", forward, _FORWARD | set(extra or ()))
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
    _refuse_unknown(function.__name__, parameters, _LOOP | {model_parameter})
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


def _refuse_unknown(where: str, parameters: Mapping[str, inspect.Parameter], known: Iterable[str]) -> None:
    for parameter in parameters.values():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and parameter.name not in known:
            raise CannotRun(f"{where}() needs '{parameter.name}', which target '{NAME}' does not know")


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
