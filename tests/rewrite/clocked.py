"""Plans of the minimal repository with other sampling loops, for the tests of what counts steps."""

from __future__ import annotations

import ast

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES

REGISTRY = load()
GIVEN = "image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time"
SIGNATURE = "def sample(model: Painter, image, image_ids, text, text_ids, times):\n"
STEP = f"image = image - 0.1 * model({GIVEN})\n"
RANGE = SIGNATURE + "    for i in range(len(times)):\n        time = times[i]\n        " + STEP + "    return image\n"
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
