"""Blocks that more than one model or thread runs, and loops handed on: nobody finds another call's caches."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_model import Flux, denoise, inputs, same, small
from torch import Tensor
from two_blocks import STEPS, build, call, enabled, fresh

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, done by another thread while this one waits."""
    results: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return results[0]


def here(work: Callable[[], Any]) -> Any:
    return work()


def sharing(model: Flux, seed: int = 0) -> Flux:
    """A model of its own with the other's blocks."""
    other = build(seed)
    other.double_blocks, other.single_blocks = model.double_blocks, model.single_blocks
    return other


def in_the_middle(model: Flux, work: Callable[[], Any], where: Callable[[Flux], Any], given: Any) -> list[Tensor]:
    """A loop; from its fourth step on, `work` is done while block or part `where(model)` runs."""
    steps: list[int] = []
    busy: list[bool] = []

    def hook(*_: Any) -> None:
        if len(steps) > 3 and not busy:
            busy.append(True)
            work()
            busy.clear()

    hook.__module__ = "torch.hooks"  # which read no tokens: they may be moved
    handle = where(model).register_forward_pre_hook(hook)
    got = denoise(model, STEPS, each=steps.append, **given)
    handle.remove()
    return got


PLACES = {
    "last double block": lambda model: model.double_blocks[1],
    "between the parts of a single block": lambda model: model.single_blocks[1].norm,
    "inside a double block": lambda model: model.double_blocks[1].img_proj,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("by", [here, in_a_thread])
def test_a_second_model_with_the_same_blocks(place: str, by: Callable[[Any], Any]) -> None:
    model, given, other_given = enabled(), inputs(seed=1), inputs(seed=2)
    other = sharing(model, seed=4)
    chipmunk.enable(other, small())
    expected = call(sharing(build(), seed=4), 3, other_given)
    found: list[Tensor] = []

    def inside() -> None:
        by(lambda: found.extend(call(other, 3, other_given) for _ in chipmunk.steps(other, range(STEPS))))

    got = in_the_middle(model, inside, PLACES[place], given)
    assert same(got, fresh(given))
    assert found
    assert all(torch.allclose(each, expected, atol=1e-5) for each in found)
    assert chipmunk.statistics(other).dense_model_calls == {"another model's call runs these blocks": len(found)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["off", "a shallow copy", "blocks alone"])
def test_another_thread_that_runs_the_blocks_without_chipmunk(place: str, kind: str) -> None:
    model, given, other_given = enabled(), inputs(seed=1), inputs(seed=2)
    chipmunk.disable(plain := build())
    other: Any = sharing(model)
    if kind == "a shallow copy":
        other = copy.copy(model)
    elif kind == "off":
        chipmunk.disable(other)

    def work(which: Flux) -> Tensor:
        if kind != "blocks alone":
            return call(which, 3, other_given)
        x = torch.ones(1, 63, 32)
        vec, pe = torch.ones(1, 32), torch.ones(1, 1, 63, 8, 2)
        out: Tensor = which.single_blocks[1](x, vec, pe)
        return out

    expected, found = work(plain), list[Tensor]()
    got = in_the_middle(model, lambda: found.append(in_a_thread(lambda: work(other))), PLACES[place], given)
    assert same(found, [expected] * len(found))
    assert found
    assert same(got, fresh(given))


def test_two_models_with_the_same_blocks_in_turns() -> None:
    """No call inside another one: both are sparse, each with caches of its own."""
    one, given = enabled(), inputs()
    two = sharing(one)
    chipmunk.enable(two, small())
    got: list[list[Tensor]] = [[], []]
    for step, _ in zip(chipmunk.steps(one, range(STEPS)), chipmunk.steps(two, range(STEPS)), strict=True):
        for index, model in enumerate((one, two)):
            got[index].append(call(model, step, given))
    alone = enabled()
    expected = [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))]
    assert same(got[0], expected)
    assert same(got[1], expected)


def test_threads_that_begin_at_once_share_one_session(tmp_path: Path) -> None:
    """A server's first requests come together: the model finds its configuration once, and all of them run sparse."""
    (tmp_path / "chipmunk-config.yml").write_text(json.dumps(small()))
    model, given = build(), inputs()
    together, results = threading.Barrier(4, timeout=60), list[list[Tensor]]()

    def work() -> None:
        with torch.no_grad():
            together.wait()
            results.append(denoise(model, STEPS, **given))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = fresh(given)
    assert len(results) == 4
    assert all(same(got, expected) for got in results)
    statistics = chipmunk.statistics(model)
    assert statistics.dense_model_calls == {}
    assert statistics.model_calls == 4 * STEPS


# Loops that threads hand on.


def test_a_loop_that_another_thread_has_ended_owns_no_calls() -> None:
    model, given = enabled(), inputs()
    times = iter(chipmunk.steps(model, range(STEPS)))
    call(model, next(times), given)
    in_a_thread(lambda: list(times))
    expected = call(build(), 5, given)
    for _ in range(3):
        assert torch.equal(call(model, 5, given), expected)
    assert chipmunk.statistics(model).dense_model_calls == {"outside a sampling loop": 3}
    assert chipmunk.statistics(model).cache_bytes == 0


def test_a_loop_that_has_moved_on_in_another_thread_owns_no_calls_here() -> None:
    model, given, other = enabled(), inputs(), inputs(seed=2)
    times = iter(chipmunk.steps(model, range(STEPS)))
    got: list[Tensor] = []

    def advance_and_call() -> None:
        step = next(times)
        waiting.set()
        assert called.wait(60)
        got.append(call(model, step, given))

    got.append(call(model, next(times), given))
    for _ in range(STEPS - 1):
        waiting, called = threading.Event(), threading.Event()
        thread = threading.Thread(target=torch.no_grad()(advance_and_call))
        thread.start()
        assert waiting.wait(60)
        assert torch.equal(call(model, 5, other), call(build(), 5, other))
        called.set()
        thread.join(60)
    alone = enabled()
    assert same(got, [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))])
    assert chipmunk.statistics(model).dense_model_calls == {"outside a sampling loop": STEPS - 1}
