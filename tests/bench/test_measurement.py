"""The figures that are drawn from measurements: which picture counts, what fits, what is divided by what."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk.bench.measurement import Run, compare, steady, step_times, steps_that_fit
from tests.bench.runs import KINDS, dense, image, joined, report, sparse


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((9.0,), 9.0),
        ((9.0, 5.0), 5.0),
        ((9.0, 1.0, 5.0), 5.0),  # the second is not settled yet, however fast it was
        ((9.0, 1.0, 5.0, 4.0), 4.0),  # of two the faster one
        ((9.0, 1.0, 7.0, 4.0, 5.0), 5.0),
    ],
)
def test_the_steady_picture(seconds: tuple[float, ...], expected: float) -> None:
    assert steady(dense(*seconds).images).seconds == expected


def test_steps_that_fit_are_whole_and_never_none_or_more_than_all() -> None:
    full = image(6.0)  # six steps, one second each
    assert steps_that_fit(3.999, full) == 3
    assert steps_that_fit(4.0, full) == 4
    assert steps_that_fit(0.5, full) == 1
    assert steps_that_fit(60.0, full) == 6


@given(st.integers(1, 100), st.floats(1e-3, 1e3))
def test_the_time_of_a_picture_fits_all_its_steps(count: int, seconds: float) -> None:
    assert steps_that_fit(seconds, image(seconds, kinds=("dense",) * count)) == count


def test_kinds_of_step_keep_the_order_in_which_they_come_and_take_the_median() -> None:
    mixed = replace(
        image(1.0, kinds=KINDS), step_ms=(110.0, 90.0, 1000.0, 50.0, 140.0, 51.0)
    )  # one step was interrupted
    assert list(step_times(mixed).items()) == [
        ("dense/full", 110.0),
        ("full/sparse", 90.0),
        ("sparse/sparse", 51.0),
        ("full/full", 140.0),
    ]


def test_a_comparison_divides_by_the_steady_dense_picture() -> None:
    fewer = Run("fewer steps", tuple(image(4.1, index, kinds=("dense",) * 4) for index in (0, 1)), {})
    (row,) = compare(dense(18.0, 6.2, 6.0), sparse(30.0, 4.4, 4.0), fewer)
    assert row.speedup == 6.0 / 4.0
    assert row.dense == {"first": 18.0, "second": 6.2, "steady": 6.0, "peak_gb": 24.0}
    assert row.ratios["dense"] == {"first": 3.0, "second": 6.2 / 6.0, "steady": 1.0, "peak_gb": 1.0}
    assert row.ratios["chipmunk"] == {"first": 5.0, "second": 4.4 / 6.0, "steady": 4.0 / 6.0, "peak_gb": 33.0 / 24.0}
    assert row.ratios["steps"] == {"dense/full": 1.1, "full/sparse": 0.9, "sparse/sparse": 0.5, "full/full": 1.4}
    assert row.step_counts == {"dense/full": 1, "full/sparse": 1, "sparse/sparse": 3, "full/full": 1}
    assert row.extra_gb == 9.0
    assert row.fewer_steps == (4, 4.1)
    assert row.ratios["fewer_steps"] == {"steady": 4.1 / 6.0}
    assert row.tokens == 80 * 48
    assert row.compiled["chipmunk"][0]["recompiles"] == 2


def test_peak_memory_is_that_of_the_worst_picture() -> None:
    ours = sparse(30.0, 4.4, 4.0)
    greedy = replace(ours, images=(replace(ours.images[0], peak_bytes=40_000_000_000), *ours.images[1:]))
    assert compare(dense(18.0, 6.2, 6.0), greedy)[0].extra_gb == 16.0


def test_fewer_steps_belong_to_the_configuration_whose_time_they_fit_into() -> None:
    """Two configurations of different speed: the original drew with four steps and with three."""
    shorter = tuple(image(float(n), i, kinds=("dense",) * n) for n in (3, 4) for i in (0, 1))
    fewer = Run("fewer steps", shorter, {})
    before = dense(18.0, 6.2, 6.0)
    assert compare(before, sparse(30.0, 4.4, 4.0), fewer)[0].fewer_steps == (4, 4.0)
    assert compare(before, sparse(30.0, 4.4, 3.5), fewer)[0].fewer_steps == (3, 3.0)
    assert compare(before, sparse(30.0, 4.4, 2.0), fewer)[0].fewer_steps is None


def test_a_model_call_that_ran_dense_is_a_kind_of_its_own_beside_the_original() -> None:
    ours = replace(image(6.0, kinds=("dense",) * 6), step_ms=(120.0,) * 6)
    (row,) = compare(dense(6.0), Run("chipmunk", (ours,), {}))
    assert row.dense_step_ms == 100.0
    assert row.step_ms == {"dense": 120.0}


def test_only_sizes_that_both_measured_are_compared() -> None:
    before = joined(dense(6.0), dense(7.0, size="1024x1024"))
    after = joined(sparse(4.0, size="1024x1024"), sparse(5.0, size="512x512"))
    assert [row.size for row in compare(before, after)] == ["1024x1024"]


def test_a_run_survives_json() -> None:
    run = replace(sparse(30.0, 4.4, 0.1 + 0.2), notes=("started over: the size changed (1)",))
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_json_of_a_report_holds_the_exact_figures() -> None:
    whole = report(require=1.5)
    written = json.loads(json.dumps(whole.to_json()))
    assert written["status"] == "below"
    assert written["require"] == 1.5
    assert written["command"] == "chipmunk bench flux"
    assert [Run.from_json(run) for run in written["runs"]] == list(whole.runs)
    for row, expected in zip(written["comparisons"], whole.comparisons, strict=True):
        assert row["speedup"] == expected.speedup
        assert row["ratios"] == expected.ratios
        assert tuple(row["fewer_steps"]) == expected.fewer_steps
        assert row["step_ms"] == expected.step_ms


def test_what_was_required_has_to_be_reached_at_every_size_by_every_configuration() -> None:
    slow, fast = 1.4, 1.6
    both = ("careful", "fast")
    assert report(both).exit_code == 0
    assert report(both, require=slow - 1e-6).exit_code == 0
    missed = report(both, require=(slow + fast) / 2)
    assert missed.exit_code == 1
    assert {row.config for row in missed.below} == {"careful"}
    assert len(missed.below) == 3
