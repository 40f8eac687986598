"""A block that runs more than once in a call of the model: its caches are those of the first time alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, MODEL, variant

from .running import KEPT, Outcome, left_dense

pytestmark = pytest.mark.usefixtures("no_configuration")

SPARSE: dict[str, Any] = {
    **KEPT,
    "attn": {**KEPT["attn"], "top_keys": 0.25, "recompute_mask": True},
    "mlp": {**KEPT["mlp"], "top_keys": 0.25},
}
JOINT = "            x = block(x, rotation)\n"
PAIR = "            image, text = block(image, text, rotation)\n"
FORWARD = "    def forward("
FEED = "        image = image + self.image_mlp(self.image_norm(image))\n"
AGAIN = {
    "single block": {"model": variant(MODEL, (JOINT, JOINT + "            block(-3 * x, rotation)\n"))},
    "double block": {"model": variant(MODEL, (PAIR, PAIR + "            block(-3 * image, text, rotation)\n"))},
    "second round": {
        "model": variant(
            MODEL, (JOINT, JOINT + "        for block in self.joints:\n            block(-3 * x, rotation)\n")
        )
    },
    "MLP in a helper": {
        "double": variant(
            DOUBLE,
            (FEED, "        image, _ = self.feed(image), self.feed(-3 * image)\n"),
            (FORWARD, "    def feed(self, x):\n        return x + self.image_mlp(self.image_norm(x))\n\n" + FORWARD),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
def test_what_runs_again_is_dense_and_leaves_the_caches_alone(name: str, tmp_path: Path) -> None:
    once, again = Outcome(tmp_path / "once", {}, SPARSE), Outcome(tmp_path / "again", AGAIN[name], SPARSE)
    assert torch.equal(again.off, again.original)
    assert torch.equal(again.original, once.original)
    assert 1e-4 < once.error < 0.1
    assert torch.equal(again.on, once.on)


def test_one_block_at_several_places_of_the_list_is_sparse_at_one(tmp_path: Path) -> None:
    files = {
        "model": variant(MODEL, ("[JointBlock(width, heads) for _ in range(joints)]", "[JointBlock(width, heads)] * 3"))
    }
    outcome = Outcome(tmp_path, files, SPARSE)
    assert torch.equal(outcome.off, outcome.original)
    sparse = [sum(calls.sparse for calls in layer.attention.values()) for layer in outcome.statistics.layers]
    assert sparse[:3] == [sparse[0]] * 3
    assert sorted(sparse[3:]) == [0, 0, sparse[0]]


def test_attention_in_a_helper_that_is_called_twice_stays_dense(tmp_path: Path) -> None:
    text = variant(
        DOUBLE,
        ("x = attend(q, k, v, rotation)", "x = self.mix(q, k, v, rotation) + self.mix(q, k, v * v, rotation)"),
        (FORWARD, "    def mix(self, q, k, v, rotation):\n        return attend(q, k, v, rotation)\n\n" + FORWARD),
    )  # fmt: skip
    outcome = Outcome(tmp_path, {"double": text})
    outcome.check()
    reasons = left_dense(outcome.plan, "attention")  # one for each call
    assert reasons == 2 * ["the block computes joint attention at several places in one call"]


def test_attention_at_two_places_is_reported_where_they_part(tmp_path: Path) -> None:
    """A helper with a special case: its two calls stay dense, and the report names them, not the block's one call."""
    special = (
        "    if rotation.shape[1] > 1:\n        x = {0}(q[:1], k[:1], v[:1])\n"
        "        return torch.cat((x, {0}(q[1:], k[1:], v[1:]))).transpose(1, 2).flatten(2)\n"
    ).format("torch.nn.functional.scaled_dot_product_attention")
    call = "    x = torch.nn.functional"
    outcome = Outcome(tmp_path, {"attention": variant(ATTENTION, (call, special + call))})
    outcome.check()
    found = [s for s in outcome.plan.sites if s.patch == "attention" and s.status.value == "left dense"]
    assert {(site.file, site.line) for site in found} == {("flow/attention.py", 7), ("flow/attention.py", 8)}
    assert all(sum(calls.sparse for calls in layer.attention.values()) for layer in outcome.statistics.layers)
