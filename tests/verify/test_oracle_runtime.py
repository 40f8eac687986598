"""The runtime, on the patched starter repository, gives the numbers that the oracle gives on the unpatched one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk
from chipmunk.config import Config
from chipmunk.verify.oracle import Oracle
from tests.end_to_end.starter import FACTS, STARTER, Repository, inputs, load, patch, small_config

Case = dict[str, Any]

SKIPPING = {"is_enabled": True, "threshold": 0.6, "first_steps": 3, "max_consecutive": 3}

CASES: dict[str, Case] = {
    "default-like": {},
    "batch of two": {"batch": 2},
    "odd grid": {"height": 3, "width": 11},
    "one row": {"height": 1, "width": 30},
    "even grid, whole groups": {"height": 8, "width": 4, "text": 8},
    "first selection kept": {"attn": {"recompute_mask": False}},
    "first selection kept, batch of two": {"batch": 2, "attn": {"recompute_mask": False, "random_keys": 0.1}},
    "neurons chosen every 2 steps": {"steps": 16, "mlp": {"block_mask_cache": 2}},
    "neurons chosen every 3 steps": {"steps": 19, "mlp": {"block_mask_cache": 3, "full_step_every": 6}},
    "one full step": {"steps": 14, "mlp": {"full_step_every": 100, "block_mask_cache": 3}},
    "parts of groups": {"mlp": {"mbm": 4}},
    "parts that leave a rest": {"height": 3, "width": 6, "mlp": {"bm": 12, "mbm": 3}},
    "scheduled full steps": {"attn": {"full_step_schedule": [0, 1, 5, 9]}},
    "schedule without step 1": {"attn": {"full_step_schedule": [4]}},
    "empty schedule": {"attn": {"full_step_schedule": []}},
    "full every 2 steps": {"attn": {"full_step_every": 2}, "mlp": {"full_step_every": 2}},
    "full on every step": {"attn": {"full_step_every": 1}, "mlp": {"full_step_every": 1}},
    "random keys": {"attn": {"random_keys": 0.2}},
    "random keys only, almost": {"attn": {"top_keys": 0.0, "random_keys": 0.3}, "mlp": {"top_keys": 0.0}},
    "no random neurons": {"mlp": {"random_keys": 0.0}},
    "no token order": {"patchify": {"is_enabled": False}},
    "one level of patches": {"patchify": {"chunk_size_2": 1}},
    "all layers sparse": {"attn": {"first_n_dense_layers": 0}, "mlp": {"first_n_dense_layers": 0}},
    "different first layers": {"attn": {"first_n_dense_layers": 4}, "mlp": {"first_n_dense_layers": 1}},
    "attention only": {"mlp": {"is_enabled": False}},
    "MLPs only": {"attn": {"is_enabled": False}},
    "everything kept": {"attn": {"top_keys": 1.0}, "mlp": {"top_keys": 1.0}},
    "everything kept by rounding": {"attn": {"counts_multiple_of": 64}, "mlp": {"counts_multiple_of": 256}},
    "one query group": {"attn": {"mbm": 64}},
    "one row group": {"mlp": {"bm": 64, "mbm": 64}},
    "too few steps": {"steps": 7, "min_steps": 8},
    "too few steps to skip any": {"steps": 7, "min_steps": 8, "step_caching": SKIPPING},
    "steps skipped, the original's way": {"steps": 26, "step_caching": {"is_enabled": True, "mode": "static"}},
    "full steps skipped": {
        "steps": 16,
        "step_caching": {"is_enabled": True, "skip_step_schedule": [0, 1, 4, 5, 8, 9, 10, 13, 15]},
        "config_steps": 16,
        "attn": {"full_step_every": 4},
        "mlp": {"full_step_every": 5},
    },
    "scheduled full steps skipped": {
        "steps": 16,
        "step_caching": {"is_enabled": True, "skip_step_schedule": [5, 6, 9, 10, 11], "extrapolation": 0},
        "config_steps": 16,
        "attn": {"full_step_schedule": [0, 5, 9, 10]},
        "mlp": {"block_mask_cache": 3, "full_step_every": 6},
    },
    "steps skipped by the error": {"steps": 20, "step_caching": SKIPPING},
    "steps skipped by a curve": {"steps": 20, "step_caching": {**SKIPPING, "extrapolation": 2, "threshold": 3.0}},
    "residuals used again": {"steps": 16, "step_caching": {**SKIPPING, "extrapolation": 0}},
    "half of the steps": {"steps": 19, "step_caching": {"is_enabled": True, "keep": 0.5, "max_consecutive": 1}},
    "a third of the steps": {"steps": 20, "batch": 2, "step_caching": {"is_enabled": True, "keep": 0.33}},
    "nothing sparse, steps skipped": {
        "attn": {"is_enabled": False},
        "mlp": {"is_enabled": False},
        "step_caching": {**SKIPPING, "threshold": 3.0},
    },
}


@pytest.fixture(scope="module")
def original() -> Repository:
    return load(STARTER)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return load(patch(tmp_path_factory.mktemp("starter")))


def call(model: Any, arguments: dict[str, Tensor], step: int) -> Tensor:
    """One model call at a time of its own; the latents move with the step, so that no caches stay true."""
    batch = arguments["img"].shape[0]
    img = arguments["img"] * (1 - 0.02 * step) + 0.02 * step * arguments["txt"].mean()
    return model(**(arguments | {"img": img}), timesteps=torch.full((batch,), 1 - step / 20))


def test_the_comparison_tells_configurations_apart(original: Repository) -> None:
    """The near misses: one key or neuron more, another order, another random number, and the outputs are far apart."""
    arguments, steps = inputs(), 6

    def run(**case: Any) -> list[Tensor]:
        with torch.no_grad(), Oracle(original.model(), FACTS, small_config(**case), 8) as oracle:
            return [call(oracle.model, arguments, step) for step in range(steps)]

    base = run()
    for case in (
        {"attn": {"top_keys": 0.25}},
        {"attn": {"random_keys": 0.02}},
        {"mlp": {"random_keys": 0.04}},
        {"mlp": {"mbm": 4}},
        {"patchify": {"is_enabled": False}},
    ):
        assert relative(run(**case), base) > 1e-3


def relative(outputs: list[Tensor], expected: list[Tensor]) -> float:
    assert len(outputs) == len(expected)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, expected, strict=True))


def compare(
    original: Repository,
    patched: Repository,
    config: Config,
    arguments: dict[str, Tensor],
    steps: int = 12,
    change: Callable[[Any], None] = lambda model: None,
) -> tuple[int, ...]:
    """Run both sides; `change` is done to both models first. Returns the steps skipped."""
    with torch.no_grad():
        model = original.model()
        change(model)
        with Oracle(model, FACTS, config, steps) as oracle:
            expected = [call(model, arguments, step) for step in range(steps)]

        model = patched.model()
        change(model)
        chipmunk.enable(model, config)
        outputs = [call(model, arguments, step) for step in chipmunk.steps(model, range(steps))]
    assert relative(outputs, expected) < 1e-4, f"closest decision: {oracle.smallest_margin:.1e}"
    skipped = chipmunk.statistics(model).skipped_steps.get("main", ())
    assert skipped == tuple(step for step, _ in oracle.skipped)
    for layer, counted in enumerate(chipmunk.statistics(model).layers):
        for part in ("attention", "mlp"):
            ran_sparse = sum(calls.sparse for calls in getattr(counted, part).values())
            assert ran_sparse == oracle.calls[layer, part, "sparse"]
    return skipped


@pytest.mark.parametrize("name", CASES)
def test_runtime_equals_oracle(original: Repository, patched: Repository, name: str) -> None:
    case = dict(CASES[name])
    shape = {key: case.pop(key) for key in ("height", "width", "text", "batch") if key in case}
    steps = case.pop("steps", 12)
    if "config_steps" in case:
        case["steps"] = case.pop("config_steps")
    skipped = compare(original, patched, small_config(**case), inputs(**shape), steps)
    assert bool(skipped) == ("step_caching" in case and steps >= 8)


@pytest.mark.parametrize("first_axis", [0.0, 1.0])
def test_a_reference_image_keeps_its_place(original: Repository, patched: Repository, first_axis: float) -> None:
    """Its tokens follow the image's, with ids of their own in column 0 or the same ids again."""
    image, reference = inputs(), inputs(4, 3, seed=8)
    reference["img_ids"] = reference["img_ids"] + torch.tensor([first_axis, 0.0, 0.0])
    both = {name: torch.cat((image[name], reference[name]), dim=1) for name in ("img", "img_ids")}
    compare(original, patched, small_config(), image | both)


