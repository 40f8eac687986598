"""Sampling loops from text to numbers: patched as they stand, then run, they count the steps that they make.

For each: off, the bits of the original; everything kept, its numbers; each call in the step and slot it belongs to.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk
from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES
from chipmunk.runtime.clock import current_generation

STEPS = 9
KEPT = {
    "compile": False,
    "attn": {"mbm": 8, "counts_multiple_of": 4, "first_n_dense_layers": 0, "full_step_every": 5, "top_keys": 1.0},
    "mlp": {
        "bm": 8, "mbm": 8, "counts_multiple_of": 8, "first_n_dense_layers": 0, "full_step_every": 5, "top_keys": 1.0,
        "random_keys": 0.0,
    },
    "patchify": {"chunk_size_1": 4, "chunk_size_2": 2},
}  # fmt: skip
HEAD = """\
import torch
from elsewhere import tqdm

from flow.model import Painter


"""
GIVEN = "image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=at(image, time)"
AT = "def at(image, time):\n    return torch.full((image.shape[0],), float(time))\n\n\n"
SIGNATURE = "def sample(model: Painter, image, image_ids, text, text_ids, times):\n"
CALL = f"model({GIVEN})"
NEGATIVE = CALL.replace("text=text", "text=-text")


@dataclass(frozen=True)
class Loop:
    text: str
    slots: dict[str, list[int]] = field(default_factory=lambda: {"main": list(range(STEPS))})
    """By slot, the step of each call."""
    dense: dict[str, int] = field(default_factory=dict)
    """By reason, how many calls are dense."""


EVERY = list(range(STEPS))
ZIP = f"""\
{SIGNATURE}    for time, then in zip(times[:-1], times[1:]):
        image = image + (then - time) * {CALL}
    return image
"""
LOOPS = {
    "zip": Loop(ZIP),
    "enumerate": Loop(f"""\
{SIGNATURE}    for i, time in enumerate(times[:-1]):
        image = image + (times[i + 1] - time) * {CALL}
    return image
"""),
    "range": Loop(f"""\
{SIGNATURE}    for i in range(len(times) - 1):
        time = times[i]
        image = image + (times[i + 1] - time) * {CALL}
    return image
"""),
    "tqdm": Loop(f"""\
{SIGNATURE}    for i, time in tqdm(enumerate(times[:-1]), total=len(times) - 1, disable=True):
        image = image + (times[i + 1] - time) * {CALL}
    return image
"""),
    "a bar that is open around it": Loop(f"""\
{SIGNATURE}    with tqdm(times[:-1], disable=True) as bar:
        for time in bar:
            image = image - 0.1 * {CALL}
    return image
"""),
    "a scheduler": Loop(f"""\
class Scheduler:
    def __init__(self, times):
        self.timesteps, self.times, self.index = torch.tensor(times[:-1]), times, 0

    def step(self, velocity, time, image):
        self.index += 1
        return (image + (self.times[self.index] - time) * velocity,)


{SIGNATURE}    scheduler = Scheduler(times)
    for time in scheduler.timesteps:
        image = scheduler.step({CALL}, time, image)[0]
    return image
"""),
    "left by break": Loop(
        f"""\
{SIGNATURE}    for i, time in enumerate(times[:-1]):
        image = image - 0.1 * {CALL}
        if i == 6:
            break
    return image
""",
        {"main": EVERY[:7]},
    ),
    "two calls a step, second order": Loop(
        f"""\
{SIGNATURE}    for time, then in zip(times[:-1], times[1:]):
        pred = {CALL}
        middle = image + (then - time) / 2 * pred
        pred_mid = {CALL.replace("image=image", "image=middle").replace("time)", "(time + then) / 2)")}
        image = image + (then - time) * pred_mid
    return image
""",
        {"main": EVERY, "pred_mid": EVERY},
    ),
    "two calls in the first step, one in the others": Loop(
        f"""\
{SIGNATURE}    velocity = None
    for time, then in zip(times[:-1], times[1:]):
        if velocity is None:
            velocity = {CALL}
        middle = image + (then - time) / 2 * velocity
        ahead = {CALL.replace("image=image", "image=middle").replace("time)", "(time + then) / 2)")}
        image, velocity = image + (then - time) * ahead, ahead
    return image
