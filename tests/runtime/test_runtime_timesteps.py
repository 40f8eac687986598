"""Steps counted by the model's own timestep, where no marked sampling loop makes the calls."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, denoise, error, inputs, same, small
from torch import Tensor

import chipmunk
from chipmunk.runtime import timestep_clock

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMES = torch.linspace(1, 0, 13).tolist()[:-1]
NOTHING_ELSE: dict[str, int] = {}


class Clocked(Flux):
    forward = chipmunk.model_forward(
        double="double_blocks", single="single_blocks", image="img", ids="img_ids", timesteps="timesteps"
    )(Flux.forward.__wrapped__)  # type: ignore[attr-defined]


def build(kind: type[Flux] = Clocked, **changes: Any) -> Flux:
    model = flux_model.build(0, kind, double=2, single=2)
    chipmunk.enable(model, small(**changes))
    return model


def dense() -> Flux:
    return flux_model.build(0, Flux, double=2, single=2)


def drive(model: Any, times: Iterable[float] = TIMES, **given: Any) -> list[Tensor]:
    """A sampler that Chipmunk knows nothing of."""
    img, predictions, times = given.pop("img"), [], list(times)
    for now, then in zip(times, [*times[1:], 0.0], strict=True):
        predictions.append(model(img=img, timesteps=torch.full((img.shape[0],), now), **given))
        img = img + (then - now) * predictions[-1]
    return predictions


def sparse_calls(model: Flux, slot: str = "main") -> int:
    calls = chipmunk.statistics(model).layers[2].mlp.get(slot)
    return 0 if calls is None else calls.sparse


def caches(model: Flux) -> list[weakref.ref[Tensor]]:
    session = model.__dict__["_chipmunk_session"]
    slots = [slot for generation in session.generations for slot in generation.slots.values()]
    return [weakref.ref(cache) for slot in slots for state in slot.layers if state for cache in state.caches()]


# Near misses: what cannot be told apart runs dense.


def test_without_the_parameter_such_calls_run_dense() -> None:
    model = build(Flux)
    assert same(drive(model, **inputs()), drive(dense(), **inputs()))
    assert chipmunk.statistics(model).dense_model_calls == {"outside a sampling loop": 12}


def test_tiles_cannot_be_told_apart() -> None:
    model, plain = build(), dense()
    tiles = [inputs(seed=seed) for seed in (1, 2)]
    for tile in tiles:
        tile["txt"] = tiles[0]["txt"]
    for now in TIMES:
        given = {"timesteps": torch.full((1,), now)}
        for tile in tiles:
            got, expected = model(**tile, **given), plain(**tile, **given)
            first = now == 1 and tile is tiles[0]
            assert torch.equal(got, expected) or (first and error([got], [expected]) < 1e-5)
    reason = "calls at one timestep that cannot be told apart"
    assert chipmunk.statistics(model).dense_model_calls == {reason: 23}
    assert caches(model) == []


@pytest.mark.parametrize(
    ("timesteps", "reason"),
    [
        (torch.tensor([1.0, 0.5]), "the timesteps differ within the batch"),
        (torch.zeros(0), "the timestep is no number"),
        (torch.zeros(2, dtype=torch.complex64), "the timestep is no number"),
    ],
)
def test_timesteps_that_are_no_single_number(timesteps: Tensor, reason: str) -> None:
    class Loose(Clocked):
        @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", timesteps="timesteps")
        def forward(self, img: Tensor, timesteps: Any, **given: Any) -> Tensor:  # type: ignore[override]
            return Flux.forward.__wrapped__(self, img=img, timesteps=torch.ones(2), **given)  # type: ignore[attr-defined, no-any-return]

    model = build(Loose)
    for _ in range(3):
        model(**inputs(batch=2), timesteps=timesteps)
    assert chipmunk.statistics(model).dense_model_calls == {reason: 3}


def test_a_marked_loop_comes_first() -> None:
    model, marked = build(), build(Flux)
    assert same(denoise(model, 12, **inputs()), denoise(marked, 12, **inputs()))
    assert model.__dict__["_chipmunk_session"].clock._generation is None


def test_a_call_that_is_made_twice_runs_dense() -> None:
    """Guidance that skips layers calls the model twice with the very same inputs."""
    model, given, img = build(), inputs(), inputs()["img"]
    for now in TIMES:
        for _ in range(2):
            pred = model(**{**given, "img": img}, timesteps=torch.full((1,), now))
        img = img - pred / 12
    assert chipmunk.statistics(model).dense_model_calls == {"calls at one timestep that cannot be told apart": 23}


# Steps.


def test_timesteps_that_are_rounded_to_the_same_number_are_steps() -> None:
    """In bfloat16, the first steps of a large image may all be at 1000."""
    model, given, img = build(), inputs(), inputs()["img"]
    for now in (1000, 1000, 1000, 996, 996, 992, 988, 980, 960, 900):
        img = img + 0.01 * model(**{**given, "img": img}, timesteps=torch.full((1,), float(now)))
    assert chipmunk.statistics(model).dense_model_calls == NOTHING_ELSE
    assert sparse_calls(model) == 9


def test_a_run_is_the_run_of_a_marked_loop() -> None:
    model, given = build(), inputs()
    assert same(drive(model, **given), denoise(build(Flux), 12, **given))
    assert chipmunk.statistics(model).dense_model_calls == NOTHING_ELSE
    assert sparse_calls(model) == 10


def test_everything_kept_is_dense() -> None:
    model = build(attn__top_keys=1.0, mlp__top_keys=1.0)
    assert error(drive(model, **inputs()), drive(dense(), **inputs())) < 1e-5
    assert sparse_calls(model) == 10


@pytest.mark.parametrize("second", [inputs(seed=5), inputs(height=6), inputs(batch=2)])
def test_a_timestep_that_rises_begins_an_image(second: dict[str, Tensor]) -> None:
    model = build()
    first = drive(model, TIMES[:7], **inputs())  # given up half way
    assert same(drive(model, **second), drive(build(), **second))
    assert same(first, drive(build(), **inputs())[:7])


def test_inversion_is_an_image_of_its_own() -> None:
    model, given = build(attn__top_keys=1.0, mlp__top_keys=1.0), inputs()
    for times in (TIMES[::-1], TIMES, TIMES[::-1]):
        before = sparse_calls(model)
        assert error(drive(model, times, **given), drive(dense(), times, **given)) < 1e-5
        assert sparse_calls(model) >= before + 9
    exact = build()
    drive(exact, TIMES[::-1], **given)
    img = inputs(seed=3)["img"]
    assert same(drive(exact, TIMES[1:], **{**given, "img": img}), drive(build(), TIMES[1:], **{**given, "img": img}))


def test_an_image_that_begins_where_another_was_given_up_loses_two_steps() -> None:
    model = build()
    drive(model, TIMES[:1], **inputs())
    drive(model, **{**inputs(), "img": inputs(seed=3)["img"]})
    reason = "calls at one timestep that cannot be told apart"
    assert chipmunk.statistics(model).dense_model_calls == {reason: 2}
    assert sparse_calls(model) == 9


class Failed(Exception):
    pass


@pytest.mark.parametrize("step", [0, 1, 5])
def test_an_image_that_fails_loses_the_next_one_no_steps(step: int) -> None:
    model, given = build(), inputs()

    def fail(*_: Any) -> None:
        raise Failed

    if step:
        drive(model, TIMES[:step], **given)
    handle = model.out.register_forward_hook(fail)
    with pytest.raises(Failed):
        drive(model, TIMES[step:], **given)
    assert chipmunk.statistics(model).cache_bytes == 0
    handle.remove()
    assert same(drive(model, **given), drive(build(), **given))
    assert chipmunk.statistics(model).dense_model_calls == NOTHING_ELSE


def test_images_of_one_step_are_images() -> None:
    model = build()
    for seed, now in enumerate((0.3, 0.6, 0.2, 0.8, 0.9)):
        given = inputs(seed=seed)
        assert same(drive(model, [now], **given), drive(build(), [now], **given))


def test_numbers_and_integers_are_timesteps() -> None:
    class Numbers(Clocked):
        @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", timesteps="t")
        def forward(self, img: Tensor, t: float, **given: Any) -> Tensor:  # type: ignore[override]
            times = torch.full((img.shape[0],), float(t))
            return Flux.forward.__wrapped__(self, img=img, timesteps=times, **given)  # type: ignore[attr-defined, no-any-return]

    for times in (range(1000, 400, -50), torch.arange(1000, 400, -50)):
        model = build(Numbers)
        for now in times:
            model(t=now, **inputs())
        assert sparse_calls(model) == 10


def test_a_model_compiled_as_a_whole() -> None:
    model = build()
    compiled = torch.compile(model, backend="eager")
    drive(compiled, **inputs())
    assert sparse_calls(model) == 10
    torch._dynamo.reset()


# Call slots.


def guided(model: Any, given: dict[str, Tensor], calls: Any, marked: bool = False) -> list[Tensor]:
    """Each step calls the model with the prompts that `calls(step)` says, in that order."""
    texts = {"main": given["txt"], "other": torch.flip(given["txt"], (-1,)), "long": given["txt"].repeat(1, 2, 1)}
    img, results = given["img"], []
    for step, now in enumerate(chipmunk.steps(model, TIMES) if marked else TIMES):
        predictions = []
        for name in calls(step):
            called = chipmunk.slot(model, name) if marked and name != "main" else model
            text = texts[name].clone()
            ids = torch.zeros(img.shape[0], text.shape[1], 3)
            given = {**given, "img": img, "txt": text, "txt_ids": ids}
            predictions.append(called(**given, timesteps=torch.full((img.shape[0],), now)))
        results += predictions
        img = img - torch.stack(predictions).mean(0) / 12
    return results


@pytest.mark.parametrize(
    "calls",
    [
        lambda step: ("main", "other"),
        lambda step: ("main", "other") if step >= 4 else ("main",),
        lambda step: ("main", "long", "other"),
        # the order changes, and a prompt is left out
        lambda step: [("main", "other"), ("other", "main"), ("other",)][step % 3 if step > 2 else 0],
    ],
)
def test_slots_are_told_by_their_inputs(calls: Any) -> None:
    model = build()
    expected = guided(build(Flux), inputs(), calls, marked=True)
    assert same(guided(model, inputs(), calls), expected)
    assert chipmunk.statistics(model).dense_model_calls == NOTHING_ELSE
    assert sparse_calls(model, "main 2") > 0


def test_a_prompt_that_changes_starts_over() -> None:
    model = build()
    guided(model, inputs(), lambda step: ("main",) if step < 6 else ("other",))
    statistics = chipmunk.statistics(model)
    assert statistics.restarts == {"an input besides the image changed": 1}
    assert statistics.layers[2].mlp["main"].sparse == 5
    assert statistics.layers[2].mlp["main 2"].sparse == 5
    assert len(caches(model)) > 0
    slots = [g.slots for g in model.__dict__["_chipmunk_session"].generations]
    assert [list(s) for s in slots] == [["main 2"]]  # what is not called any more is forgotten


def test_a_text_buffer_that_is_overwritten_is_noticed() -> None:
    model, given = build(), inputs()
    first, buffer = given["txt"].clone(), given["txt"]
    for now in TIMES:
        for text in (first, first * 2):
            buffer.copy_(text)
            model(**given, timesteps=torch.full((1,), now))
    assert sparse_calls(model, "main 2") == 10


def test_a_call_from_another_thread_is_another_image() -> None:
    model, given, results = build(), inputs(), []
    drive(model, TIMES[:6], **given)
    call = torch.no_grad()(lambda: results.extend(drive(model, TIMES[6:], **given)))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert same(results, drive(build(), TIMES[6:], **given))


# Life of the caches.


def test_autograd_disable_and_deletion_free_the_caches() -> None:
    for how in ("autograd", "disable", "enable", "delete"):
        model = build()
        drive(model, **inputs())
        held = caches(model)
        assert held
        if how == "autograd":
            with torch.enable_grad():
                drive(model, TIMES[:1], **inputs())
        elif how == "disable":
            chipmunk.disable(model)
        elif how == "enable":
            chipmunk.enable(model, small())
        else:
            del model
            gc.collect()
        assert [cache for cache in held if cache() is not None] == [], how


def test_an_image_of_the_same_schedule_frees_its_caches_with_the_last_step() -> None:
    model = build()
    drive(model, **inputs())
    assert caches(model)
    assert same(drive(model, **inputs(seed=3)), drive(build(), **inputs(seed=3)))
    assert caches(model)  # once may be chance
    assert same(drive(model, **inputs(seed=4)), drive(build(), **inputs(seed=4)))
    assert caches(model) == []
    longer = drive(model, [*TIMES, 0.01, 0.001], **inputs())  # no harm where the guess is wrong
    assert same(longer[:12], drive(build(), **inputs()))


def test_a_schedule_among_the_inputs_tells_the_end_and_the_number_of_steps() -> None:
    class Told(Clocked):
        @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", timesteps="timesteps")
        def forward(self, img: Tensor, timesteps: Tensor, options: Any, **given: Any) -> Tensor:  # type: ignore[override]
            return Flux.forward.__wrapped__(self, img=img, timesteps=timesteps, **given)  # type: ignore[attr-defined, no-any-return]

    model = build(Told)
    options = {"sample_sigmas": torch.tensor([*TIMES, 0.0]), "cond_or_uncond": [0]}
    drive(model, **inputs(), options=options)
    assert sparse_calls(model) == 10
    assert caches(model) == []
    few = build(Told)
    drive(few, TIMES[-6:], **inputs(), options=options)
    assert chipmunk.statistics(few).dense_model_calls == {"the loop has fewer than 8 steps (min_steps)": 6}


def test_idle_caches_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    drive(model, TIMES[:3], **inputs())
    before = threading.active_count()
    monkeypatch.setattr(timestep_clock, "IDLE_SECONDS", 0.05)
    chipmunk.enable(model, small())
    drive(model, **inputs())
    held = caches(model)
    assert held
    for _ in range(200):
        if all(cache() is None for cache in held):
            break
        time.sleep(0.02)
    assert [cache for cache in held if cache() is not None] == []
    assert threading.active_count() <= before
    assert chipmunk.statistics(model).cache_bytes == 0
