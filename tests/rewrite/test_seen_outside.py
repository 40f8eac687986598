"""Features that come out of a model beside its image, or that its blocks leave where others read them, are in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk.rewrite.minimal import DOUBLE, MODEL, SAMPLING, SINGLE, variant

from .running import Outcome, left_dense, order_of, plan_of

pytestmark = pytest.mark.usefixtures("no_configuration")

STEP = "        image = image + (then - now) * velocity\n"
PAIR = "            image, text = block(image, text, rotation)\n"
OUT = "        return self.out(x)\n"
END = "        return image, text\n"
JOIN = "        return x + self.leave"
BY_PLACE = "(1 + torch.arange({0}.shape[-1]) / 9)"
"""What the sampling loop makes of a feature goes by where tokens lie."""


def _with_features(result: str, feature: str) -> str:
    """The sampling loop, in which the model returns two things, and the second counts by where tokens lie."""
    by_place = BY_PLACE.format("seen")
    used = f"        seen = {feature}\n        velocity = velocity + 0.2 * (seen * {by_place})[..., None]\n"
    return variant(SAMPLING, ("        velocity = model", f"        {result} = model"), (STEP, used + STEP))


_SCORES = variant(
    DOUBLE,
    (END, "        kept = {}\n        kept['scores'] = image_x.mean(-1)\n        return image, text, kept\n"),
)
_IN_A_LIST = variant(
    MODEL,
    ("        for block in self.pairs:\n" + PAIR, "        maps = []\n        for block in self.pairs:\n"
     "            image, text, kept = block(image, text, rotation)\n            maps.append(kept)\n"),
    (OUT, "        return self.out(x), maps\n"),
)  # fmt: skip
_TENSOR = variant(MODEL, (OUT, "        return self.out(x), image.mean(-1)\n"))
_STORE = variant(
    DOUBLE,
    ("class PairBlock", "STORE = []\n\n\nclass PairBlock"),
    (END, "        STORE.append(image_x.mean(-1))\n" + END),
)
_READ = variant(
    _with_features("velocity", "STORE.pop()"),
    ("from flow.model", "from flow.double import STORE\nfrom flow.model"),
)
_GIVEN = {
    "model": variant(
        MODEL,
        ("text_ids, time):", "text_ids, time, seen=None):"),
        (PAIR, PAIR.replace("rotation)", "rotation, seen)")),
    ),
    "double": variant(
        DOUBLE,
        ("text, rotation):", "text, rotation, seen):"),
        (END, "        seen['map'] = image_x.mean(-1)\n" + END),
    ),
    "sampling": variant(
        _with_features("velocity", "store['map']"),
        ("    for now", "    store = {}\n    for now"),
        ("time=time)", "time=time, seen=store)"),
    ),
}
SEEN: dict[str, tuple[dict[str, str], str]] = {
    "a list of the file's own": (
        {"double": _STORE, "sampling": _READ},
        "token order is off: PairBlock.forward keeps what it computes in STORE, which is not its own",
    ),
    "a dictionary that is given, and read outside": (
        _GIVEN,
        "token order is off: PairBlock.forward keeps what it computes in seen, which others may read",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_tokens_stay_in_order_where_features_are_seen_outside(name: str, tmp_path: Path) -> None:
    files, why = SEEN[name]
    outcome = Outcome(tmp_path, files)
    outcome.check()
    assert order_of(outcome.plan) == why
    assert left_dense(outcome.plan, "step-caching")
    assert outcome.statistics.layers[-1].attention


RETURNED = {
    "a tensor": {"model": _TENSOR, "sampling": _with_features("velocity, seen", "seen")},
    "maps in a list": {
        "double": _SCORES,
        "model": _IN_A_LIST,
        "sampling": _with_features("velocity, maps", "maps[0]['scores']"),
    },
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_model_returns_beside_its_image_is_noticed_at_run_time(name: str, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, RETURNED[name])
    assert order_of(outcome.plan) == "token order follows image_ids"
    outcome.check()
    why = "kept: what the model returns beside its image may have a row for each token"
    assert list(outcome.statistics.token_order)[-1] == why


def test_numbers_beside_the_image_are_nothing_of_its_tokens(tmp_path: Path) -> None:
    numbers = variant(_IN_A_LIST, ("maps.append(kept)", "maps.append(kept['scores'].max())"))
    sampling = variant(SAMPLING, ("        velocity = model", "        velocity, _ = model"))
    outcome = Outcome(tmp_path, {"double": _SCORES, "model": numbers, "sampling": sampling})
    outcome.check()
    assert list(outcome.statistics.token_order) == ["reordered"]


NOT_SEEN = {
    "a list of the function's own, under a parameter's name": {
        "single": variant(
            SINGLE,
            (
                JOIN,
                "        rotation = []\n        rotation.append(mixed)\n        mixed = torch.cat(rotation)\n" + JOIN,
            ),
        ),
    },
    "a tensor of the function's own, under a parameter's name": {
        "single": variant(
            SINGLE,
            (
                JOIN,
                "        rotation = torch.zeros(mixed.shape)\n        rotation[:] = mixed\n        mixed = rotation\n"
                + JOIN,
            ),
        ),
    },
    "a view of the tokens": {
        "single": variant(
            SINGLE,
            (JOIN, "        seen = mixed.view(1, self.heads, -1)\n        seen[:] = mixed.max()\n" + JOIN),
        ),
    },
    "a list of the function's own": {
        "single": variant(
            SINGLE, (JOIN, "        parts = []\n        parts.append(mixed)\n        mixed = parts[0]\n" + JOIN)
        ),
    },
}


@pytest.mark.parametrize("name", NOT_SEEN)
def test_tokens_are_moved_where_nothing_is_seen_outside(name: str) -> None:
    assert order_of(plan_of(**NOT_SEEN[name])) == "token order follows image_ids"
