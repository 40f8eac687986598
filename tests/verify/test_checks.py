"""Each check fails for what it is there to see, and holds otherwise: on made-up outputs of the two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.checks import Comparison, relative_error
from chipmunk.verify.spec import IMAGES, Scenario

FACTS = ModelFacts(
    "model.py", "Flux", "double_blocks", "single_blocks", "img", "img_ids",
    BlockFacts("layers.py", "Double", attention=True, mlp="img_mlp"),
    BlockFacts("layers.py", "Single", attention=True, linear_in="linear1", linear_out="linear2"),
)  # fmt: skip

LAYERS = [f"double_blocks.{i}" for i in range(3)] + ["single_blocks.0"]

Outputs = dict[str, torch.Tensor]
Results = list[dict[str, Any]]
Change = Callable[[Outputs, Outputs, Results], None]


def healthy() -> tuple[Outputs, Outputs, Results]:
    """Outputs and results of two workers that agree: one scenario of two images, layers 2 and 3 sparse twice."""
    torch.manual_seed(0)
    dense = {f"{image}/{name}": torch.randn(2, 5) for image in (0, 1) for name in ("000", "001", "latents")}
    sparse = {name: tensor + 0.1 * torch.randn(2, 5) for name, tensor in dense.items()}
    original = {f"dense/denoise/{name}": tensor for name, tensor in dense.items()}
    original |= {f"oracle/denoise/{name}": tensor for name, tensor in sparse.items()}
    patched = {f"{job}/denoise/{name}": tensor.clone() for job in ("off", "kept") for name, tensor in dense.items()}
    patched |= {
        f"{job}/denoise/{n}": t.clone() for job in ("untouched", "off again") for n, t in dense.items() if n[0] == "0"
    }
    patched |= {f"sparse/denoise/{name}": tensor.clone() for name, tensor in sparse.items()}
    calls = [[layer, part, kind, 2] for layer in (2, 3) for part in ("attention", "mlp") for kind in ("full", "sparse")]
    counted = {"main": {"sparse": 2, "full": 2, "dense": {}}}
    never = {"main": {"sparse": 0, "full": 0, "dense": {"one of the first layers": 4}}}
    statistics = {
        "dense_model_calls": {},
        "skipped_model_calls": 3,
        "layers": [
            {"name": name, "attention": copy.deepcopy(part), "mlp": copy.deepcopy(part)}
            for name, part in zip(LAYERS, [never, never, counted, counted], strict=True)
        ],
    }
    operators = {"column_sparse_attention": 4, "sparse_mlp_in": 4}
    results: Results = [
        {
            "scenarios": [asdict(Scenario("denoise", "model", IMAGES, "default", 0))],
            "oracle": {"denoise": {"calls": calls, "skipped": 3, "smallest_margin": 1e-4}},
            "labels": {f"denoise/{image}": [[0, "7"], [0, "9"], [1, "7"], [0, "7"], [0, "9"]] for image in (0, 1)},
            "parameters": [["a.weight", "1"], ["b.weight", "2"]],
        },
        {
            "coverage": {"denoise": {"statistics": statistics, "operators": operators}},
            "parameters": [["a.weight", "1"], ["b.weight", "2"]],
            "loading": None,
            "found_configuration": False,
        },
    ]
    return original, patched, results


def compare(folder: Path, change: Change | None = None) -> Comparison:
    original, patched, results = healthy()
    if change is not None:
        change(original, patched, results)
    folders = folder / "original", folder / "patched"
    for path, tensors in zip(folders, (original, patched), strict=True):
        path.mkdir()
        save_file(tensors, path / "outputs.safetensors")
    return Comparison(FACTS, *folders, results)


def failed(comparison: Comparison) -> set[str]:
    return {check.name for check in comparison.checks() if not check.holds}


def test_two_sides_that_agree_pass_every_check(tmp_path: Path) -> None:
    comparison = compare(tmp_path)
    assert failed(comparison) == set()
    assert {check.name for check in comparison.checks()} == {
        "off", "everything kept", "parameters", "coverage", "oracle", "sparse error",
    }  # fmt: skip


def last_bit(tensors: Outputs, name: str) -> None:
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))


def scaled(tensors: Outputs, name: str, factor: float) -> None:
    tensors[name] = tensors[name] * factor


def layer(results: Results, number: int, part: str) -> dict[str, Any]:
    found: dict[str, Any] = results[1]["coverage"]["denoise"]["statistics"]["layers"][number][part]["main"]
    return found


def silently_dense(o: Outputs, p: Outputs, r: Results) -> None:
    layer(r, 2, "mlp").update(sparse=1, dense={"the linear layer is a LinearLora": 1})


def dense_on_both_sides(o: Outputs, p: Outputs, r: Results) -> None:
    """The oracle agrees that the layer ran dense; that does not make it covered."""
    layer(r, 3, "mlp").update(sparse=0)
    r[1]["coverage"]["denoise"]["operators"]["sparse_mlp_in"] = 2
    calls = r[0]["oracle"]["denoise"]["calls"]
    calls.remove([3, "mlp", "sparse", 2])


def nothing_sparse(o: Outputs, p: Outputs, r: Results) -> None:
    """No block was handed to Chipmunk, and the oracle agrees."""
    r[0]["oracle"]["denoise"]["calls"] = []
    coverage = r[1]["coverage"]["denoise"]
    coverage["statistics"]["layers"], coverage["operators"] = [], {}


CHANGES: list[tuple[str, set[str], Change]] = [
    ("one bit when off", {"off"}, lambda o, p, r: last_bit(p, "off/denoise/1/001")),
    ("one bit before anything is enabled", {"off"}, lambda o, p, r: last_bit(p, "untouched/denoise/0/000")),
    ("one bit after disabling", {"off"}, lambda o, p, r: last_bit(p, "off again/denoise/0/latents")),
    ("a model call missing when off", {"off"}, lambda o, p, r: void(p.pop("off/denoise/0/001"))),
    ("a model call too many when off", {"off"}, lambda o, p, r: p.update({"off/denoise/0/002": torch.ones(2, 5)})),
    ("kept, one step", {"everything kept"}, lambda o, p, r: scaled(p, "kept/denoise/1/000", 1 + 2e-5)),
    ("kept, nan", {"everything kept"}, lambda o, p, r: scaled(p, "kept/denoise/0/latents", float("nan"))),
    ("oracle, one step", {"oracle"}, lambda o, p, r: scaled(p, "sparse/denoise/1/001", 1 + 2e-4)),
    ("oracle, a call missing", {"oracle", "sparse error"}, lambda o, p, r: void(p.pop("sparse/denoise/1/001"))),
    ("sparse, infinite", {"oracle", "sparse error"}, lambda o, p, r: scaled(p, "sparse/denoise/0/000", float("inf"))),
    ("a parameter changed", {"parameters"}, lambda o, p, r: r[1]["parameters"][1].__setitem__(1, "3")),
    ("a parameter added", {"parameters"}, lambda o, p, r: r[1]["parameters"].append(["c", "3"])),
    ("a parameter lost", {"parameters"}, lambda o, p, r: void(r[1]["parameters"].pop())),
    ("parameters in another order", {"parameters"}, lambda o, p, r: r[1]["parameters"].reverse()),
    ("does not load", {"parameters"}, lambda o, p, r: r[1].update(loading="Missing key a.weight")),
    ("silently dense", {"coverage"}, silently_dense),
    ("dense on both sides", {"coverage"}, dense_on_both_sides),
    ("nothing sparse", {"coverage"}, nothing_sparse),
    ("a full step too many", {"coverage"}, lambda o, p, r: layer(r, 2, "attention").update(full=3)),
    (
        "counted but not computed",
        {"coverage"},
        lambda o, p, r: r[1]["coverage"]["denoise"]["operators"].update(column_sparse_attention=3),
    ),
    (
        "dense model calls",
        {"coverage"},
        lambda o, p, r: r[1]["coverage"]["denoise"]["statistics"]["dense_model_calls"].update({"no steps": 1}),
    ),
    ("repeated calls in a step that does not repeat any", {"coverage"}, lambda o, p, r: repeats(r, ran=1, wanted=0)),
    ("a repeated call that did not run dense", {"coverage"}, lambda o, p, r: repeats(r, ran=1, wanted=2)),
    ("no repeated call ran dense", {"coverage"}, lambda o, p, r: repeats(r, ran=0, wanted=2)),
    (
        "a step skipped too many",
        {"coverage"},
        lambda o, p, r: r[1]["coverage"]["denoise"]["statistics"].update(skipped_model_calls=4),
    ),
]


def repeats(r: Results, ran: int, wanted: int) -> None:
    """So many calls ran dense as a step's second from one place, and so many are."""
    if ran:
        reason = "a second call from the same place in one step (see chipmunk.slot)"
        r[1]["coverage"]["denoise"]["statistics"]["dense_model_calls"][reason] = ran
    r[0]["labels"]["denoise/0"] += [[0, "9"]] * wanted


