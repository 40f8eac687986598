"""Attention to more keys than queries where something optional is given: where it is not, it is the joint attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk.rewrite.minimal import ATTENTION, SINGLE, variant

from .running import Outcome, left_dense, plan_of

pytestmark = pytest.mark.usefixtures("no_configuration")

CALL = "mixed = attend(q, k, v, rotation)\n"
MORE = "        k, v = torch.cat((k, more[0]), dim=2), torch.cat((v, more[1]), dim=2)\n"


def files(test: str, other: str = "") -> dict[str, str]:
    """Blocks with two calls of one function, of which one gives more keys. `other`: what stands in its `else`."""
    two = (
        "if self.more is None:\n            mixed = attend(q, k, v, rotation)\n        else:\n"
        "            mixed = attend(q, k, v, rotation, self.more)\n"
    )
    attention = variant(
        ATTENTION,
        ("rotation):\n", "rotation, more=None):\n"),
        ("    x = torch", f"    {test}\n{other}{MORE}    x = torch"),
    )
    single = variant(SINGLE, (CALL, two), ("        self.act =", "        self.more = None\n        self.act ="))
    return {"attention": attention, "single": single}


@pytest.mark.parametrize(
    ("test", "other"),
    [
        ("if more is not None:", ""),
        ("if more:", ""),
        ("if more is None:", "        pass\n    else:\n"),
        ("if not more:", "        pass\n    else:\n"),
    ],
)
def test_the_call_that_gives_nothing_is_the_joint_attention(test: str, other: str, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, files(test, other))
    assert left_dense(outcome.plan, "attention") == []
    outcome.check()
    sparse = outcome.statistics.layers[-1].attention
    assert sum(calls.full + calls.sparse for calls in sparse.values()) > 0


def test_keys_that_are_added_whatever_is_given_are_more_than_the_streams() -> None:
    """The call that gives them is the joint attention; at run time it is dense, as it has more keys than queries."""
    plan = plan_of(**files("if rotation is not None:"))
    (change,) = [change for change in plan.changes if change.path == "flow/single.py"]
    assert change.after.decode().count("**chipmunk.layer(self)") == 1