""",
        {"main": [0], "ahead": EVERY},
    ),
    "guidance by a second call, from a step on": Loop(
        f"""\
{SIGNATURE}    for i, (time, then) in enumerate(zip(times[:-1], times[1:])):
        pred = {CALL}
        if i >= 3:
            neg_pred = {NEGATIVE}
            pred = neg_pred + 2 * (pred - neg_pred)
        image = image + (then - time) * pred
    return image
""",
        {"main": EVERY, "neg_pred": EVERY[3:]},
    ),
    "guidance by a batch of two": Loop(f"""\
{SIGNATURE}    image_ids, text_ids, text = (torch.cat((x, x)) for x in (image_ids, text_ids, text))
    text = text * torch.tensor([1.0, -1.0])[:, None, None]
    for time, then in zip(times[:-1], times[1:]):
        both = torch.cat((image, image))
        pred, neg_pred = {CALL.replace("image=image", "image=both").replace("at(image", "at(both")}.chunk(2)
        image = image + (then - time) * (neg_pred + 2 * (pred - neg_pred))
    return image
"""),
    "inversion, then generation, in one file": Loop(
        f"""\
def invert(model: Painter, image, image_ids, text, text_ids, times):
    for time, then in zip(times[::-1][:-1], times[::-1][1:]):
        image = image + (then - time) * {CALL}
    return image


def generate(model: Painter, image, image_ids, text, text_ids, times):
    for i in range(len(times) - 1):
        time = times[i]
        image = image + (times[i + 1] - time) * {CALL}
    return image


{SIGNATURE}    image = invert(model, image, image_ids, text, text_ids, times)
    return generate(model, image, image_ids, text, text_ids, times)
""",
        {"main": EVERY + EVERY},
    ),
    "a stale copy of the loop above it": Loop(ZIP.replace("def sample", "def old_sample") + "\n\n" + ZIP),
    "images around the steps": Loop(
        f"""\
{SIGNATURE}    images = []
    for seed in range(2):
        image = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        for time, then in zip(times[:-1], times[1:]):
            image = image + (then - time) * {CALL}
        images.append(image)
    return torch.cat(images)
""",
        {"main": EVERY + EVERY},
    ),
    "corrections inside a step": Loop(
        f"""\
{SIGNATURE}    for time in times[:-1]:
        image = image - 0.1 * {CALL}
        for _ in range(2):
            image = image + 0.01 * {CALL}
    return image
""",
        {"main": EVERY, "image_2": EVERY},
        {"a second call from the same place in one step (see chipmunk.slot)": STEPS},
    ),
    # Where the timestep counts
    "independent images, no steps": Loop(
        f"""\
{SIGNATURE}    answers = []
    for seed, time in enumerate(times[:-1]):
        image = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        answers.append({CALL})
    return torch.cat(answers)
""",
        {"main": [0] * STEPS},  # nine images
    ),
    "a helper, called twice a step": Loop(
        f"""\
def predict(model: Painter, image, image_ids, text, text_ids, time):
    return {CALL}


{SIGNATURE}    for time, then in zip(times[:-1], times[1:]):
        pred = predict(model, image, image_ids, text, text_ids, time)
        opposite = predict(model, image, image_ids, -text, text_ids, time)
        image = image + (then - time) * (2 * pred - opposite)
    return image
""",
        {"main": EVERY, "main 2": EVERY},
    ),
    "a while loop": Loop(f"""\
{SIGNATURE}    i = 0
    while i < len(times) - 1:
        time = times[i]
        image = image + (times[i + 1] - time) * {CALL}
        i += 1
    return image
"""),
    "an async loop": Loop(f"""\
async def sample(model: Painter, image, image_ids, text, text_ids, times):
    async for time in slowly(times[:-1]):
        image = image - 0.1 * {CALL}
    return image


async def slowly(times):
    for time in times:
        yield time
"""),
    "a sampler of another package": Loop(f"""\
from elsewhere import sample_euler


