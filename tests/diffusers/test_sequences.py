"""What servers do with a pipeline from one picture to the next: no picture may know of those before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import torch
from test_adopted_pipelines import EVERYTHING, ours
from tiny_pipelines import KEPT, SPARSE, draw, error, flux1, pipeline, sparse_calls

import chipmunk


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_enabled_model_is_enabled_as_any_other(copied: Callable[[Any], Any]) -> None:
    first = pipeline(flux1())
    dense = draw(first)
    chipmunk.enable(first, SPARSE)
    sparse = draw(first)
    second = pipeline(copied(first.transformer))
    chipmunk.enable(second, SPARSE)
    assert torch.equal(draw(second), sparse)
    assert sparse_calls(chipmunk.statistics(second)) == EVERYTHING
    chipmunk.enable(second, KEPT)
    assert error(draw(second), dense) < 1e-5
    chipmunk.disable(second)
    assert torch.equal(draw(second), dense)
    assert ours(second.transformer) == []
    assert torch.equal(draw(first), sparse)
    chipmunk.disable(first)
    assert ours(first.transformer) == []
