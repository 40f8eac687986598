"""A runtime with a fault in it must not pass: each file in `faults/` breaks one thing, and a check has to say so.

A fault goes in as a file that verify's patched worker executes first. To save time, only one of verify's scenarios is
run, with few steps and a small model, the original's worker once, and workers are forks of this process.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # once, not in each fork

from chipmunk import registry, verify
from chipmunk.rewrite import plan_repository
from chipmunk.verify import worker
from chipmunk.verify.checks import Comparison
from chipmunk.verify.order import write_order
from chipmunk.verify.spec import Scenario, Spec
from chipmunk.verify.subject import TWO_SLOTS, Subject
from tests.end_to_end.starter import STARTER, patch

FAULTS = Path(__file__).with_name("faults")
TARGET = Path(__file__).with_name("faults_target.py")

EXPECTED = {
    "slots_swapped": {"oracle"},
    "stale_image": {"coverage", "oracle"},
    "stale_step": {"everything kept", "oracle"},
    "counts_behind": {"coverage", "oracle"},
    "wrong_group": {"oracle"},
    "wrong_layer": {"oracle"},
    "ids_not_reordered": {"everything kept", "oracle"},
    "order_not_restored": {"everything kept", "oracle"},
    "difference_sign": {"oracle"},
    "random_seed_frozen": {"oracle"},
    "means_not_refreshed": {"oracle"},
    "selection_not_renewed": {"oracle"},
    "silently_dense": {"coverage", "oracle"},
}
"""By fault, the checks that see it; no others may, for the others to mean what they say."""


Result = tuple[Spec, dict[str, Any]]


def run_worker(spec: Spec, images: int) -> Result:
    """Run verify's worker in a process of its own, on the first `images` images of one scenario, with few steps."""

    def scenarios(self: Subject, scenarios: Any = Subject.scenarios) -> list[Scenario]:
        (found,) = scenarios(self)
        return [replace(found, images=tuple(replace(image, steps=8) for image in found.images[:images]))]

    def work() -> None:
        torch.set_num_threads(1)  # the threads of the process that this one was forked from are not there
        for name in [name for name in sys.modules if name.partition(".")[0] == "flux"]:
            del sys.modules[name]  # another test's repository
        sys.path[:] = [entry for entry in sys.path if Path(entry).name != STARTER.name]
        Subject.scenarios = scenarios  # type: ignore[method-assign]
        spec.out.mkdir(parents=True)
        write_order(spec, spec.out / "spec.json")
        worker.main(str(spec.out / "spec.json"))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(200)
    assert process.exitcode == 0
    result = json.loads((spec.out / "result.json").read_text())
    assert "error" not in result, result["error"]["trace"]
    return spec, result


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Result]:
    """What the original gives, by number of images."""
    found = registry.load()
    files = {path.relative_to(STARTER).as_posix(): path.read_bytes() for path in STARTER.rglob("*.py")}
    facts = plan_repository(files, found).models[0]

    @lru_cache
    def run(images: int) -> Result:
        out = tmp_path_factory.mktemp("original") / "out"
        return run_worker(Spec("original", STARTER, out, facts, TARGET, only=(TWO_SLOTS,)), images)

    return run


@pytest.fixture(scope="module")
def patched_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patch(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def failing(original: Callable[[int], Result], patched_root: Path, tmp_path: Path) -> Callable[..., set[str]]:
    """Names of the checks that do not hold when a fault is in the runtime."""

    def run(fault: str | None, images: int = 1) -> set[str]:
        theirs, expected = original(images)
        preload = None if fault is None else FAULTS / f"{fault}.py"
        ours = replace(theirs, side="patched", root=patched_root, out=tmp_path / "out", preload=preload)
        _, result = run_worker(ours, images)
        comparison = Comparison(ours.facts, theirs.out, ours.out, [expected, result])
        checks = (
            comparison.off(),
            comparison.everything_kept(),
            comparison.parameters(),
            comparison.coverage(),
            comparison.oracle(),
        )
        report = verify.VerifyReport(ours.root, "flux", checks)
        assert report.exit_code == (0 if report.holds else 1)
        return {check.name for check in checks if not check.holds}

    return run


def test_a_sound_runtime_passes(failing: Callable[..., set[str]]) -> None:
    assert failing(None, images=2) == set()


@pytest.mark.parametrize("fault", sorted(EXPECTED))
def test_fault_is_found(failing: Callable[..., set[str]], fault: str) -> None:
    assert failing(fault, images=2 if fault == "stale_image" else 1) == EXPECTED[fault]


def test_every_fault_has_its_test() -> None:
    assert {path.stem for path in FAULTS.glob("*.py")} == set(EXPECTED)
