"""Whatever a process did before or does beside it, a picture is what a fresh process draws, or dense and counted."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk
from tests.end_to_end.fresh import PICTURES, Picture, denoising, draw
from tests.end_to_end.starter import STARTER, Repository, inputs, load, patch, small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order as in the fresh processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_configuration_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout has a chipmunk-config.yml, which would turn every model on."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return load(patch(tmp_path_factory.mktemp("starter")))


@pytest.fixture(scope="module")
def fresh(patched: Repository, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Each picture, dense and sparse."""
    out = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-m", "tests.end_to_end.fresh", str(patched.root), str(out)]
    subprocess.run(command, cwd=out, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=200)
    return {name: torch.load(out / f"{name}.pt") for name in PICTURES}


@pytest.fixture
def model(patched: Repository) -> Any:
    model = patched.model()
    chipmunk.enable(model, small_config())
    return model


def inputs_of(picture: Picture) -> dict[str, Tensor]:
    return inputs(picture.height, picture.width, batch=picture.batch, seed=picture.seed)


def same(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= 1e-5 * expected.norm())


def dense_calls(model: Any) -> int:
    return sum(chipmunk.statistics(model).dense_model_calls.values())


def finish(loop: Generator[None, None, Tensor], steps: int | None = None) -> Tensor | None:
    """Go on with a paused loop, for `steps` steps or to its end."""
    done = 0
    while steps is None or done < steps:
        try:
            next(loop)
        except StopIteration as end:
            latents: Tensor = end.value
            return latents
        done += 1
    return None


