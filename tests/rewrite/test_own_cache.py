"""Repositories that skip their blocks themselves: no step is skipped twice over, and the rest runs as ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk.rewrite.minimal import MODEL, SAMPLING, SINGLE, variant

from .running import KEPT, STEPS, Outcome, left_dense

pytestmark = pytest.mark.usefixtures("no_configuration")

BLOCKS = MODEL[MODEL.index("        for block in self.pairs:") : MODEL.index("        return self.out(x)")]
RESIDUAL = variant(
    MODEL,
    (
        BLOCKS,
        "        self.calls = getattr(self, 'calls', -1) + 1\n        before = image\n        if self.calls % 3 == 0:\n"
        + "".join(f"    {line}\n" for line in BLOCKS.splitlines())
        + "            self.residual = x - before\n        else:\n            x = image + self.residual\n",
    ),
)
"""The residual of all blocks is used again on two calls of three."""
FEATURES = {
    "model": variant(
        MODEL,
        ("text_ids, time):", "text_ids, time, info=None):"),
        ("for block in self.joints:\n", "for i, block in enumerate(self.joints):\n            info['at'] = i\n"),
        ("block(x, rotation)", "block(x, rotation, info)"),
    ),
    "single": variant(
        SINGLE,
        ("rotation):", "rotation, info):"),
        (
            "        qkv, hidden",
            "        if info['step'] % 3:\n            return x + info['kept'][info['at']]\n        qkv, hidden",
        ),
        ("        return x + self", "        more = self"),
        ("self.act(hidden)), 2))\n", "self.act(hidden)), 2))\n        keep(info, more)\n        return x + more\n"),
        ("class JointBlock", "def keep(info, feature):\n    info['kept'][info['at']] = feature\n\n\nclass JointBlock"),
    ),
    "sampling": variant(
        SAMPLING,
        ("    for now", "    info = {'kept': {}, 'step': -1}\n    for now"),
        ("        time =", "        info['step'] += 1\n        time ="),
        ("time=time)", "time=time, info=info)"),
    ),
}  # fmt: skip
"""Each block leaves what it adds in a dictionary, and is left out on two steps of three."""
OWN = {
    "a residual on the model": (
        {"model": RESIDUAL},
        "steps are not cached: the forward has a way around self.pairs",
    ),
    "features in a dictionary": (FEATURES, "steps are not cached: keep keeps what it computes in info"),
}
SKIPPING = {
    **KEPT,
    "step_caching": {"is_enabled": True, "mode": "static", "skip_step_schedule": [3, 4, 6]},
    "steps": STEPS,
}


@pytest.mark.parametrize("name", OWN)
def test_steps_are_not_skipped_where_the_repository_skips_its_own(name: str, tmp_path: Path) -> None:
    files, why = OWN[name]
    outcome = Outcome(tmp_path, files, SKIPPING)
    assert left_dense(outcome.plan, "step-caching") == [why]
    outcome.check()
    for part in ("attention", "mlp"):
        last = getattr(outcome.statistics.layers[-1], part)
        assert sum(calls.full + calls.sparse for calls in last.values()) == STEPS // 3
