"""Scripts that put a forward of their own in the place of diffusers', one that leaves blocks out on some steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import diffusers
import torch
from tiny_pipelines import KEPT, SPARSE, draw, error, flux1, pipeline, sparse_calls
from torch import Tensor

import chipmunk
from chipmunk.runtime import diffusers as adopting


def forward_with_a_cache(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """What diffusers' forward computes; on every third call no block runs, and the last difference is added again."""
    image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
    timestep, guidance = timestep * 1000, None if guidance is None else guidance * 1000
    given = (timestep, pooled_projections) if guidance is None else (timestep, guidance, pooled_projections)
    temb = self.time_text_embed(*given)
    rotation = self.pos_embed(torch.cat((txt_ids, img_ids)))
    self.calls = getattr(self, "calls", -1) + 1
    if self.calls % 3 == 2:
        image += self.kept
    else:
        entered = image.clone()
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotation)
        self.kept = image - entered
    return (self.proj_out(self.norm_out(image, temb)),)


@pytest.fixture
def with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", forward_with_a_cache)


@pytest.mark.usefixtures("with_a_cache")
def test_layers_are_sparse_on_the_steps_on_which_they_run() -> None:
    wanted = draw(pipeline(flux1()))
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), wanted) < 1e-5
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, SPARSE)
    drawn = draw(pipe)
    assert drawn.isfinite().all()
    assert 1e-4 < error(drawn, wanted) < 0.3
    calls = sparse_calls(chipmunk.statistics(pipe))
    assert all(min(sparse) > 0 for sparse in [*calls.values()][2:]), calls  # of eight calls in which blocks run


def test_a_release_that_is_too_old_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(flux1())
    wanted = draw(pipe)
    with monkeypatch.context() as old:
        old.setattr(adopting, "find_spec", lambda name: None)
        with pytest.warns(RuntimeWarning, match=r"runs dense, as ever: diffusers .* is older than 0\.35"):
            chipmunk.enable(pipe, SPARSE)
    assert torch.equal(draw(pipe), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chipmunk.enable(pipe, SPARSE)
    assert not torch.equal(draw(pipe), wanted)
