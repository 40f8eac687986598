"""Models that write in place to what they are given: the sampler goes on with what they have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chipmunk.rewrite.minimal import DOUBLE, LOADING, MODEL, SAMPLING, variant

from .running import KEPT, Outcome

pytestmark = pytest.mark.usefixtures("no_configuration")

_TIME = "        image = self.image_in(image) + time[:, None, None]\n"
_IN_PLACE = (
    ("image = image + self.image_out", "image += self.image_out"),
    ("image = image + self.image_mlp", "image[:] = image + self.image_mlp"),
)
ALL: dict[str, dict[str, str]] = {
    "the image": {"model": variant(MODEL, (_TIME, "        image += 0.1 * time[:, None, None]\n" + _TIME))},
    "its positions": {"model": variant(MODEL, (_TIME, _TIME + "        image_ids *= 0.9\n"))},
    "a view of it": {
        "model": variant(MODEL, (_TIME, "        image.flatten(0, 1).clamp_(-1, 1)\n" + _TIME)),
    },
    "the image, block by block": {
        "model": variant(MODEL, (_TIME, "")),
        "double": variant(DOUBLE, *_IN_PLACE),
        "loading": variant(LOADING, ("Painter(4, 32, 4, 3, 3)", "Painter(4, 4, 1, 3, 3)")),
        "sampling": variant(SAMPLING, ("(then - now) * velocity", "0.1 * (then - now) * velocity")),
    },
}


@pytest.mark.parametrize("name", ALL)
def test_what_a_model_writes_to_its_arguments_is_there_in_their_order(name: str, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, ALL[name])
    outcome.check()
    assert any(order.startswith("reordered") for order in outcome.statistics.token_order)
    plain = Outcome(tmp_path / "plain", {k: v for k, v in ALL[name].items() if k == "loading"})
    assert not torch.allclose(plain.original, outcome.original)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.filterwarnings("ignore:Chipmunk. step_caching is enabled, but no steps are skipped")
def test_no_steps_are_skipped_where_blocks_write_to_the_callers_image(ordered: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {**KEPT, "step_caching": {"is_enabled": True, "skip_step_schedule": [3, 5, 6]}}
    config["patchify"] = {**KEPT["patchify"], "is_enabled": ordered}
    outcome = Outcome(tmp_path, ALL["the image, block by block"], config)
    outcome.check()
    why = "the model writes to the image tokens that it is given"
    assert outcome.statistics.no_step_caching == why
    reading = Outcome(tmp_path / "reading", {"loading": ALL["the image, block by block"]["loading"]}, config)
    assert reading.statistics.no_step_caching is None
    assert reading.error > 1e-4
