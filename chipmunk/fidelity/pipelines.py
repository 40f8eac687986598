"""Pictures drawn by a pipeline of diffusers: the user's own, from a folder or a function.

The pipeline does everything itself, prompts, schedule and guidance included. Two of its parts are listened to: the
scheduler, which returns the latents of each step, and the VAE's `decode`, where the pipeline is stopped, so that
decoding is in no measurement.
"""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = (
    "a happy chipmunk with a red scarf on a meadow",
    "a portrait photograph of an old fisherman, soft light from a window",
    "a street market in the rain at night, neon signs reflected in puddles",
    "a glass teapot with green tea on a wooden table, morning light",
    "an isometric drawing of a small library with a spiral staircase",
    "a red fox asleep in fresh snow, seen from above",
    'a shop window with the words "open late" in yellow letters',
    "mountains at dawn with a lake in front, in the style of a woodcut",
)
"""Where the user gives none."""

_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"


class CannotDraw(Exception):
    """The pipeline is not one that can be drawn with; says why."""


class _AtDecoder(BaseException):
    """The loop has ended: carries what the VAE was to decode. No `Exception`, which pipelines catch and log."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def is_folder(path: Path) -> bool:
    """Whether a pipeline was saved there."""
    return (path / _INDEX).is_file() or (path / _MODULAR_INDEX).is_file()


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a folder, without the parts that are not there: large text encoders, say."""
    import diffusers

    if (folder / _INDEX).is_file():
        parts = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        absent = {name: None for name, kind in parts.items() if type(kind) is list and not (folder / name).is_dir()}
        return diffusers.DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, **absent)
    pipeline = diffusers.ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components(torch_dtype=dtype)
    return pipeline


class UserPipeline:
    """One pipeline, its transformer on the device, and the way from a prompt to a picture."""

    encodes = True
    """Whether prompts are known, if only as seeds."""
    token_size = 16
    """Pixels along one side of a token."""

    def __init__(self, pipeline: Any, model_class: type[nn.Module], device: str, text_tokens: int) -> None:
        """text_tokens: how many random ones stand for a prompt where the pipeline has no text encoder.

        Raises CannotDraw.
        """
        transformer = getattr(pipeline, "transformer", None)
        if not isinstance(transformer, model_class):
            raise CannotDraw(f"its transformer is a {type(transformer).__name__}, not a {model_class.__name__}")
        if getattr(pipeline, "scheduler", None) is None:
            raise CannotDraw("it has no scheduler")
        self.pipeline = pipeline.to(device)
        self.transformer: nn.Module = transformer.eval().requires_grad_(False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.prompts = PROMPTS
        self.decodes = getattr(pipeline, "vae", None) is not None and hasattr(pipeline, "image_processor")
        self._modular = not hasattr(pipeline, "encode_prompt")
        self._text_tokens = text_tokens
        self._encoders = [
            part
            for name in ("text_encoder", "text_encoder_2")
            if isinstance(part := getattr(pipeline, name, None), nn.Module)
        ]
        for encoder in self._encoders:
            _remember(encoder)
        self._undecoded: Tensor | None = None

    @property
    def weights(self) -> str:
        return f"of a {type(self.pipeline).__name__}"

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def cast(self, dtype: torch.dtype) -> None:
        """Draw in another dtype from now on; the VAE, which has no part in what is compared, stays in its own."""
        for part in (self.transformer, *self._encoders):
            part.to(dtype)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture, pixels, as the pipeline itself would choose."""
        side = getattr(self.pipeline, "default_sample_size", 128) * getattr(self.pipeline, "vae_scale_factor", 8)
        return side, side

    def draw(self, prompt: str, seed: int, steps: int, width: int, height: int) -> list[Tensor]:
        """The latents after each step, as the scheduler returns them: (B, tokens, channels)."""
        found: list[Tensor] = []
        given: dict[str, Any] = {
            **self._conditioning(prompt),
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            # on the CPU: the same noise on every device
            "generator": torch.Generator().manual_seed(seed),
        }
        stops = self.decodes
        if self._modular:
            given["output"] = "images" if stops else "latents"
        else:
            given["output_type"] = "pil" if stops else "latent"
        self._undecoded = None
        with _seen_steps(self.pipeline.scheduler, found), _stopped(self.pipeline.vae if stops else None):
            try:
                self.pipeline(**given)
            except _AtDecoder as reached:
                self._undecoded = reached.latents
        if not found:
            raise CannotDraw("its scheduler took no step")
        return found

    def decode(self) -> Tensor:
        """The picture that was drawn last, (B, height, width, 3) uint8 on the CPU."""
        assert self._undecoded is not None
        vae = self.pipeline.vae
        with torch.no_grad():
            pixels = vae.decode(self._undecoded.to(vae.dtype), return_dict=False)[0]
        images = self.pipeline.image_processor.postprocess(pixels.float(), output_type="np")
        return torch.from_numpy(images).mul(255).round().to(torch.uint8).contiguous()

    def _conditioning(self, prompt: str) -> dict[str, Any]:
        """The prompt, or where nothing encodes it random embeddings of which it is the seed."""
        if self._encoders:
            return {"prompt": prompt}
        config: Any = self.transformer.config
        weight = next(self.transformer.parameters())
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

        given: dict[str, Any] = {"prompt_embeds": noise(1, self._text_tokens, config.joint_attention_dim)}
        if hasattr(config, "pooled_projection_dim"):
            given["pooled_prompt_embeds"] = noise(1, config.pooled_projection_dim)
        elif self._modular or "negative_prompt_embeds" in inspect.signature(self.pipeline.__call__).parameters:
            given["negative_prompt_embeds"] = noise(1, self._text_tokens, config.joint_attention_dim)
        return given


def _remember(encoder: nn.Module) -> None:
    """Let a text encoder answer at once what it was asked before: every variant draws the same prompts."""
    answers: dict[tuple[object, ...], Any] = {}
    forward: Callable[..., Any] = encoder.forward

    def remembered(*args: Any, **kwargs: Any) -> Any:
        given = [*enumerate(args), *sorted(kwargs.items())]
        asked = tuple((name, _key(value)) for name, value in given)
        if asked not in answers:
            answers[asked] = forward(*args, **kwargs)
        return answers[asked]

    encoder.__dict__["forward"] = remembered


def _key(value: Any) -> object:
    return (value.dtype, value.shape, value.cpu().numpy().tobytes()) if isinstance(value, Tensor) else repr(value)


@contextmanager
def _seen_steps(scheduler: Any, found: list[Tensor]) -> Iterator[None]:
    """While this is open, note the latents that each step of a scheduler returns."""
    step: Callable[..., Any] = scheduler.step

    def seen(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found.append((result[0] if isinstance(result, tuple) else result.prev_sample).detach().clone())
        return result

    scheduler.step = seen
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _stopped(vae: Any) -> Iterator[None]:
    """While this is open, a call of the VAE's `decode` ends the pipeline."""
    if vae is None:
        yield
        return

    def reached(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _AtDecoder(latents.detach().clone())

    vae.decode = reached
    try:
        yield
    finally:
        del vae.decode