def test_sparse_pictures_are_not_dense_ones(fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The near miss: if they were, everything below would hold without Chipmunk."""
    for dense, sparse in fresh.values():
        assert (sparse - dense).norm() > 1e-3 * dense.norm()


def test_dense_pictures_are_the_original_ones(fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    original = load(STARTER)
    for name, (dense, _) in fresh.items():
        assert torch.equal(draw(original, original.model(), PICTURES[name]), dense)


def test_one_picture_after_another(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Of other step counts, resolutions and batch sizes; at the end the first once more."""
    for name in [*PICTURES, "first", "first"]:
        assert same(draw(patched, model, PICTURES[name]), fresh[name][1]), name
        assert chipmunk.statistics(model).cache_bytes == 0
    assert dense_calls(model) == 0


def test_two_models_in_turn(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    other = patched.model()
    chipmunk.enable(other, small_config())
    one, two = denoising(patched, model, PICTURES["first"]), denoising(patched, other, PICTURES["second"])
    for _ in range(12):
        finish(one, 1)
        finish(two, 1)
    first, second = finish(one), finish(two)
    assert first is not None
    assert second is not None
    assert same(first, fresh["first"][1])
    assert same(second, fresh["second"][1])


def test_a_second_model_stays_off(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    other = patched.model()
    one, two = denoising(patched, model, PICTURES["first"]), denoising(patched, other, PICTURES["second"])
    for _ in range(12):
        finish(one, 1)
        finish(two, 1)
    assert torch.equal(finish(two), fresh["second"][0])
    assert not chipmunk.statistics(other).enabled


def test_two_threads_on_one_model(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    names = ["first", "second", "batch of two", "another resolution"]
    drawn: dict[str, Tensor] = {}
    together = threading.Barrier(len(names))

    def work(name: str) -> None:
        together.wait()
        drawn[name] = draw(patched, model, PICTURES[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert same(drawn[name], fresh[name][1]), name
    assert dense_calls(model) == 0
    assert chipmunk.statistics(model).cache_bytes == 0


def test_a_loop_left_half_way(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Others run to their end meanwhile; then it goes on as if nothing had been."""
    left = denoising(patched, model, PICTURES["first"])
    finish(left, 5)
    for name in ("second", "first", "another resolution"):
        assert same(draw(patched, model, PICTURES[name]), fresh[name][1]), name
    latents = finish(left)
    assert latents is not None
    assert same(latents, fresh["first"][1])
    assert dense_calls(model) == 0


def test_a_loop_left_for_good_frees_its_caches(
    patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]
) -> None:
    left = denoising(patched, model, PICTURES["first"])
    finish(left, 5)
    assert chipmunk.statistics(model).cache_bytes > 0
    del left
    assert chipmunk.statistics(model).cache_bytes == 0
    assert same(draw(patched, model, PICTURES["second"]), fresh["second"][1])


def test_two_loops_in_turn(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    one, two = denoising(patched, model, PICTURES["first"]), denoising(patched, model, PICTURES["second"])
    for _ in range(11):
        finish(one, 1)
        finish(two, 1)
    for loop, name in ((two, "second"), (one, "first")):
        latents = finish(loop)
        assert latents is not None
        assert same(latents, fresh[name][1])


def test_two_loops_that_share_their_steps(patched: Repository, model: Any) -> None:
    """Which loop a call belongs to cannot be told. It is dense, or from caches of its own input, never mixed."""
    given, other = ({**inputs_of(PICTURES[name]), "timesteps": torch.tensor([0.7])} for name in ("first", "second"))
    with torch.no_grad():
        expected = [patched.model()(**arguments) for arguments in (given, other)]
        for _ in zip(chipmunk.steps(model, range(9)), chipmunk.steps(model, range(9)), strict=True):
            # the inputs stand still, so that every sparse call gives the dense result unless it has another's caches
            for arguments, wanted in zip((given, other), expected, strict=True):
                assert same(model(**arguments), wanted)


def test_an_exception_inside_the_model(
    patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]
) -> None:
    left = denoising(patched, model, PICTURES["first"])
    finish(left, 5)
    hook = model.single_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(left)
    hook.remove()
    assert chipmunk.statistics(model).cache_bytes == 0
    assert not any("_chipmunk" in vars(block) for block in (*model.double_blocks, *model.single_blocks))
    assert same(draw(patched, model, PICTURES["second"]), fresh["second"][1])


def copies(patched: Repository, model: Any) -> Iterator[tuple[str, Any]]:
    yield "deepcopy", copy.deepcopy(model)
    with patched.importable():
        yield "pickle", pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        yield "torch.save", torch.load(buffer, weights_only=False)


def test_copies_of_an_enabled_model(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Made in the middle of a picture: the copies know nothing of it, and it does not notice."""
    running = denoising(patched, model, PICTURES["first"])
    finish(running, 5)
    for way, made in copies(patched, model):
        assert not chipmunk.statistics(made).enabled
        assert list(made.state_dict()) == list(model.state_dict())
        assert torch.equal(draw(patched, made, PICTURES["second"]), fresh["second"][0]), way
        chipmunk.enable(made, small_config())
        assert same(draw(patched, made, PICTURES["second"]), fresh["second"][1]), way
    latents = finish(running)
    assert latents is not None
    assert same(latents, fresh["first"][1])


def test_weights_that_change_between_pictures(patched: Repository, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Nothing is captured when the model is enabled: loading other weights then is as good as before."""
    model = patched.model(seed=9)
    chipmunk.enable(model, small_config())
    draw(patched, model, PICTURES["first"])
    model.load_state_dict(patched.model().state_dict(), strict=True)
    assert same(draw(patched, model, PICTURES["second"]), fresh["second"][1])


def test_disabled_it_is_as_before(patched: Repository, model: Any, fresh: dict[str, tuple[Tensor, Tensor]]) -> None:
    draw(patched, model, PICTURES["first"])
    chipmunk.disable(model)
    assert torch.equal(draw(patched, model, PICTURES["second"]), fresh["second"][0])


@pytest.mark.parametrize(
    ("picture", "reason"),
    [(Picture(steps=7), "the loop has fewer than 8 steps (min_steps)")],
)
def test_dense_calls_are_counted(patched: Repository, model: Any, picture: Picture, reason: str) -> None:
    dense = draw(patched, patched.model(), picture)
    assert torch.equal(draw(patched, model, picture), dense)
    assert chipmunk.statistics(model).dense_model_calls == {reason: picture.steps}


def test_with_gradients_and_outside_a_loop_calls_are_dense(patched: Repository, model: Any) -> None:
    given = {**inputs_of(PICTURES["first"]), "timesteps": torch.tensor([0.5])}
    dense = patched.model()(**given)
    assert torch.equal(model(**given), dense)
    with torch.no_grad():
        assert torch.equal(model(**given), dense)
    for _ in chipmunk.steps(model, range(9)):
        assert torch.equal(model(**given), dense)
    assert chipmunk.statistics(model).dense_model_calls == {"autograd is on": 10, "outside a sampling loop": 1}
