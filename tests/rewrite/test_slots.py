"""Which of the places in a loop that call the model get slots, and so caches, of their own."""

from __future__ import annotations

import pytest

from .clocked import GIVEN, SIGNATURE, after, plan_of

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
