"""Draws pictures one way after another and says how far each is from the dense one, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk
from chipmunk.config import Config
from chipmunk.fidelity import flops, metrics
from chipmunk.fidelity.coverage import coverage
from chipmunk.fidelity.flops import ModelCost
from chipmunk.fidelity.recording import Recording, measure_cost, recording
from chipmunk.fidelity.spec import Picture, Spec, Variant
from chipmunk.fidelity.studio import BuildError, Drawing, Studio
from chipmunk.runtime.control import statistics
from chipmunk.verify.order import PROGRESS

Result = dict[str, Any]

PICTURES = "pictures"
"""A worker's folder of decoded pictures, a file each."""


@dataclass(frozen=True)
class Dense:
    """A dense picture, as the original's process left it."""

    latents: Tensor
    """(steps, B, tokens, channels) float32"""
    pixels: Tensor | None
    seconds: float
    step_seconds: list[float]


class Artist:
    """One process's model and all that is measured with it."""

    def __init__(self, spec: Spec, total: int) -> None:
        self.spec = spec
        self.studio = Studio(spec)
        self.model: nn.Module = self.studio.subject_model
        facts = spec.facts
        self.blocks: list[nn.Module] = [*attrgetter(facts.double)(self.model), *attrgetter(facts.single)(self.model)]
        self.pictures = self.studio.pictures()
        self.done, self.total = 0, total
        self.variants: dict[str, Result] = {}
        """What was measured, by variant; the one that is being drawn has its first pictures."""
        self.keep: Callable[[], object] = lambda: None
        """Called after each picture that was measured."""
        self._dense: dict[int, Dense] = {}
        self.cuda = torch.device(spec.device).type == "cuda"

    # Drawing.

    def draw(self, picture: Picture, steps: int, what: str, watched: bool = False) -> tuple[Drawing, Recording]:
        """Draw a picture and note what the model did. watched: by hooks on the blocks."""
        with recording(self.model, self.blocks, watched) as recorded:
            drawing = self.studio.draw(picture, steps, decode=False)
        if self.studio.decodes:
            drawing.pixels = self.studio.decode(drawing)
        self.done += 1
        self.say(what)
        return drawing, recorded

    def say(self, what: str) -> None:
        print(PROGRESS + json.dumps([self.done, max(self.total, self.done), what]), flush=True)

    def save_dense(self, index: int, drawing: Drawing, recorded: Recording) -> None:
        """Leave a dense picture to `dense`, of this process and of the patched side's."""
        tensors = {
            "latents": torch.stack([latents.float().cpu() for latents in drawing.latents]).contiguous(),
            "seconds": torch.tensor([recorded.seconds, *recorded.step_seconds()], dtype=torch.float64),
        }
        if drawing.pixels is not None:
            tensors["pixels"] = drawing.pixels
        self.spec.dense.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.spec.dense / f"{index}.safetensors")

    def save_pixels(self, name: str, pixels: Tensor | None) -> None:
        """Leave a decoded picture, `variant/picture`, to the parent; None: it cannot be decoded."""
        if pixels is not None:
            folder = self.spec.out / PICTURES
            folder.mkdir(exist_ok=True)
            file = folder / f"{len(list(folder.iterdir()))}.safetensors"
            save_file({name: pixels.contiguous()}, file.with_suffix(".new"))
            file.with_suffix(".new").rename(file)  # whole or not at all

    def dense(self, index: int) -> Dense:
        """The dense picture of that number."""
        if index not in self._dense:
            tensors = load_file(self.spec.dense / f"{index}.safetensors")
            seconds, *steps = tensors["seconds"].tolist()
            self._dense.clear()  # the latents of one picture at a time
            self._dense[index] = Dense(tensors["latents"], tensors.get("pixels"), seconds, steps)
        return self._dense[index]

    # Measuring.

    def cost(self) -> ModelCost:
        """Operations of a dense model call; the patched side's."""
        return measure_cost(self.model, self.blocks, lambda: self.studio.draw(self.pictures[0], 1, decode=False))

    def measure(self, index: int, drawing: Drawing, recorded: Recording, cost: ModelCost | None) -> Result:
        """How far a picture is from its dense one, and what it cost."""
        dense = self.dense(index)
        ours = [latents.float().cpu() for latents in drawing.latents]
        found: Result = {
            "prompt": self.pictures[index].prompt,
            "seed": self.pictures[index].seed,
            **compare(dense.latents[-1], ours[-1]),
            "latent_psnr": metrics.psnr(dense.latents[-1], ours[-1]),
            "psnr": None,
            "steps": [],
            "seconds": recorded.seconds,
            "step_seconds": recorded.step_seconds(),
            "kinds": [flops.kind(call) for call in recorded.calls],
        }
        if cost is None:  # which blocks ran: the patched side counts what they cost
            found["ran"] = [sorted(call) for call in recorded.calls]
        if len(ours) == len(dense.latents):
            found["steps"] = [compare(*pair) for pair in zip(dense.latents, ours, strict=True)]
        if drawing.pixels is not None and dense.pixels is not None:
            found["psnr"] = metrics.psnr(dense.pixels, drawing.pixels, 255.0)
        if cost is not None:
            found["call_flops"] = [cost.whole(call) for call in recorded.calls]
            found["flops"] = sum(found["call_flops"])
            found["sparsifiable_flops"] = sum(cost.sparsifiable(call) for call in recorded.calls)
        return found

    def rival(self, variant: Variant) -> Result:
        """All pictures of a variant of another library's."""
        from chipmunk.fidelity.cache_dit import cached

        facts, steps = self.spec.facts, variant.steps or self.spec.steps
        with cached(self.model, facts.double, facts.single, steps, variant.settings or {}) as prepare:
            return self.variant(variant, None, prepare)

    def variant(self, variant: Variant, cost: ModelCost | None, prepare: Callable[[], object] = lambda: None) -> Result:
        """All pictures of one variant. prepare: to be called before each."""
        steps = variant.steps or self.spec.steps
        if variant.config is not None:
            chipmunk.enable(self.model, variant.config)
        if self.cuda and variant.config is not None:
            self.draw(self.pictures[0], steps, f"{variant.name}: compiling")
        results: list[Result] = []
        found: Result = {"pictures": results, "steps": steps, "notes": []}
        if variant.config is not None:
            found["settings"] = _every_value(variant.config)
        self.variants[variant.name] = found
        for index, picture in enumerate(self.pictures):
            prepare()
            what = f"{variant.name}: picture {index + 1}"
            drawing, recorded = self.draw(picture, steps, what, watched=variant.method == "cache-dit")
            results.append(self.measure(index, drawing, recorded, cost))
            self.save_pixels(f"{variant.name}/{index}", drawing.pixels)
            self.keep()
        if variant.config is not None:
            counted = statistics(self.model)
            found["statistics"] = str(counted)
            found["notes"] = _notes(results, counted)
            if self.spec.coverage:
                found["coverage"] = self.coverage(variant.config, steps, variant.name)
            chipmunk.disable(self.model)
        return found

    def coverage(self, config: dict[str, Any], steps: int, name: str) -> Result:
        """What the kept keys and neurons cover, for the first picture."""
        chipmunk.enable(self.model, {**config, "compile": False})
        with coverage(self.model, self.blocks) as found:
            self.draw(self.pictures[0], steps, f"{name}: coverage")
        return {
            part: {str(layer): [[call, share] for call, share in shares] for layer, shares in layers.items()}
            for part, layers in found.items()
        }

    def floor(self) -> Result:
        """How far the dense model is from itself: run again, and with other numerics."""
        again: dict[str, Callable[[], Any]] = {"again": nullcontext, "math SDPA": _math}
        found: Result = {name: self._floor(name, context) for name, context in again.items()}
        # the weights are not put back: this comes last
        other = torch.float16 if self.studio.dtype == torch.bfloat16 else torch.bfloat16
        self.studio.cast(other)
        name = str(other).removeprefix("torch.")
        try:
            found[name] = self._floor(name, nullcontext)
        except BuildError as error:  # a model made for bfloat16 may overflow in float16
            self.studio.notes.append(f"no floor in {name}: {error}")
        return found

    def _floor(self, name: str, context: Callable[[], Any]) -> list[Result]:
        results = []
        for index in range(min(self.spec.floor, len(self.pictures))):
            with context():
                drawing, recorded = self.draw(self.pictures[index], self.spec.steps, f"floor, {name}")
            results.append(self.measure(index, drawing, recorded, None))
            self.save_pixels(f"{name}/{index}", drawing.pixels)
        return results


def compare(dense: Tensor, ours: Tensor) -> dict[str, float]:
    return {"l2": metrics.relative_l2(dense, ours), "cosine": metrics.cosine(dense, ours)}


@contextmanager
def _math() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _every_value(config: dict[str, Any]) -> Result:
    """What ran, the defaults filled in: they are this version's, and change."""
    filled = Config.model_validate_json(json.dumps(config))
    values: Result = filled.model_dump(mode="json", by_alias=True)
    return values


def _notes(results: Sequence[Result], counted: Any) -> list[str]:
    """What kept the variant from running as it should."""
    found = []
    for title, counts in (
        ("model calls that ran dense", counted.dense_model_calls),
        ("started over", counted.restarts),
    ):
        found += [f"{title}: {reason} ({count})" for reason, count in counts.items()]
    if counted.no_step_caching is not None:
        found.append(f"no steps are skipped: {counted.no_step_caching}")
    kinds = {kind for result in results for kind in result["kinds"]}
    if counted.no_step_caching is None and not any("sparse" in kind or kind == "skipped" for kind in kinds):
        found.append("no step was sparse: at this size rounding keeps everything, or the loop is too short")
    return found