def test_ids_that_differ_between_batch_elements(original: Repository, patched: Repository) -> None:
    arguments = inputs(batch=2)
    arguments["img_ids"] = torch.cat((inputs(5, 7)["img_ids"], inputs(7, 5)["img_ids"]))
    compare(original, patched, small_config(), arguments)


class LoraLinear(torch.nn.Linear):
    """A subclass with its own forward: a view of its weight would lose what it adds."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


def test_subclasses_of_linear_stay_dense(original: Repository, patched: Repository) -> None:
    def change(model: Any) -> None:
        for linear in (
            model.double_blocks[2].img_mlp[2],
            model.single_blocks[0].linear1,
            model.single_blocks[1].linear2,
        ):
            linear.__class__ = LoraLinear

    compare(original, patched, small_config(), inputs(), change=change)


def test_linears_without_bias(original: Repository, patched: Repository) -> None:
    def change(model: Any) -> None:
        for linear in (
            model.double_blocks[2].img_mlp[0],
            model.single_blocks[0].linear1,
            model.single_blocks[0].linear2,
        ):
            linear.bias = None

    compare(original, patched, small_config(), inputs(), change=change)


def test_two_slots_the_second_from_step_2(original: Repository, patched: Repository) -> None:
    config, steps = small_config(), 12
    first, second = inputs(), inputs(seed=5)

    with torch.no_grad(), Oracle(original.model(), FACTS, config, steps) as oracle:
        expected = []
        for step in range(steps):
            oracle.begin_step(step)
            expected.append(call(oracle.model, first, step))
            if step >= 2:
                oracle.slot("neg_pred")
                expected.append(call(oracle.model, second, step))

    model = patched.model()
    chipmunk.enable(model, config)
    outputs = []
    with torch.no_grad():
        for step in chipmunk.steps(model, range(steps)):
            outputs.append(call(model, first, step))
            if step >= 2:
                outputs.append(call(chipmunk.slot(model, "neg_pred"), second, step))
    assert relative(outputs, expected) < 1e-4


@pytest.mark.parametrize("caching", [{}, {"step_caching": {"is_enabled": True, "keep": 0.5, "max_consecutive": 1}}])
def test_a_second_call_from_one_place_in_a_step_is_dense(
    original: Repository, patched: Repository, caching: dict[str, Any]
) -> None:
    """A loop that iterates inside its steps: each step's first call goes on where the last one's left off."""
    config, steps, rounds = small_config(**caching), 16, (3, 1, 2)
    arguments = inputs()
    calls = [(step, again) for step in range(steps) for again in range(rounds[step % 3])]

    with torch.no_grad(), Oracle(original.model(), FACTS, config, steps) as oracle:
        oracle.follow([(step, "guess") for step, _ in calls])
        expected = [call(oracle.model, arguments, step + 0.3 * again) for step, again in calls]
    with torch.no_grad():
        dense = [call(original.model(), arguments, step + 0.3 * again) for step, again in calls]

    model = patched.model()
    chipmunk.enable(model, config)
    outputs = []
    with torch.no_grad():
        for step in chipmunk.steps(model, range(steps)):
            outputs += [call(model, arguments, step + 0.3 * again) for again in range(rounds[step % 3])]
    assert relative(outputs, expected) < 1e-4
    repeated = [index for index, (_, again) in enumerate(calls) if again]
    assert all(torch.equal(expected[index], dense[index]) for index in repeated)
    assert list(chipmunk.statistics(model).dense_model_calls.values()) == [len(repeated)]
    assert chipmunk.statistics(model).skipped_model_calls == len(oracle.skipped)
