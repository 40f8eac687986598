"""Which loops are sampling loops, and under what name they call the model."""

from __future__ import annotations

import pytest

from .clocked import GIVEN, RANGE, SIGNATURE, STEP, is_clocked, plan_of, wrapped

LOOPS = {
    "range": (
        RANGE,
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


def test_two_loops_in_one_file_and_the_one_that_is_used_comes_first() -> None:
    old = SIGNATURE.replace("sample", "old_sample") + "    for time in times:\n        " + STEP
    plan = plan_of(old + "\n\n" + RANGE)
    assert [loop.function for loop in plan.models[0].loops] == ["sample", "old_sample"]
