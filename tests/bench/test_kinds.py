"""What a model call is called: by what its last layer did, not by what was planned for it."""

from __future__ import annotations

import pytest

from chipmunk.bench.model_calls import kind
from chipmunk.config import Config
from chipmunk.runtime.layer_state import DONE, AttentionRules, LayerState, MlpRules

FEW = "fewer than two groups of rows"


@pytest.mark.parametrize(
    ("attention", "mlp", "expected"),
    [
        (("sparse", DONE), ("sparse", DONE), "sparse/sparse"),
        (("full", DONE), ("sparse", DONE), "full/sparse"),
        (("dense", DONE), ("full", DONE), "dense/full"),
        (("sparse", FEW), ("sparse", DONE), "dense/sparse"),
        (("sparse", None), ("full", DONE), "dense/full"),
        (("sparse", FEW), ("full", FEW), "dense/dense"),
        (("dense", None), ("dense", None), "dense/dense"),
    ],
)
def test_the_kind_of_a_call(attention: tuple[str, str | None], mlp: tuple[str, str | None], expected: str) -> None:
    config = Config()
    state = LayerState(AttentionRules.of(config.attn), MlpRules.of(config.mlp), "reference")
    state.attention, state.attention_done = attention
    state.mlp, state.mlp_done = mlp
    assert kind(state) == expected
