"""Where only a part of a block was handed to Chipmunk, the oracle leaves the other part alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chipmunk.config import Config
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.verify.oracle import Oracle
from tests.verify.tiny_flux import FACTS, TinyFlux, inputs

CONFIG = Config.model_validate(
    {
        "attn": {"mbm": 16, "counts_multiple_of": 4, "first_n_dense_layers": 0},
        "mlp": {"bm": 16, "mbm": 16, "counts_multiple_of": 8, "first_n_dense_layers": 0},
    }
)
ATTENTION, MLP = {"attention": False}, {"mlp": None}
SINGLE_MLP = {"linear_in": None, "linear_out": None}


@pytest.mark.parametrize(
    ("double", "single", "parts"),
    [
        ({}, {}, {("double", "attention"), ("double", "mlp"), ("single", "attention"), ("single", "mlp")}),
        (ATTENTION, {}, {("double", "mlp"), ("single", "attention"), ("single", "mlp")}),
        ({}, ATTENTION, {("double", "attention"), ("double", "mlp"), ("single", "mlp")}),
        (MLP, SINGLE_MLP, {("double", "attention"), ("single", "attention")}),
    ],
)
def test_only_what_was_patched_runs_sparse(
    double: dict[str, Any], single: dict[str, Any], parts: set[tuple[str, str]]
) -> None:
    facts: ModelFacts = replace(
        FACTS, double_block=replace(FACTS.double_block, **double), single_block=replace(FACTS.single_block, **single)
    )
    torch.manual_seed(0)
    model, given = TinyFlux(), inputs()
    with torch.no_grad(), Oracle(model, facts, CONFIG) as oracle:
        for step in range(4):
            oracle.begin_step(step)
            model(**given, t=1 - step / 4)
        sparse = {(layer, part) for (layer, part, kind), count in oracle.calls.items() if kind == "sparse" and count}
    assert {("double" if layer < 3 else "single", part) for layer, part in sparse} == parts
