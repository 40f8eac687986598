"""Which loops are sampling loops, under what name they call the model, and what counts the steps where none does."""

from __future__ import annotations

import ast
import re

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES, MODEL, variant

REGISTRY = load()
GIVEN = "image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time"
HEAD = """\
import torch
from functools import partial
from tqdm import tqdm

from flow.model import Painter


"""


def plan_of(sampling: str, **files: str) -> Plan:
    """The plan for the minimal repository with this sampling code, its parsed result proved to be Python."""
    texts = {**FILES, "flow/sampling.py": HEAD + sampling, **{f"flow/{name}.py": text for name, text in files.items()}}
    plan = plan_repository({path: text.encode() for path, text in texts.items()}, REGISTRY)
    for change in plan.changes:
        ast.parse(change.after)
    return plan


def after(plan: Plan, path: str = "flow/sampling.py") -> str:
    return next((change.after.decode() for change in plan.changes if change.path == path), "")


def wrapped(plan: Plan) -> list[str]:
    """The heads of the loops that are wrapped, as they stand in the new files."""
    lines = [line.strip() for change in plan.changes for line in change.after.decode().split("\n")]
    return [line for line in lines if "chipmunk.steps(" in line]


def is_clocked(plan: Plan) -> bool:
    """Whether the model's own timestep counts steps."""
    return 'timesteps="time"' in after(plan, "flow/model.py")


def reasons(plan: Plan, status: str = "left dense") -> list[str]:
    return [site.reason for site in plan.sites if site.patch == "step-clock" and site.status.value == status]


# Near misses


NO_STEPS = {
    "independent inputs": f"""\
def embed(model: Painter, images, image_ids, text, text_ids, time):
    for image in images:
        print(model({GIVEN}))
""",
    "two calls on each of some independent images": f"""\
def embed(model: Painter, images, image_ids, text, text_ids, time):
    for image in images:
        velocity = model({GIVEN})
        image = image + velocity
        print(model({GIVEN}))
""",
    "the image begins anew in every round": f"""\
def sample(model: Painter, prompts, image_ids, text_ids, time):
    for text in prompts:
        image = torch.randn(1, 16, 4)
        image = image + model({GIVEN})
        print(image)
""",
    "only a sum of answers is kept": f"""\
def measure(model: Painter, images, image_ids, text, text_ids, time):
    total = 0
    for image in images:
        total = total + model({GIVEN}).abs().mean()
    return total
""",
    "training in a while loop": f"""\
def train(model: Painter, image, image_ids, text, text_ids, time):
    while time > 0:
        velocity = model({GIVEN})
        image = image + velocity
        velocity.sum().backward()
""",
    "training": f"""\
def train(model: Painter, image, image_ids, text, text_ids, times):
    for time in times:
        velocity = model({GIVEN})
        image = image + velocity
        velocity.sum().backward()
""",
}


@pytest.mark.parametrize("text", NO_STEPS.values(), ids=NO_STEPS)
def test_loops_that_are_no_denoising_steps(text: str) -> None:
    plan = plan_of(text)
    assert wrapped(plan) == []
    assert len(reasons(plan)) == 1


UNCOUNTED = {
    "a while loop": f"""\
def sample(model: Painter, image, image_ids, text, text_ids, time):
    while time > 0:
        image = image - 0.1 * model({GIVEN})
        time = time - 0.1
    return image
""",
    "an async loop": f"""\
async def sample(model: Painter, image, image_ids, text, text_ids, times):
    async for time in times:
        image = image - 0.1 * model({GIVEN})
    return image
""",
    "a helper called twice a step": f"""\
def predict(model: Painter, image, image_ids, text, text_ids, time):
    return model({GIVEN})


def sample(model: Painter, image, image_ids, text, text_ids, times):
    for time in times:
        velocity = predict(model, image, image_ids, text, text_ids, time)
        opposite = predict(model, image, image_ids, -text, text_ids, time)
        image = image - 0.1 * (2 * velocity - opposite)
    return image
""",
    "a helper that calls it twice": f"""\
def guided(model: Painter, image, image_ids, text, text_ids, time):
    velocity = model({GIVEN})
    text = -text
    return 2 * velocity - model({GIVEN})


def sample(model: Painter, image, image_ids, text, text_ids, times):
    for time in times:
        image = image - 0.1 * guided(model, image, image_ids, text, text_ids, time)
    return image
""",
    "prompts in a loop inside the step": f"""\
def sample(model: Painter, image, image_ids, texts, text_ids, times):
    for time in times:
        velocities = []
        for text in texts:
            velocities.append(model({GIVEN}))
        image = image - 0.1 * sum(velocities)
    return image
""",
    "a sampler of another library": """\
from k_diffusion.sampling import sample_euler


def sample(painter: Painter, image, image_ids, text, text_ids, times):
    model = partial(painter, image_ids=image_ids, text=text, text_ids=text_ids)
    return sample_euler(lambda image, time: model(image=image, time=time), image, times)
""",
    "a model that is made inside the loop": f"""\
def sample(image, image_ids, text, text_ids, times):
    for step, time in enumerate(times):
        if step == 0:
            model = Painter(4, 32, 4, 3, 3)
        image = image - 0.1 * model({GIVEN})
    return image
""",
}


