"""A model whose size the target does not know is refused while it is built, before it fills the memory."""

from __future__ import annotations

import pytest
from torch import nn

from chipmunk.verify.building import LARGEST, BuildError, refuse_large


def test_a_small_model_is_built() -> None:
    with refuse_large("Small", "flux"):
        assert nn.Linear(1000, 1000).weight.numel() < LARGEST


def test_a_large_model_is_refused_at_the_layer_that_makes_it_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipmunk.verify.building.LARGEST", 1000)
    built: list[nn.Module] = []

    def build() -> None:
        with refuse_large("Large", "flux"):
            built.extend(nn.Linear(20, 20) for _ in range(100))

    with pytest.raises(BuildError, match="Large has more than 1,000 parameters as target 'flux' builds it"):
        build()
    assert len(built) == 2
    nn.Linear(100, 100)  # no longer counted
