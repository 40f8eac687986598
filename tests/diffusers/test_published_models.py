"""The published FLUX models that bench knows by name, at their full size on no device."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import diffusers
import tiny_pipelines as tiny
import torch

import chipmunk
from targets import diffusers as target


def billions(name: str, model: str | None) -> float:
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this release has no {name}")
    with torch.device("meta"):
        built = target.build(kind, target.named(kind, model))
    return sum(parameter.numel() for parameter in built.parameters()) / 1e9


@pytest.mark.parametrize(
    ("name", "model", "size"),
    [
        ("FluxTransformer2DModel", None, 11.9),
        ("FluxTransformer2DModel", "schnell", 11.9),
        ("Flux2Transformer2DModel", None, 32.2),
        ("Flux2Transformer2DModel", "klein-4b", 3.9),
        ("Flux2Transformer2DModel", "klein-9b", 9.1),
        ("Flux3Transformer2DModel", None, 5.5),
    ],
)
def test_parameters(name: str, model: str | None, size: float) -> None:
    assert billions(name, model) == pytest.approx(size, abs=0.05)


def test_a_model_of_another_class_is_refused() -> None:
    with pytest.raises(target.CannotRun, match="knows no FluxTransformer2DModel called 'klein-9b': it knows schnell"):
        target.named(diffusers.FluxTransformer2DModel, "klein-9b")


@pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="this release has no FLUX.3")
def test_what_a_release_keeps_in_float32_stays_so() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = target.build(diffusers.Flux3Transformer2DModel, target.SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"norm_q", "norm_k"}


def test_steps_are_counted_as_in_a_pipeline() -> None:
    """By the loop: times that do not change, which nothing could be told by, are steps all the same."""
    model = tiny.flux1()
    every = {"full_step_every": 10}
    chipmunk.enable(model, {"attn": {**tiny.TILES, **every}, "mlp": {**tiny.NEURONS, **every}, "compile": False})
    given = target.inputs(model, 1, tiny.HEIGHT, tiny.WIDTH, tiny.TEXT, torch.Generator().manual_seed(0))
    with torch.no_grad():
        target.sample(model, given, [0.5] * 13)
    counted = chipmunk.statistics(model)
    assert tiny.sparse_calls(counted)["single_transformer_blocks.2"] == (9, 10)
    assert not counted.dense_model_calls
