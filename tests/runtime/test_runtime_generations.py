"""Whose caches are whose, and how long they live: generations, threads, errors."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, denoise, inputs, same, small
from torch import Tensor
from two_blocks import STEPS, build, call, enabled, fresh

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


def cache_references(model: Flux) -> list[weakref.ref[Tensor]]:
    session = model.__dict__["_chipmunk_session"]
    slots = [slot for generation in session.generations for slot in generation.slots.values()]
    return [weakref.ref(cache) for slot in slots for state in slot.layers if state for cache in state.caches()]


# Life of the caches.


def tap(times: Any, hold: Any) -> Any:
    hold(times)
    return times


@pytest.mark.parametrize("how", ["end", "break", "exception", "close", "return"])
def test_caches_are_freed(how: str) -> None:
    model, given, references = enabled(), inputs(), []

    def loop() -> None:
        loops: list[Any] = []  # only where a loop is closed by hand does anything but the loop hold it
        hold = loops.append if how == "close" else lambda times: None
        for step in tap(chipmunk.steps(model, range(STEPS)), hold):
            call(model, step, given)
            if step == 4:
                references.extend(cache_references(model))
                assert chipmunk.statistics(model).cache_bytes > 0
                if how == "break":
                    break
                if how == "exception":
                    raise KeyError
                if how == "close":
                    loops[0].close()
                if how == "return":
                    return

    if how == "exception":
        with pytest.raises(KeyError) as caught:
            loop()
        assert caught.value.__traceback__ is not None  # the frames are alive, the caches are not
    else:
        loop()
    assert len(references) == 3 * 6
    assert all(reference() is None for reference in references)
    assert chipmunk.statistics(model).cache_bytes == 0
    assert chipmunk.statistics(model).peak_cache_bytes > 0
    assert all("_chipmunk" not in block.__dict__ for block in [*model.double_blocks, *model.single_blocks])


def test_an_error_inside_the_model_frees_its_caches_and_leaves_no_state() -> None:
    model, given = enabled(), inputs()
    handle = None
    for step in chipmunk.steps(model, range(STEPS)):
        if step == 3:
            handle = model.single_blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError()))
            with pytest.raises(KeyError) as caught:
                call(model, step, given)
            assert caught.value is not None
            assert chipmunk.statistics(model).cache_bytes == 0
            assert all("_chipmunk" not in block.__dict__ for block in [*model.double_blocks, *model.single_blocks])
            handle.remove()
        else:
            call(model, step, given)
    # Step 4 was a first call again: two full attention steps, then sparse ones.
    assert chipmunk.statistics(model).layers[2].attention["main"].full == 2 + 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((inputs(seed=1), 12), (inputs(seed=2), 12)),
        ((inputs(seed=1), 12), (inputs(seed=2), 28)),
        ((inputs(seed=1), 17), (inputs(seed=1), 12)),
        ((inputs(9, 7), 12), (inputs(8, 10), 12)),
        ((inputs(batch=1), 12), (inputs(batch=2, seed=4), 12)),
        ((inputs(text=5), 12), (inputs(text=9), 12)),
    ],
)
def test_a_second_image_starts_clean(first: Any, second: Any) -> None:
    model = enabled()
    denoise(model, first[1], **first[0])
    assert same(denoise(model, second[1], **second[0]), fresh(*second))


def test_an_abandoned_loop_does_not_disturb_the_next_image() -> None:
    model, given = enabled(), inputs()
    abandoned = iter(chipmunk.steps(model, range(STEPS)))
    for _ in range(4):
        call(model, next(abandoned), given)
    assert same(denoise(model, STEPS, **inputs(seed=3)), fresh(inputs(seed=3)))
    del abandoned
    assert chipmunk.statistics(model).cache_bytes == 0


def alternate(model: Flux, loops: list[tuple[Iterator[int], dict[str, Tensor]]]) -> list[list[Tensor]]:
    results: list[list[Tensor]] = [[] for _ in loops]
    for _ in range(STEPS):
        for index, (times, given) in enumerate(loops):
            results[index].append(call(model, next(times), given))
    return results


def test_suspended_generators_are_independent() -> None:
    model, one, two = enabled(), inputs(seed=1), inputs(seed=2, batch=2)
    loops = [(iter(chipmunk.steps(model, range(STEPS))), given) for given in (one, two)]
    got = alternate(model, loops)
    for given, predictions in zip((one, two), got, strict=True):
        alone = enabled()
        assert same(predictions, [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))])


def test_a_loop_inside_a_loop() -> None:
    model, outer, inner = enabled(), inputs(seed=1), inputs(seed=2)
    got = []
    for step in chipmunk.steps(model, range(STEPS)):
        if step == 5:
            assert same(denoise(model, STEPS, **inner), fresh(inner))
        got.append(call(model, step, outer))
    alone = enabled()
    assert same(got, [call(alone, step, outer) for step in chipmunk.steps(alone, range(STEPS))])


def test_two_threads_on_one_model() -> None:
    model, given = enabled(), [inputs(seed=1), inputs(seed=2)]
    results: dict[int, list[Tensor]] = {}
    together = threading.Barrier(2, timeout=60)

    def work(index: int) -> None:
        with torch.no_grad():
            results[index] = denoise(model, STEPS, each=lambda _: together.wait(), **given[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in range(2):
        assert same(results[index], fresh(given[index]))
    assert chipmunk.statistics(model).dense_model_calls == {}


def test_a_call_from_another_thread_is_outside_the_loop() -> None:
    model, given, results = enabled(), inputs(), []
    for step in chipmunk.steps(model, range(9)):
        call(model, step, given)
        if step == 4:
            thread = threading.Thread(target=lambda: results.append(torch.no_grad()(call)(model, 4, given)))
            thread.start()
            thread.join(60)
    assert torch.equal(results[0], call(build(), 4, given))
    assert chipmunk.statistics(model).dense_model_calls == {"outside a sampling loop": 1}


def test_a_loop_that_moves_to_another_thread() -> None:
    model, given = enabled(), inputs()
    times, got = iter(chipmunk.steps(model, range(STEPS))), []

    @torch.no_grad()
    def some_steps() -> None:
        for _ in range(4):
            got.append(call(model, next(times), given))

    for _ in range(3):
        thread = threading.Thread(target=some_steps)
        thread.start()
        thread.join(60)
    alone = enabled()
    assert same(got, [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))])


def test_two_asyncio_tasks_on_one_model() -> None:
    model, given, results = enabled(), [inputs(seed=1), inputs(seed=2)], {}

    async def work(index: int) -> None:
        got = []
        for step in chipmunk.steps(model, range(STEPS)):
            got.append(call(model, step, given[index]))
            await asyncio.sleep(0)
        results[index] = got

    async def both() -> None:
        await asyncio.gather(work(0), work(1))

    asyncio.run(both())
    for index in range(2):
        alone = enabled()
        assert same(results[index], [call(alone, step, given[index]) for step in chipmunk.steps(alone, range(STEPS))])


def test_outside_a_loop_is_dense_to_the_bit() -> None:
    model, given = enabled(), inputs()
    assert torch.equal(call(model, 0, given), call(build(), 0, given))
    denoise(model, STEPS, **given)
    assert torch.equal(call(model, 0, given), call(build(), 0, given))
    assert chipmunk.statistics(model).dense_model_calls == {"outside a sampling loop": 2}


def test_two_models_in_one_loop() -> None:
    one, two, given = enabled(), build(seed=5), inputs()
    chipmunk.enable(two, small(attn__top_keys=0.5))
    got_one, got_two = [], []
    for step in chipmunk.steps(one, chipmunk.steps(two, range(STEPS))):
        got_one.append(call(one, step, given))
        got_two.append(call(two, step, given))
    alone = enabled()
    assert same(got_one, [call(alone, step, given) for step in chipmunk.steps(alone, range(STEPS))])
    other = build(seed=5)
    chipmunk.enable(other, small(attn__top_keys=0.5))
    assert same(got_two, [call(other, step, given) for step in chipmunk.steps(other, range(STEPS))])


# Modes and memory.


def test_inference_mode() -> None:
    model = enabled()
    with torch.inference_mode():
        got = denoise(model, STEPS, **inputs())
    assert same(got, fresh(inputs()))


@pytest.mark.parametrize("inference_first", [True, False])
def test_a_switch_of_inference_mode_starts_over(inference_first: bool) -> None:
    model, given, got = enabled(), inputs(), []
    for step in chipmunk.steps(model, range(17)):
        with torch.inference_mode() if (step < 5) == inference_first else torch.no_grad():
            got.append(call(model, step, given))
    alone = enabled()
    assert same(got[5:], [call(alone, step + 5, given) for step in chipmunk.steps(alone, range(12))])
    assert chipmunk.statistics(model).restarts == {"inference mode changed": 1}


@pytest.mark.parametrize("message", [None, "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_runs_the_rest_dense(message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from chipmunk.runtime import sparse_mlp

    model, given = enabled(), inputs()
    dense = [call(build(), step, given) for step in range(STEPS)]
    original, calls = sparse_mlp.means_through, []

    def full_memory(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory") if message is None else RuntimeError(message)
        return original(*args)

    monkeypatch.setattr(sparse_mlp, "means_through", full_memory)
    with pytest.warns(RuntimeWarning, match="did not fit into memory"):
        got = [call(model, step, given) for step in chipmunk.steps(model, range(STEPS))]
    assert same(got, dense)
    statistics = chipmunk.statistics(model)
    assert statistics.dense_model_calls == {"the caches did not fit into memory": STEPS}
    assert statistics.cache_bytes == 0
    assert same(denoise(model, STEPS, **given), fresh(given))  # the next image tries again


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    model = enabled()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        denoise(model, STEPS, **{**inputs(), "txt": torch.zeros(1, 5, 7)})


def test_outputs_are_never_cache_storage() -> None:
    """A caller may change every tensor that it is handed, in place."""
    model, given = enabled(), inputs()
    expected = [call(model, step, given) for step in chipmunk.steps(model, range(STEPS))]

    handles = []

    def spoil(value: Any) -> None:
        for tensor in value if isinstance(value, tuple) else (value,):
            tensor.fill_(1e9)

    for block in [*model.double_blocks, *model.single_blocks]:

        def keep_and_spoil(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            copy = tuple(t.clone() for t in out) if isinstance(out, tuple) else out.clone()
            spoil(out)
            return copy

        keep_and_spoil.__module__ = "torch.hooks"  # which read no tokens: they may be moved
        handles.append(block.register_forward_hook(keep_and_spoil, with_kwargs=True))
    got = []
    for step in chipmunk.steps(model, range(STEPS)):
        got.append(call(model, step, given).clone())
        for generation in model.__dict__["_chipmunk_session"].generations:
            for slot in generation.slots.values():
                assert all(cache.abs().max() < 1e8 for state in slot.layers if state for cache in state.caches())
    assert same(got, expected)


def test_what_the_calls_return_is_never_cache_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("attention", "mlp", "cat_linear", "split_linear")
    originals = {name: getattr(chipmunk, name) for name in names}

    class Spoiling:
        def __getattr__(self, name: str) -> Any:
            if name not in names:
                return getattr(chipmunk, name)

            def call_and_check(owner: Any, *args: Any, **kwargs: Any) -> Any:
                out = originals[name](owner, *args, **kwargs)
                state = owner if name == "attention" else owner.__dict__.get("_chipmunk")
                if state is not None:
                    held = {cache.untyped_storage().data_ptr() for cache in state.caches()}
                    given = {t.untyped_storage().data_ptr() for t in (out if isinstance(out, tuple) else (out,))}
                    assert not held & given, name
                return out

            return call_and_check

    model = enabled()
    monkeypatch.setattr(flux_model, "chipmunk", Spoiling())
    denoise(model, STEPS, **inputs())
    assert chipmunk.statistics(model).layers[2].mlp["main"].sparse == 10
