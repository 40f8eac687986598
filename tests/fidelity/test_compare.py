"""The variants of a comparison and of an ablation are what they say."""

from __future__ import annotations

import sys

import pytest

from chipmunk.config import Config
from chipmunk.fidelity.compare import ablation, cache_dit, comparison


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_names_are_unique_and_configurations_valid(steps: int) -> None:
    variants = [*comparison(steps, sys.executable), *cache_dit()]
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        if variant.config is not None:
            Config.model_validate(variant.config)
        assert variant.family
        assert (variant.config is None) == (variant.method != "chipmunk")


def test_fewer_steps_are_fewer() -> None:
    counts = [variant.steps for variant in comparison(50, sys.executable) if variant.method == "dense"]
    assert counts == sorted({count for count in counts if count is not None}, reverse=True)
    assert all(count is not None and 0 < count < 50 for count in counts)


def test_an_ablation_changes_one_thing_at_a_time() -> None:
    default, *others = ablation()
    assert default.config == {}
    configs = [Config.model_validate(variant.config) for variant in others]
    assert Config() not in configs, "each differs from the defaults"
    assert len({config.model_dump_json() for config in configs}) == len(configs), "and from the others"
