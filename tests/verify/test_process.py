"""Worker processes: what they are told arrives, and one that cannot be run is told of as such."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chipmunk.bench import spec as bench
from chipmunk.fidelity import spec as fidelity
from chipmunk.rewrite.plan import LoopFacts
from chipmunk.verify import spec as verify
from chipmunk.verify.order import read_order, write_order
from chipmunk.verify.process import run_workers
from chipmunk.verify.report import VerifyError
from tests.verify.tiny_flux import FACTS

HERE = Path(__file__)
LOOPS = (LoopFacts("sampling.py", "denoise", 7, "model", slots=("neg_pred",)),)
COMMON = {"side": "patched", "root": HERE.parent, "out": Path("out"), "facts": replace(FACTS, loops=LOOPS)}
VERIFY = verify.Spec(**COMMON, target=HERE, weights=Path("flux.safetensors"), only=("denoise", "two slots"))
FIDELITY = fidelity.Spec(
    **COMMON, target=HERE, dense=Path("dense"), prompts=("a chipmunk",), seeds=(3, 4), autoencoder=Path("ae"),
    variants=(fidelity.Variant("defaults", {"attn": {"mbm": 48}}), fidelity.Variant("half", steps=25)),
)  # fmt: skip
BENCH = bench.Spec(
    **COMMON, target=HERE, sizes=((1280, 768), (512, 512)), config=Path("fast.yml"), overrides={"depth": 2},
    match_seconds={"512x512": [1.5]},
)  # fmt: skip


@pytest.mark.parametrize("order", [VERIFY, FIDELITY, BENCH], ids=["verify", "fidelity", "bench"])
def test_a_worker_is_told_what_its_parent_wrote(
    order: verify.Spec | fidelity.Spec | bench.Spec, tmp_path: Path
) -> None:
    write_order(order, tmp_path / "spec.json")
    assert read_order(type(order), tmp_path / "spec.json") == order


@pytest.mark.parametrize("python", ["missing", "a folder", "no program"])
def test_a_python_that_cannot_be_run_is_named(python: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "no program").write_text("")
    with pytest.raises(VerifyError, match=f"{python} cannot be run: "):
        run_workers([replace(VERIFY, out=tmp_path / "out")], str(tmp_path / python), None, 10)


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_python_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError):
        run_workers([replace(VERIFY, out=tmp_path / "out")], "python", None, 10)
