"""A whole run on the starter repository: both processes, the floor, pictures, and figures that must fit together."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from rich.console import Console

from chipmunk import registry
from chipmunk.apply import carry_out, plan_update
from chipmunk.cli.fidelity import end_if_stopped, show_report
from chipmunk.config import Config
from chipmunk.fidelity import FidelityError, FidelityOptions, FidelityReport, run
from chipmunk.fidelity.spec import Variant
from chipmunk.rewrite import plan_repository
from chipmunk.verify import VerifyError
from tests.end_to_end.starter import copy_starter

STEPS = 9
FINE = {"attn": {"mbm": 32, "counts_multiple_of": 8}, "mlp": {"bm": 8, "mbm": 8, "counts_multiple_of": 16}}
KEPT = {"attn": {**FINE["attn"], "top_keys": 1.0}, "mlp": {**FINE["mlp"], "top_keys": 1.0}}
FEW = {"attn": {**FINE["attn"], "top_keys": 0.05}, "mlp": {**FINE["mlp"], "top_keys": 0.05}}
VARIANTS = (
    Variant("everything kept", KEPT, family="sparse"),
    Variant("some kept", FINE, family="sparse"),
    Variant("few kept", FEW, family="sparse"),
    Variant("steps skipped", {**FINE, "step_caching": {"is_enabled": True, "mode": "adaptive", "keep": 0.6}}),
    Variant("5 steps", steps=5, method="dense", family="fewer dense steps"),
)


def patched_starter(folder: Path) -> Path:
    """A patched copy of the starter, its only model the smallest that makes sparse steps."""
    root = copy_starter(folder)
    util = root / "flux" / "util.py"
    text = util.read_text()
    # the untrained model comes first: it is the one that is drawn with
    util.write_text(text + '\nconfigs = {"flux-tiny": configs["flux-tiny"]}\n')
    carry_out(plan_update(root, lambda files: plan_repository(files, registry.load())))
    return root


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FidelityReport:
    folder = tmp_path_factory.mktemp("fidelity")
    options = FidelityOptions(variants=VARIANTS, count=1, seeds=(3,), steps=STEPS, size=(64, 64), output=folder / "out")
    said: list[tuple[str, int, int]] = []
    report = run(patched_starter(folder), options, lambda *line: said.append(line))
    assert said
    assert all(done <= total for _, done, total in said)
    assert said[-1][1] == said[-1][2], "the last thing said is that all is done"
    return report


def test_everything_kept_is_the_dense_picture(found: FidelityReport) -> None:
    summary = found.summaries["everything kept"]
    assert summary.psnr is not None
    assert summary.psnr > 70
    assert summary.l2 < 1e-5
    assert summary.sparsifiable_flops > 1, "the caches cost something too"


def test_keeping_less_is_cheaper_and_further_away(found: FidelityReport) -> None:
    kept, some, few = (found.summaries[name] for name in ("everything kept", "some kept", "few kept"))
    assert kept.flops > some.flops > few.flops
    assert kept.l2 < some.l2
    assert some.latent_psnr > few.latent_psnr
    assert some.sparsifiable_flops < some.flops < 1, "the rest of the model costs what it did"


def test_the_error_grows_from_nothing(found: FidelityReport) -> None:
    for picture in variant(found, "some kept")["pictures"]:
        errors = [step["l2"] for step in picture["steps"]]
        assert len(errors) == STEPS
        assert errors[0] < 1e-6, "the first step is full"
        assert errors[-1] == pytest.approx(picture["l2"])
        assert errors[-1] > errors[2] > 1e-6


def test_steps_are_told_apart(found: FidelityReport) -> None:
    kinds = variant(found, "some kept")["pictures"][0]["kinds"]
    full = {0: "dense/full", 1: "full/full", 3: "full/full", 7: "full/full"}
    assert kinds == [full.get(step, "sparse/sparse") for step in range(STEPS)]


def test_skipped_steps_cost_next_to_nothing(found: FidelityReport) -> None:
    summary, some = found.summaries["steps skipped"], found.summaries["some kept"]
    picture = variant(found, "steps skipped")["pictures"][0]
    skipped = picture["kinds"].count("skipped")
    assert summary.skipped == skipped
    assert 1 <= skipped <= 4
    assert summary.flops < some.flops - 0.4 * skipped / STEPS
    cost = found.results["cost"]
    by_kind = dict(zip(picture["kinds"], picture["call_flops"], strict=True))
    assert by_kind["skipped"] == cost["outside"] < 0.05 * cost["dense_call"]


def test_fewer_dense_steps_cost_in_proportion(found: FidelityReport) -> None:
    summary = found.summaries["5 steps"]
    assert summary.flops == pytest.approx(5 / STEPS)
    assert summary.l2 > 1e-3
    assert variant(found, "5 steps")["pictures"][0]["steps"] == [], "its steps are others"


def test_the_floor(found: FidelityReport) -> None:
    floor = {name: entry["summary"] for name, entry in found.results["floor"].items()}
    assert floor["again"]["l2"] == 0
    assert floor["again"]["psnr"] == 100
    assert floor["math SDPA"]["l2"] < 1e-4
    assert 1e-4 < floor["bfloat16"]["l2"] < 0.2


def test_coverage_rises_with_what_is_kept(found: FidelityReport) -> None:
    some, few = (variant(found, name)["coverage"] for name in ("some kept", "few kept"))
    for part in ("attention", "mlp"):
        assert set(some[part]) == set(few[part]) == {str(layer) for layer in range(2, 11)}, "two layers stay dense"
        shares = [[share for line in found_[part].values() for _, share in line] for found_ in (some, few)]
        assert sum(shares[0]) / len(shares[0]) > sum(shares[1]) / len(shares[1]) + 0.05
        assert all(0 < share < 1 for line in shares for share in line)
    everything = variant(found, "everything kept")["coverage"]
    assert all(share == pytest.approx(1, abs=1e-5) for line in everything["attention"].values() for _, share in line)
    assert all(share == pytest.approx(1, abs=1e-5) for line in everything["mlp"].values() for _, share in line)


def test_counted_flops_are_those_that_pytorch_counts(found: FidelityReport) -> None:
    """Of the tiny model, by hand: the linears of every token, and the attention."""
    cost = found.results["cost"]
    layer = cost["layers"][0]
    assert (layer["tokens"], layer["width"], layer["rows"], layer["neurons"]) == (16 + 77, 128, 16, 512)
    single = cost["layers"][-1]
    assert (single["rows"], single["neurons"]) == (16 + 77, 512)
    attention, mlp = 4 * 93 * 93 * 128, 4 * 93 * 128 * 512
    linear = 2 * 93 * 128 * (3 * 128) + 2 * 93 * 128 * 128 + 2 * 128 * 3 * 128
    assert cost["blocks"][-1] == attention + mlp + linear


def test_pictures_are_written_and_differ(found: FidelityReport, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert set(found.images) == {f"{name}/0" for name in ("dense", *(v.name for v in VARIANTS))}
    folder = next(tmp_path_factory.getbasetemp().glob("fidelity*")) / "out"
    dense, few = (Image.open(folder / found.images[f"{name}/0"]) for name in ("dense", "few kept"))
    assert dense.size == (64, 64)
    assert dense.tobytes() != few.tobytes()


def test_json(found: FidelityReport) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert data["status"] == "measured"
    assert data["sites"]
    assert [picture["seed"] for picture in data["pictures"]] == [3]


def test_results_say_every_value_that_ran(found: FidelityReport) -> None:
    """So that they mean the same when defaults have changed."""
    data = found.to_json()["variants"]
    for one in data:
        if one["config"] is None:
            assert "settings" not in one
            continue
        assert json.loads(json.dumps(one["settings"])) == one["settings"]
        assert Config.model_validate_json(json.dumps(one["settings"])) == Config.model_validate(one["config"])
        assert set(one["settings"]) == set(Config.model_fields)
        assert set(one["settings"]["mlp"]) == set(type(Config().mlp).model_fields)


def test_what_was_measured_is_left_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, SIGTERM and SIGHUP come as one; here while the second of three configurations is drawn."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    some, few, kept = VARIANTS[1], VARIANTS[2], VARIANTS[0]

    def interrupt() -> None:
        while not any(
            few.name in file.read_text() for file in tmp_path.glob("chipmunk-fidelity-*/patched/so-far.json")
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    options = FidelityOptions(
        variants=(VARIANTS[4], some, few, kept), count=1, seeds=(3, 4), steps=STEPS, size=(64, 64), floor=0,
        coverage=False, output=tmp_path / "out",
    )  # fmt: skip
    found = run(patched_starter(tmp_path), options)
    watcher.join()
    assert isinstance(found.stopped, KeyboardInterrupt)
    assert found.to_json()["status"] == "interrupted"
    assert list(found.summaries) == ["5 steps", "some kept", "few kept"]
    assert len(variant(found, "some kept")["pictures"]) == 2
    assert found.summaries["some kept"].ssim is not None, "the pictures themselves are there too"
    assert variant(found, "few kept")["notes"] == ["stopped after 1 of 2 pictures"]
    show_report(Console(file=(out := io.StringIO()), width=80), found)
    assert "few kept: stopped after 1 of 2 pictures" in out.getvalue()
    assert "kept/0" in " ".join(found.images)
    with pytest.raises(typer.Exit) as ended:
        end_if_stopped(found)
    assert ended.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_repository_that_is_not_patched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="is not patched"):
        run(copy_starter(tmp_path), FidelityOptions())


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FidelityError, match="there is no file"):
        run(patched_starter(tmp_path), FidelityOptions(weights=tmp_path / "none.safetensors"))


def test_a_missing_library_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(FidelityError, match="skimage") as refused:
        run(tmp_path, FidelityOptions())
    assert refused.value.next_command == f"{sys.executable} -m pip install 'chipmunk-flux[fidelity]'"


def variant(found: FidelityReport, name: str) -> dict[str, Any]:
    chosen: dict[str, Any] = next(v for v in found.results["variants"] if v["name"] == name)
    return chosen
