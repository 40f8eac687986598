"""Which steps step caching skips: by a schedule, and by the error that is expected of skipping."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chipmunk.config import StepCaching
from chipmunk.runtime.step_caching import UPSTREAM_SCHEDULE, StepCache, scaled

# Which steps a schedule skips.


def test_the_list_of_the_original() -> None:
    assert scaled(UPSTREAM_SCHEDULE, 50, 50) == set(UPSTREAM_SCHEDULE)
    assert len(UPSTREAM_SCHEDULE) == 25


@pytest.mark.parametrize(
    ("schedule", "written_for", "steps", "expected"),
    [
        ((1, 3), 4, 8, {2, 3, 6, 7}),
        ((2, 3, 6, 7), 8, 4, {1, 3}),
        ((1, 2), 4, 2, {0}),  # half of a step before the middle, half after it: the first half is rounded up
        ((5, 60), 50, 50, {5, 60}),
        ((5, 60), 50, None, {5, 60}),
        ((60,), 50, 25, set()),
        ((), 50, 28, set()),
        (tuple(range(50)), 50, 7, set(range(7))),
    ],
)
def test_a_schedule_is_scaled(
    schedule: tuple[int, ...], written_for: int, steps: int | None, expected: set[int]
) -> None:
    assert scaled(schedule, written_for, steps) == expected


@given(st.sets(st.integers(0, 59)), st.integers(1, 60), st.integers(1, 90))
@settings(deadline=None, max_examples=60)
def test_scaling_keeps_the_density_all_along_the_loop(schedule: set[int], written_for: int, steps: int) -> None:
    found = scaled(sorted(schedule), written_for, steps)
    assert found <= set(range(steps)) or steps == written_for
    for boundary in range(steps + 1):
        time = Fraction(boundary * written_for, steps)
        passed = sum(min(max(time - step, Fraction(0)), Fraction(1)) for step in schedule if step < written_for)
        before = sum(step < boundary for step in found)
        assert abs(before - passed * steps / written_for) <= Fraction(1, 2) or steps == written_for


# Which steps the adaptive mode skips.


def cache(total: int | None = None, **keys: Any) -> StepCache:
    return StepCache(StepCaching(is_enabled=True, **keys), None, total)


def run(cache: StepCache, steps: int, residual: Any) -> list[int]:
    """The steps skipped, where the blocks' residual at `step` is `residual(step)`."""
    before = torch.zeros(1, 2, 3, dtype=torch.float64)
    for step in range(steps):
        if cache.skips(step):
            cache.skip(step, before)
        else:
            cache.keep(step, before, before + residual(step))
    return cache.skipped


def curve(degree: int) -> Any:
    # Far from its zeros: the size of the hidden state hardly changes.
    return lambda step: torch.full((1, 2, 3), 1e6, dtype=torch.float64) + (step + 3.0) ** degree


@given(st.integers(0, 3), st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_extrapolation_is_exact_for_polynomials(order: int, gaps: list[int], ahead: int) -> None:
    found = cache(extrapolation=order)
    before = torch.randn(1, 2, 3, dtype=torch.float64)
    nodes = list(itertools.accumulate(gaps))
    for step in nodes:
        found.keep(step, before, before + curve(order)(step))
    step = nodes[-1] + ahead
    torch.testing.assert_close(found.predict(step, 2 * before), 2 * before + curve(order)(step), rtol=1e-12, atol=0)


@given(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_the_expected_error_is_the_true_one_for_polynomials_of_one_degree_more(
    order: int, gaps: list[int], ahead: int
) -> None:
    found = cache(extrapolation=order)
    before = torch.zeros(1, 2, 3, dtype=torch.float64)
    nodes = list(itertools.accumulate(gaps))
    for step in nodes:
        found.keep(step, before, curve(order + 1)(step))
    step = nodes[-1] + ahead
    truth = curve(order + 1)(step)
    wrong = float((found.predict(step, before) - truth).abs().mean() / truth.abs().mean())
    assert math.isclose(found.expected_error(step), wrong, rel_tol=0.02)


def test_nothing_is_skipped_while_too_little_is_known() -> None:
    # A curve needs three steps, and a fourth to measure the error by.
    assert run(cache(first_steps=1, extrapolation=2, max_consecutive=1), 8, curve(0)) == [4, 6]
    assert run(cache(first_steps=1, extrapolation=0, max_consecutive=1), 6, curve(0)) == [2, 4]


@given(
    st.integers(1, 40),
    st.floats(0, 1e4),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.none() | st.floats(0.01, 1),
    st.none() | st.integers(0, 3),
)
@settings(deadline=None, max_examples=80)
def test_first_and_last_steps_are_computed_and_rows_of_skipped_ones_are_short(
    total: int, threshold: float, most: int, first: int, last: int, keep: float | None, order: int | None
) -> None:
    keys: dict[str, Any] = {"threshold": threshold, "max_consecutive": most, "first_steps": first, "last_steps": last}
    found = run(cache(total, keep=keep, extrapolation=order, **keys), total, lambda step: torch.ones(1) * 1.1**step)
    assert not set(found) & {*range(first), *range(total - last, total)}
    assert not any({step + i for i in range(most + 1)} <= set(found) for step in found)


@pytest.mark.parametrize("total", [20, 50, 28, 100])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_a_fraction_of_the_steps_is_kept(total: int, fraction: float) -> None:
    found = run(cache(total, keep=fraction, max_consecutive=20), total, lambda step: torch.randn(1))
    assert abs(total - len(found) - fraction * total) <= 1
    # from the last of the first steps to the first of the last ones
    gaps = [b - a for a, b in itertools.pairwise(sorted(set(range(3, total - 1)) - set(found)))]
    assert max(gaps) - min(gaps) <= 1  # evenly


def test_an_error_that_is_no_number_skips_nothing() -> None:
    assert run(cache(threshold=1e9), 12, lambda step: torch.tensor(math.nan)) == []


def test_one_number_is_read_from_the_device_for_a_computed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    original = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda x: (reads.append(x), original(x))[1])
    found = run(cache(threshold=1.0), 30, lambda step: torch.full((1,), 1.05**step))
    assert found
    assert len(reads) <= 30 - len(found)
    assert run(cache(keep=0.5), 30, lambda step: torch.randn(1))
    assert len(reads) <= 30 - len(found)