{SIGNATURE}    return sample_euler(lambda image, time: {CALL}, image, times)
"""),
    "prompts in a loop inside the step": Loop(
        f"""\
{SIGNATURE}    texts = [text, -text]
    for time, then in zip(times[:-1], times[1:]):
        velocities = []
        for text in texts:
            velocities.append({CALL})
        image = image + (then - time) * sum(velocities) / 2
    return image
""",
        {"main": EVERY, "main 2": EVERY},
    ),
}


# What the foreign package holds


def sample_euler(model: Callable[[Tensor, float], Tensor], image: Tensor, times: list[float]) -> Tensor:
    for now, then in pairwise(times):
        image = image + (then - now) * model(image, now)
    return image


class Bar:
    """A progress bar, as that of tqdm."""

    def __init__(self, iterable: Iterable[Any], **options: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def imported(root: Path, files: dict[str, bytes]) -> tuple[ModuleType, ModuleType]:
    """The modules `flow.sampling` and `flow.loading` of these files."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    elsewhere = ModuleType("elsewhere")
    vars(elsewhere).update(sample_euler=sample_euler, tqdm=Bar)
    sys.modules["elsewhere"] = elsewhere
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        return importlib.import_module("flow.sampling"), importlib.import_module("flow.loading")
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] in ("flow", "elsewhere")]:
            del sys.modules[name]


def draw(modules: tuple[ModuleType, ModuleType], model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(1, 30, 3)
    ids[..., 1], ids[..., 2] = torch.arange(30) // 6, torch.arange(30) % 6
    image = torch.randn(1, 30, 4, generator=generator)
    text = torch.randn(1, 5, 4, generator=generator)
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    with torch.no_grad():
        result: Any = modules[0].sample(model, image, ids, text, torch.zeros(1, 5, 3), times)
        return asyncio.run(result) if asyncio.iscoroutine(result) else result


def built(modules: tuple[ModuleType, ModuleType]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = modules[1].load_painter("small")
    return model


@pytest.fixture(scope="module")
def registry() -> Any:
    return load()


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_each_call_is_in_its_step(loop: Loop, registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    texts = {**FILES, "flow/sampling.py": HEAD + AT + loop.text}
    files = {path: text.encode() for path, text in texts.items()}
    plan = plan_repository(files, registry)
    original = imported(tmp_path / "original", files)
    patched = imported(tmp_path / "patched", {**files, **{change.path: change.after for change in plan.changes}})
    wanted = draw(original, built(original))
    model: Any = built(patched)
    assert torch.equal(draw(patched, model), wanted)

    chipmunk.enable(model, KEPT)
    steps: list[int] = []

    def note(*_: Any) -> None:
        session = model.__dict__["_chipmunk_session"]
        generation = current_generation(session)
        if generation is None and session.clock is not None:
            generation = session.clock._generation
        steps.append(-1 if generation is None else generation.step)

    model.image_in.register_forward_pre_hook(note)
    got = draw(patched, model)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    counted = chipmunk.statistics(model)
    assert counted.dense_model_calls == loop.dense
    (dense,) = loop.dense.values() or (0,)
    assert len(steps) == sum(map(len, loop.slots.values())) + dense
    in_slots = [step for of_slot in loop.slots.values() for step in of_slot]
    assert sorted({*steps} - {-1}) == sorted({*in_slots})
    if not loop.dense:
        assert sorted(steps) == sorted(in_slots)
    for layer in counted.layers:
        kept = {slot: calls.full + calls.sparse for slot, calls in layer.mlp.items() if calls.full + calls.sparse}
        assert kept == {slot: len(made) for slot, made in loop.slots.items()}
        for slot, made in loop.slots.items():
            images = made.count(made[0])
            each = len(made) // images
            assert layer.mlp[slot].full == images * len(range(0, each, 5))
            assert layer.attention[slot].full == images * len({0, 1, *range(0, each, 5)} & {*range(each)})
    assert counted.cache_bytes == 0 or session_is_clocked(model)


def session_is_clocked(model: Any) -> bool:
    """Where the timestep counts, the end of an image is not known."""
    return model.__dict__["_chipmunk_session"].clock is not None
