"""Means, kinds of step and what is below the floor, from hand-made results."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from chipmunk.fidelity.report import covered, step_kinds
from chipmunk.fidelity.tables import report_tables, verdict
from tests.fidelity.results import picture, report, variant


def test_summary_is_relative_to_the_dense_run() -> None:
    found = report().summaries["defaults"]
    assert found.flops == pytest.approx(242 / 400)
    assert found.sparsifiable_flops == pytest.approx(121 / 320)
    assert found.speedup == pytest.approx(1.5)
    assert found.skipped == 1
    assert found.psnr == 32


def test_the_mean_is_over_pictures_and_the_lowest_is_one_of_them() -> None:
    mixed = variant("mixed", config={})
    mixed["pictures"] = [picture(30.0), picture(40.0)]
    found = report(mixed).summaries["mixed"]
    assert (found.psnr, found.lowest_psnr) == (35, 30)


def test_without_pictures_the_latents_count() -> None:
    found = report(variant("v", config={}, psnr=None), decodes=False, require=29)
    assert found.summaries["v"].psnr is None
    assert found.summaries["v"].ssim is None
    assert found.below == {"v": 28.0}


@pytest.mark.parametrize(("require", "code"), [(None, 0), (31.9, 0), (32.0, 0), (32.1, 1)])
def test_exit_code_by_the_required_psnr(require: float | None, code: int) -> None:
    found = report(require=require)
    assert found.exit_code == code
    assert len(verdict(found)) == code


def test_one_variant_below_is_enough() -> None:
    low, high = variant("low", config={}, psnr=20.0), variant("high", config={}, psnr=40.0)
    assert report(high, low, require=30).below == {"low": 20.0}


def test_kinds_of_step() -> None:
    found = step_kinds(variant("v"))
    assert list(found) == ["dense/full", "full/sparse", "sparse/sparse", "skipped"]
    assert found["skipped"] == {"steps": 1.0, "seconds": 0.5, "flops": 2.0}


def test_adaptive_skips_differ_between_pictures() -> None:
    uneven = variant("v")
    uneven["pictures"] = [picture(), picture(kinds=("dense/full", "skipped", "skipped", "skipped"))]
    assert step_kinds(uneven)["skipped"]["steps"] == 2


def test_coverage_is_a_mean_over_layers_and_steps() -> None:
    assert covered(variant("v"), "attention") == pytest.approx(0.6)
    assert covered({"coverage": {}}, "attention") is None


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width: int) -> None:
    long = variant("a-configuration-with-a-name-that-is-long-enough-to-be-wrapped", config={})
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in report_tables(report(variant("defaults", config={}), long)):
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines), "no figure is cut"
    assert any("32.0" in line and "60%" in line for line in lines)


def test_json_has_every_figure_and_can_be_read_back() -> None:
    found = json.loads(json.dumps(report(require=40).to_json()))
    assert found["status"] == "below"
    assert found["variants"][0]["summary"]["psnr"] == 32
    assert found["variants"][0]["kinds"]["skipped"]["flops"] == 2
    assert {"target", "root", "files", "sites", "command", "environment", "floor", "images"} <= set(found)
