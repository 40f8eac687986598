"""What is no loop of denoising steps, and what counts the steps where no loop does: the model's timestep."""

from __future__ import annotations

import re

import pytest

from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES, MODEL, variant

from .clocked import (
    GIVEN,
    HEAD,
    RANGE,
    REGISTRY,
    after,
    is_clocked,
    plan_of,
    reasons,
    wrapped,
)

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
    plan = plan_of(UNCOUNTED["a while loop"] + "\n\n" + RANGE.replace("def sample", "def other"))
    assert len(wrapped(plan)) == 1
    assert is_clocked(plan)


def test_a_counted_loop_needs_no_clock() -> None:
    assert not is_clocked(plan_of(RANGE))


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