@pytest.mark.parametrize("text", UNCOUNTED.values(), ids=UNCOUNTED)
def test_where_no_iterable_counts_steps_the_timestep_does(text: str) -> None:
    plan = plan_of(text)
    assert wrapped(plan) == []
    assert is_clocked(plan)
    assert ["counted by changes of `time`" in reason for reason in reasons(plan, "patched")] == [True]
    files = {path: content.encode() for path, content in {**FILES, "flow/sampling.py": HEAD + text}.items()}
    again = plan_repository({**files, **{change.path: change.after for change in plan.changes}}, REGISTRY)
    assert again.changes == ()
    assert len(reasons(again, "already patched")) == 1


def test_a_counted_loop_beside_one_that_is_not() -> None:
    plan = plan_of(UNCOUNTED["a while loop"] + "\n\n" + LOOPS["range"][0].replace("def sample", "def other"))
    assert len(wrapped(plan)) == 1
    assert is_clocked(plan)


def test_a_counted_loop_needs_no_clock() -> None:
    assert not is_clocked(plan_of(LOOPS["range"][0]))


def test_a_forward_that_shows_no_timestep_is_left_dense() -> None:
    model = variant(MODEL, ("text_ids, time)", "text_ids, level)"), ("time[:, None, None]", "level[:, None, None]"))
    plan = plan_of("def sample(*_):\n    pass\n", model=model)
    assert "timesteps" not in after(plan, "flow/model.py")
    assert reasons(plan) == ["no loop that calls the model was found: its calls run dense"]


def test_the_timestep_is_known_by_its_waves_whatever_its_name() -> None:
    waves = "\n\ndef waves(x, count):\n    x = x[:, None] * torch.arange(count)\n    return x.cos() + x.sin()\n"
    model = variant(
        MODEL,
        ("from torch import nn\n", "from torch import nn\n" + waves),
        ("text_ids, time)", "text_ids, level, strength=None)"),
        ("time[:, None, None]", "(waves(level, 8).mean(-1) + waves(strength, 8).mean(-1))[:, None, None]"),
    )
    plan = plan_of("def sample(*_):\n    pass\n", model=model)
    assert 'timesteps="level"' in after(plan, "flow/model.py")


WAVES = "\n\ndef waves(x, count):\n    x = x[..., None] * torch.arange(count)\n    return x.cos() + x.sin()\n"
JOINED = """\
        if more is None:
            rotation = torch.cat((waves(text_ids, 8), waves(image_ids, 8)), dim=1)
        else:
            text = torch.cat((text, self.text_in(more)), dim=1)
            rotation = torch.cat((waves(text_ids, 8), waves(image_ids, 8), waves(more_ids, 8)), dim=1)
"""
TIMES = {
    "its own waves": ("level", "waves(level, 8)", "level"),
    "beside a later one that may be left out": (
        "level, later_time=None",
        "waves(level, 8) + waves(later_time, 8)",
        "level",
    ),
    "one of two that may be left out": ("time=None, strength=None", "waves(strength, 8) + waves(time, 8)", "time"),
    "waves of another package, a name that speaks": ("sigma", "elsewhere(sigma)", "sigma"),
    "waves of another package that speak": ("level", "embed_timestep(level, 8)", "level"),
    "waves of another package, a name that says nothing": ("level", "elsewhere(level)", None),
}


