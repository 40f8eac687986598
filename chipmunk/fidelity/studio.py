"""The model, and pictures drawn with it: everything about one side that does not depend on Chipmunk."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import chipmunk
from chipmunk.fidelity import pipelines
from chipmunk.fidelity.spec import Picture, Spec
from chipmunk.rewrite.plan import LoopFacts
from chipmunk.verify import spec as verify
from chipmunk.verify.building import BuildError
from chipmunk.verify.checkout import CheckoutError
from chipmunk.verify.drawn import Drawn, counted_loops, record, unwrapped
from chipmunk.verify.subject import OtherModelError, Subject


@dataclass
class Drawing:
    """One picture, drawn."""

    latents: list[Tensor] = field(default_factory=list)
    """After each step, (B, tokens, channels); the last is the result."""
    pixels: Tensor | None = None
    """(B, H, W, 3) uint8, where latents can be decoded."""


class Studio(Subject):
    """One side's model and the repository's own way from a prompt to a picture, as far as the target knows it."""

    pipeline: Any = None
    """What the target, or the user, draws with; None where latents come from random conditioning alone."""
    _whole: pipelines.UserPipeline | None = None
    """A pipeline of diffusers, which draws by itself; `pipeline` is the same then."""

    def __init__(self, spec: Spec) -> None:
        self.order = spec
        super().__init__(
            verify.Spec(
                side=spec.side,
                root=spec.root,
                out=spec.out,
                facts=spec.facts,
                target=spec.target,
                device=spec.device,
                seed=spec.seed,
                factory=spec.factory,
                factory_folder=spec.factory_folder,
                weights=spec.weights,
            )
        )
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        if self._whole is not None:
            self.dtype = self._whole.dtype  # a function of the user's has chosen it
        else:
            self.subject_model.to(self.dtype)
        self.loop = next((entry for entry in self.loops if entry is not None), None)
        if self.facts.installed and self._whole is None:
            self.notes.append(
                "no pipeline was given (--weights FOLDER, --factory): a model alone made plain Euler steps"
            )
        elif self.loop is None and self._whole is None:
            self.notes.append("no sampling loop of the repository can be run by itself: plain Euler steps were made")
        width, height = self.pipeline.size if self.pipeline is not None else (512, 512)
        self.width, self.height = spec.width or width, spec.height or height
        self.token_size: int = 16 if self.pipeline is None else self.pipeline.token_size

    @property
    def subject_model(self) -> nn.Module:
        return self.model("model")

    def _find_subclasses(self) -> list[type[nn.Module]]:
        return []

    def _build(self, name: str) -> nn.Module:
        """The user's own weights or model; else what the repository comes with; else a small random model."""
        whole = self._user_pipeline()
        if whole is not None:
            self.pipeline = self._whole = whole
            return whole.transformer
        make = getattr(self.target, "pipeline", None)
        if make is not None:
            autoencoder = None if self.order.autoencoder is None else str(self.order.autoencoder)
            try:
                self.pipeline = make(self.checkout.load, self.facts.file, autoencoder)
            except Exception as error:
                what = autoencoder or f"what target '{self.target.NAME}' decodes with"
                raise BuildError(f"{what} cannot be used to decode: {type(error).__name__}: {error}") from error
        if self.order.factory is None and self.order.weights is None and self.pipeline and self.pipeline.encodes:
            model: nn.Module = self.pipeline.model(self.order.device)
            return model
        if self.order.factory is not None:
            return self._from_factory(self.order.factory)  # its weights are the user's: they are left alone
        return super()._build(name)

    def _user_pipeline(self) -> pipelines.UserPipeline | None:
        """The pipeline in the folder given as weights, or that a function of the user's returns."""
        order = self.order
        try:
            if order.weights is not None and order.weights.is_dir():
                if not self.facts.installed:
                    raise BuildError(f"{order.weights} is a folder: the model of this repository takes a checkpoint")
                if not pipelines.is_folder(order.weights):
                    raise BuildError(f"there is no pipeline in {order.weights}: neither of the two index files")
                made = pipelines.load(order.weights, getattr(torch, order.dtype))
            elif order.factory is not None and self.facts.installed:
                made = self._made_by(order.factory)
            else:
                return None
            if isinstance(made, (nn.Module, tuple)):
                return None  # a model, for `_from_factory`
            if order.autoencoder is not None:
                raise BuildError("--autoencoder does not go with a pipeline, which has its own")
            return pipelines.UserPipeline(made, self.model_class, order.device, order.text_tokens)
        except pipelines.CannotDraw as error:
            where = order.weights or order.factory
            raise BuildError(f"the {type(made).__name__} of {where} cannot be used: {error}") from error

    def _made_by(self, factory: str) -> Any:
        """What a function of the user's, `module:function`, returns."""
        module, _, function = factory.partition(":")
        if self.order.factory_folder is not None:
            sys.path.append(str(self.order.factory_folder))
        return getattr(importlib.import_module(module), function or "build")()

    def cast(self, dtype: torch.dtype) -> None:
        """Draw in another dtype from now on."""
        self.dtype = dtype
        if self._whole is not None:
            self._whole.cast(dtype)
        else:
            self.subject_model.to(dtype)

    @property
    def encodes(self) -> bool:
        return self.pipeline is not None and bool(self.pipeline.encodes)

    @property
    def decodes(self) -> bool:
        return self.pipeline is not None and bool(self.pipeline.decodes)

    @property
    def weights(self) -> str:
        """Whose weights these are, for the report."""
        if self.order.weights is not None:
            return self.order.weights.name
        if self._whole is not None:
            return f"{self._whole.weights} of {self.order.factory}"
        if self.order.factory is not None:
            return f"of {self.order.factory}"
        return str(self.pipeline.weights) if self.encodes else "random"

    def pictures(self) -> list[Picture]:
        """Every prompt with every seed; seed by seed."""
        known = self.pipeline.prompts if self.encodes else tuple(f"conditioning {i}" for i in range(self.order.count))
        prompts = self.order.prompts or tuple(known)[: self.order.count]
        return [Picture(prompt, seed) for seed in self.order.seeds for prompt in prompts]

    def inputs(self, picture: Picture) -> dict[str, Any]:
        """Arguments of the sampling loop: the noise by the seed, the conditioning by the prompt."""
        if self.encodes:
            found: dict[str, Any] = self.pipeline.inputs(
                self.subject_model, picture.prompt, picture.seed, self.width, self.height
            )
            return found
        size = (1, self.height // self.token_size, self.width // self.token_size, self.order.text_tokens)
        conditioning = torch.Generator().manual_seed(zlib.crc32(picture.prompt.encode()))
        given: dict[str, Tensor] = self.target.inputs(self.subject_model, *size, conditioning)
        noise = torch.Generator().manual_seed(picture.seed)
        for name, value in given.items():
            if name in ("img", self.facts.image):
                given[name] = torch.randn(value.shape, generator=noise).to(value.device, value.dtype)
        return given

    def times(self, steps: int, tokens: int) -> list[float]:
        if self.pipeline is not None:
            found: list[float] = self.pipeline.times(steps, tokens)
            return found
        return [1 - step / steps for step in range(steps + 1)]

    def tokens(self) -> int:
        """Image tokens of a picture."""
        return (self.height // self.token_size) * (self.width // self.token_size)

    def draw(self, picture: Picture, steps: int, decode: bool = True) -> Drawing:  # type: ignore[override]
        """Draw one picture with the repository's own loop, or the user's pipeline, which decodes in `decode` alone."""
        if self._whole is not None:
            return self._draw_whole(self._whole, picture, steps)
        model, given = self.subject_model, self.inputs(picture)
        times = self.times(steps, self.tokens())
        drawn, inputs = Drawn(), list[Tensor]()
        with torch.inference_mode(), seen_latents(model, self.facts.image, inputs):
            if self.loop is None:
                with record(model, Subject._own_loop.__code__, drawn):
                    result = self._own_loop(model, given, given, times, chipmunk.steps, chipmunk.slot)
            else:
                facts, function, variants = self.loop
                assert facts.model_parameter is not None
                with record(model, unwrapped(function).__code__, drawn, self._head(facts)):
                    result = self.target.run_loop(function, facts.model_parameter, model, given, times, variants[0])
            drawing = Drawing(_after_each_step(drawn, inputs, result))
            if decode and self.decodes:
                drawing.pixels = self.decode(drawing)
        if not torch.isfinite(result).all():
            raise BuildError(f"the picture of '{picture.prompt}', seed {picture.seed}, is not finite")
        return drawing

    def _head(self, loop: LoopFacts) -> ast.For | None:
        """The sampling loop itself: on the patched side the lines are others."""
        if self.order.side == "original":
            return super()._head(loop)
        source = (self.checkout.root / loop.file).read_bytes()
        counted = counted_loops(source, loop.function)
        same = sorted(x.line for x in self.facts.loops if (x.file, x.function) == (loop.file, loop.function))
        return counted[same.index(loop.line)] if len(counted) == len(same) else None

    def _draw_whole(self, pipeline: pipelines.UserPipeline, picture: Picture, steps: int) -> Drawing:
        with torch.inference_mode():
            latents = pipeline.draw(picture.prompt, picture.seed, steps, self.width, self.height)
        if not torch.isfinite(latents[-1]).all():
            raise BuildError(f"the picture of '{picture.prompt}', seed {picture.seed}, is not finite")
        return Drawing(latents)

    def decode(self, drawing: Drawing) -> Tensor:
        """The pixels of the picture that was drawn last, (B, H, W, 3) uint8, on the CPU."""
        if self._whole is not None:
            return self._whole.decode()
        pixels: Tensor = self.pipeline.decode(drawing.latents[-1], self.width, self.height)
        return pixels


def _after_each_step(drawn: Drawn, inputs: list[Tensor], result: Tensor) -> list[Tensor]:
    """The latents that a step's first model call was given are what the step before has left."""
    steps = [call.step for call in drawn.calls]
    first = {step: steps.index(step) for step in dict.fromkeys(steps)}
    channels = result.shape[-1]
    return [*(inputs[index][..., :channels] for index in [*first.values()][1:]), result]


@contextmanager
def seen_latents(model: nn.Module, image: str, inputs: list[Tensor]) -> Iterator[None]:
    """While this is open, note the image tokens that each call of the model is given."""
    signature = inspect.signature(model.forward)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(signature.bind(*args, **kwargs).arguments[image].detach().clone())

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


__all__ = ["BuildError", "CheckoutError", "Drawing", "OtherModelError", "Studio"]
