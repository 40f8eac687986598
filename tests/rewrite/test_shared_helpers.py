"""Helpers that several models go through: what one caller gives them, another one does not get."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES, SAMPLING, variant

HELPERS = """\
import torch


def placed(model, device, options=None):
    model.requires_grad_(False)
    if options is not None:
        model = torch.compile(model)
    return model.to(device)


def both(model, encoder):
    return placed(encoder, "cpu"), model


def twice(model):
    return placed(placed(model, "cpu"), "cpu")
"""
OURS = """\
from flow.helpers import {name}
from flow.model import Painter
from flow.sampling import sample


def draw(image, image_ids, text, text_ids, times):
    model = Painter(width=8, heads=2)
    {line}
    return sample(model, image, image_ids, text, text_ids, times)
"""
OTHER = """\
from flow.helpers import {name}
from stills.model import Other


def draw(image, times):
    model = Other()
    {line}
    for now, then in zip(times[:-1], times[1:]):
        image = image + (then - now) * model(image, now)
    return image
"""
MODEL = "from torch import nn\n\n\nclass Other(nn.Module):\n    def forward(self, x, time):\n        return x * time\n"


def plan_of(name: str, line: str, *, sampling: str = SAMPLING, helpers: str = HELPERS) -> Plan:
    files = {
        **FILES,
        "flow/helpers.py": helpers,
        "flow/sampling.py": sampling,
        "flow/draw.py": OURS.format(name=name, line=line),
        "stills/model.py": MODEL,
        "stills/draw.py": OTHER.format(name=name, line=line),
    }
    return plan_repository({path: text.encode() for path, text in files.items()}, load())


LINES = {
    "placed": 'model = placed(model, "cpu")',
    "both": "_, model = both(model, model)",
    "twice": "model = twice(model=model)",
}


@pytest.mark.parametrize("name", LINES)
def test_another_model_is_not_taken_for_the_first(name: str) -> None:
    sampling = variant(SAMPLING, ("model: Painter", "model"))  # known by what it is given alone
    plan = plan_of(name, LINES[name], sampling=sampling)
    changed = {change.path for change in plan.changes}
    assert "flow/sampling.py" in changed
    assert "stills/draw.py" not in changed
    assert not any(site.file == "stills/draw.py" for site in plan.sites)


def test_an_annotation_says_what_is_given_back() -> None:
    """Also where the caller's own value is not known."""
    helpers = HELPERS.replace("def placed(model,", 'def placed(model: "Painter",').replace(
        "import torch\n", "import torch\n\nfrom flow.model import Painter\n"
    )
    plan = plan_of("placed", 'model = placed(torch.load("mine.pt"), "cpu")', helpers=helpers)
    assert "stills/draw.py" in {change.path for change in plan.changes}