@pytest.mark.parametrize(("names", "embedding", "chosen"), TIMES.values(), ids=TIMES)
def test_positions_of_further_tokens_are_no_timestep(names: str, embedding: str, chosen: str | None) -> None:
    """As in FLUX.3, where the waves of three kinds of positions are joined, one of them only where it is given."""
    model = variant(
        MODEL,
        ("from torch import nn\n", "from torch import nn\n" + WAVES),
        ("text_ids, time)", f"text_ids, {names}, more=None, more_ids=None)"),
        ("        rotation = self.rotate(torch.cat((text_ids, image_ids), dim=1)).unsqueeze(1)\n", JOINED),
        ("time[:, None, None]", f"({embedding}).mean(-1)[:, None, None]"),
    )
    patched = after(plan_of("def sample(*_):\n    pass\n", model=model), "flow/model.py")
    assert 'ids="image_ids"' in patched
    assert re.findall(r'timesteps="(\w+)"', patched) == ([] if chosen is None else [chosen])


# Loops

SIGNATURE = "def sample(model: Painter, image, image_ids, text, text_ids, times):\n"
STEP = f"image = image - 0.1 * model({GIVEN})\n"

LOOPS = {
    "range": (
        SIGNATURE + "    for i in range(len(times)):\n        time = times[i]\n        " + STEP + "    return image\n",
        ["for i in chipmunk.steps(model, range(len(times))):"],
    ),
    "enumerate": (
        SIGNATURE + "    for i, time in enumerate(times):\n        " + STEP,
        ["for i, time in chipmunk.steps(model, enumerate(times)):"],
    ),
    "tqdm": (
        SIGNATURE + "    for time in tqdm(times, desc='x'):\n        " + STEP,
        ["for time in chipmunk.steps(model, tqdm(times, desc='x')):"],
    ),
    "a bar that is open around it": (
        SIGNATURE + "    with tqdm(times) as bar:\n        for time in bar:\n            " + STEP,
        ["for time in chipmunk.steps(model, bar):"],
    ),
    "a bar that is given a name": (
        SIGNATURE + "    for time in (bar := tqdm(times)):\n        bar.refresh()\n        " + STEP,
        ["for time in chipmunk.steps(model, (bar := tqdm(times))):"],
    ),
    "a generator expression": (
        SIGNATURE + "    for time in (t / 1000 for t in times):\n        " + STEP,
        ["for time in chipmunk.steps(model, (t / 1000 for t in times)):"],
    ),
    "a scheduler": (
        SIGNATURE.replace("times)", "scheduler)")
        + f"    for time in scheduler.timesteps:\n        velocity = model({GIVEN})\n"
        + "        image = scheduler.step(velocity, time, image)[0]\n    return image\n",
        ["for time in chipmunk.steps(model, scheduler.timesteps):"],
    ),
    "guidance by a batch of two": (
        SIGNATURE
        + "    text, image_ids, text_ids = (torch.cat((x, x)) for x in (text, image_ids, text_ids))\n"
        + "    for time in times:\n        both = torch.cat([image] * 2)\n"
        + f"        pred, negative = model({GIVEN.replace('image=image', 'image=both')}).chunk(2)\n"
        + "        image = image - 0.1 * (negative + 2 * (pred - negative))\n",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a generator function": (
        SIGNATURE + "    for time in times:\n        " + STEP + "        yield image\n",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a callback": (
        SIGNATURE + "    for time in times:\n        " + STEP + "        text = callback(image, text)\n",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "images around the steps": (
        f"""\
def sample(model: Painter, seeds, image_ids, text, text_ids, times):
    for seed in seeds:
        image = torch.randn(1, 16, 4)
        for time in times:
            image = image - 0.1 * model({GIVEN})
        print(image)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "images around the steps, with a first call to warm up": (
        f"""\
def sample(model: Painter, seeds, image_ids, text, text_ids, times):
    for seed in seeds:
        image, time = torch.randn(1, 16, 4), times[0]
        model({GIVEN})
        for time in times:
            image = image - 0.1 * model({GIVEN})
        print(image)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a dictionary carries the image": (
        """\
def sample(model: Painter, inputs, times):
    for time in times:
        velocity = model(time=time, **inputs)
        inputs["image"] = inputs["image"] - 0.1 * velocity
    return inputs["image"]
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "an object carries the image": (
        """\
def sample(model: Painter, state, times):
    for time in times:
        state.image = state.image - 0.1 * model(state.image, state.image_ids, state.text, state.text_ids, time)
    return state
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "two models": (
        f"""\
def sample(model: Painter, refiner: Painter, image, image_ids, text, text_ids, times):
    for time in times:
        {STEP}        image = image - 0.1 * refiner({GIVEN})
""",
        ["for time in chipmunk.steps(refiner, chipmunk.steps(model, times)):"],
    ),
    "an alias inside the loop": (
        f"""\
class Pipeline:
    def __init__(self, painter: Painter):
        self.painter = painter

    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            model = self.painter
            {STEP}""",
        ["for time in chipmunk.steps(self.painter, times):"],
    ),
    "an annotated attribute": (
        """\
class Pipeline:
    def __init__(self):
        self.painter: Painter = None

    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            image = image - 0.1 * self.painter(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(self.painter, times):"],
    ),
    "one of several that are prepared": (
        """\
def sample(accelerator, wrapped: Painter, other, image, image_ids, text, text_ids, times):
    other, model = accelerator.prepare(other, wrapped)
    for time in times:
        image = image - 0.1 * model(image, image_ids, text, text_ids, time)
        text = other(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "modules that are registered by name": (
        """\
from framework import Base


class Pipeline(Base):
    def __init__(self, painter: Painter, other):
        self.register_modules(painter=painter, other=other)

    def sample(self, image, image_ids, text, text_ids, times):
        with self.progress_bar(total=len(times)) as bar:
            for i, time in enumerate(times):
                image = image - 0.1 * self.painter(image, image_ids, text, text_ids, time)
                bar.update()
""",
        ["for i, time in chipmunk.steps(self.painter, enumerate(times)):"],
    ),
    "an attribute of another object": (
        """\
class Pipeline:
    def __init__(self):
        self.painter = Painter(4, 32, 4, 3, 3)


def sample(pipe: Pipeline, image, image_ids, text, text_ids, times):
    for time in times:
        image = image - 0.1 * pipe.painter(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(pipe.painter, times):"],
    ),
    "a model that is unwrapped": (
        """\
def sample(accelerator, wrapped: Painter, image, image_ids, text, text_ids, times):
    model = accelerator.unwrap_model(wrapped)
    for time in times:
        image = image - 0.1 * model(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "the module inside a wrapper": (
        """\
def sample(model: Painter, image, image_ids, text, text_ids, times):
    for time in times:
        image = image - 0.1 * model.module(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model.module, times):"],
    ),
    "a partial function": (
        """\
def sample(painter: Painter, image, image_ids, text, text_ids, times):
    model = partial(painter, image_ids=image_ids, text=text, text_ids=text_ids)
    for time in times:
        image = image - 0.1 * model(image=image, time=time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "known by the keywords alone": (
        f"""\
class Pipeline:
    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            image = image - 0.1 * self.network({GIVEN})


def load(kind=Painter):
    return kind
""",
        ["for time in chipmunk.steps(self.network, times):"],
    ),
    # Through functions
    "a helper": (
        f"""\
def predict(network: Painter, image, image_ids, text, text_ids, time):
    return network({GIVEN})


{SIGNATURE}    for time in times:
        image = image - 0.1 * predict(model, image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a helper's helper": (
        f"""\
def inner(network: Painter, image, image_ids, text, text_ids, time):
    return network({GIVEN})


def outer(image, painter, *given):
    return inner(painter, image, *given)


{SIGNATURE}    for time in times:
        image = image - 0.1 * outer(image, model, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a helper with either of two calls": (
        f"""\
def predict(network: Painter, image, image_ids, text, text_ids, time):
    if text is None:
        return network({GIVEN.replace("text=text", "text=image")})
    return network({GIVEN})


{SIGNATURE}    for time in times:
        image = image - 0.1 * predict(model, image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a function for the model, given by keyword": (
        f"""\
def model_fn(painter: Painter = None, image=None, image_ids=None, text=None, text_ids=None, time=None):
    return painter({GIVEN})


class Pipeline:
    def __init__(self):
        self.painter = Painter(4, 32, 4, 3, 3)

    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            image = image - 0.1 * model_fn(painter=self.painter, {GIVEN})
""",
        ["for time in chipmunk.steps(self.painter, times):"],
    ),
    "a closure": (
        f"""\
{SIGNATURE}    def velocity(image, time):
        return model({GIVEN})

    for time in times:
        image = image - 0.1 * velocity(image, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a lambda": (
        f"""\
{SIGNATURE}    velocity = lambda image, time: model({GIVEN})
    for time in times:
        image = image - 0.1 * velocity(image, time)
""",
        ["for time in chipmunk.steps(model, times):"],
    ),
    "a method": (
        f"""\
class Sampler:
    def __init__(self, painter: Painter):
        self.painter = painter

    def predict(self, image, image_ids, text, text_ids, time):
        return self.painter({GIVEN})

    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            image = image - 0.1 * self.predict(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(self.painter, times):"],
    ),
    "an object that is called": (
        f"""\
class Denoiser(torch.nn.Module):
    def __init__(self, painter: Painter):
        super().__init__()
        self.painter = painter

    def forward(self, image, image_ids, text, text_ids, time):
        return self.painter({GIVEN})


class Sampler:
    def __init__(self, painter: Painter):
        self.denoiser = Denoiser(painter)

    def sample(self, image, image_ids, text, text_ids, times):
        for time in times:
            image = image - 0.1 * self.denoiser(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(self.denoiser.painter, times):"],
    ),
    "a module's own global": (
        f"""\
painter = Painter(4, 32, 4, 3, 3)


def predict(image, image_ids, text, text_ids, time):
    return painter({GIVEN})


def sample(image, image_ids, text, text_ids, times):
    for time in times:
        image = image - 0.1 * predict(image, image_ids, text, text_ids, time)
""",
        ["for time in chipmunk.steps(painter, times):"],
    ),
}


@pytest.mark.parametrize(("text", "heads"), LOOPS.values(), ids=LOOPS)
def test_the_loop_is_found(text: str, heads: list[str]) -> None:
    plan = plan_of(text)
    assert wrapped(plan) == heads
    assert not is_clocked(plan)


SLOTS = {
    "guidance from a step on": (
        f"""\
{SIGNATURE}    for i, time in enumerate(times):
        pred = model({GIVEN})
        if i >= 3:
            neg_pred = model({GIVEN.replace("text=text", "text=-text")})
            pred = neg_pred + 2 * (pred - neg_pred)
        image = image - 0.1 * pred
""",
        ["pred", "neg_pred"],
    ),
    "a second-order step": (
        f"""\
{SIGNATURE}    for time in times:
        pred = model({GIVEN})
        middle = image - 0.05 * pred
        pred_mid = model({GIVEN.replace("image=image", "image=middle")})
        image = image - 0.1 * pred_mid
""",
        ["pred", "pred_mid"],
    ),
    "two calls in the first step, one in the others": (
        f"""\
{SIGNATURE}    velocity = None
    for time in times:
        if velocity is None:
            velocity = model({GIVEN})
        middle = image - 0.05 * velocity
        ahead = model({GIVEN.replace("image=image", "image=middle")})
        image, velocity = image - 0.1 * ahead, ahead
""",
        ["velocity", "ahead"],
    ),
    "inversion": (
        f"""\
{SIGNATURE}    for time in times[::-1]:
        image = image + 0.1 * model({GIVEN})
""",
        ["image"],
    ),
    "corrections inside a step": (
        f"""\
{SIGNATURE}    for time in times:
        image = image - 0.1 * model({GIVEN})
        for _ in range(2):
            image = image + 0.01 * model({GIVEN})
""",
        ["image", "image_2"],
    ),
}


@pytest.mark.parametrize(("text", "slots"), SLOTS.values(), ids=SLOTS)
def test_slots(text: str, slots: list[str]) -> None:
    plan = plan_of(text)
    assert [loop.slots for loop in plan.models[0].loops] == [tuple(slots)]
    assert [f'chipmunk.slot(model, "{name}")' in after(plan) for name in slots] == [False] + [True] * (len(slots) - 1)


def test_two_loops_in_one_file_and_the_one_that_is_used_comes_first() -> None:
    old = SIGNATURE.replace("sample", "old_sample") + "    for time in times:\n        " + STEP
    plan = plan_of(old + "\n\n" + LOOPS["range"][0])
    assert [loop.function for loop in plan.models[0].loops] == ["sample", "old_sample"]