def test_a_loop_that_iterates_inside_a_step_is_dense_there_by_design(tmp_path: Path) -> None:
    """All but a step's first call from one place: noted, and no failure."""
    comparison = compare(tmp_path, lambda o, p, r: repeats(r, ran=2, wanted=2))
    assert failed(comparison) == set()
    assert any("2 model calls of denoise" in note for note in comparison.notes())


def void(value: object) -> None:
    return None


@pytest.mark.parametrize(("expected", "change"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_difference_fails_its_check_and_no_other(tmp_path: Path, expected: set[str], change: Change) -> None:
    assert failed(compare(tmp_path, change)) == expected


def test_differences_within_the_limits_pass(tmp_path: Path) -> None:
    def change(o: Outputs, p: Outputs, r: Results) -> None:
        scaled(p, "kept/denoise/1/000", 1 + 5e-6)
        scaled(p, "sparse/denoise/1/001", 1 + 5e-5)

    assert failed(compare(tmp_path, change)) == set()


def test_with_a_configuration_in_reach_the_untouched_run_proves_nothing(tmp_path: Path) -> None:
    def change(o: Outputs, p: Outputs, r: Results) -> None:
        r[1]["found_configuration"] = True
        scaled(p, "untouched/denoise/0/000", 2)

    assert failed(compare(tmp_path, change)) == set()


@pytest.mark.parametrize(("margin", "error", "expected"), [(1e-8, 2e-4, ["denoise"]), (1e-8, 0, []), (1e-4, 2e-4, [])])
def test_only_a_failure_beside_a_near_tie_is_run_again(
    tmp_path: Path, margin: float, error: float, expected: list[str]
) -> None:
    def change(o: Outputs, p: Outputs, r: Results) -> None:
        r[0]["oracle"]["denoise"]["smallest_margin"] = margin
        scaled(p, "sparse/denoise/1/001", 1 + error)

    assert compare(tmp_path, change).undecided() == expected


def test_the_second_run_has_the_last_word(tmp_path: Path) -> None:
    def tie(o: Outputs, p: Outputs, r: Results) -> None:
        r[0]["oracle"]["denoise"]["smallest_margin"] = 1e-8
        scaled(p, "sparse/denoise/1/001", 1.5)

    for folder in ("first", "good", "bad"):
        (tmp_path / folder).mkdir()
    comparison = compare(tmp_path / "first", tie)
    comparison.decide(compare(tmp_path / "bad", tie))
    assert failed(comparison) == {"oracle"}
    comparison.decide(compare(tmp_path / "good"))
    assert failed(comparison) == set()


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == float("inf")
