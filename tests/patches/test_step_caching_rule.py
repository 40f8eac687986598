"""Where the two loops over blocks may be left out on a step, and where more than the image stream comes out of them."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import Plan, SiteStatus, plan_repository
from chipmunk.rewrite.minimal import FILES, MODEL, SINGLE, variant

REGISTRY = load()
PAIRS = "        for block in self.pairs:\n            image, text = block(image, text, rotation)\n"
JOINTS = "        for block in self.joints:\n            x = block(x, rotation)\n"
JOIN = "        x = torch.cat((text, image), dim=1)\n"
CUT = "        x = x[:, text.shape[1] :]\n"
END = "        return self.out(x)\n"


def plan(model: str) -> Plan:
    files = {path: text.encode() for path, text in {**FILES, "flow/model.py": model}.items()}
    return plan_repository(files, REGISTRY)


def patched(model: str) -> str:
    """The model's file after patching, which a second run must leave alone."""
    first = plan(model)
    files = {path: text.encode() for path, text in {**FILES, "flow/model.py": model}.items()}
    files |= {change.path: change.after for change in first.changes}
    again = plan_repository(files, REGISTRY)
    assert not again.changes
    assert [m.step_caching for m in first.models] == [m.step_caching for m in again.models]
    return files["flow/model.py"].decode()


LEFT_ALONE = {
    "text used after the blocks": (END, "        return self.out(x) + text.mean()\n", "text comes out of the blocks"),
    "a variable of the loop used after it": (
        END,
        "        return self.out(x) * block.width\n",
        "block is known only once a block has run",
    ),
    "a name that only the loop gives a value": (
        JOINTS + CUT,
        "        for block in self.joints:\n            x = last = block(x, rotation)\n"
        + CUT
        + "        x = x + last.mean()\n",
        "last is known only once a block has run",
    ),
    "a sum over the blocks": (
        PAIRS,
        "        total = 0\n" + PAIRS + "            total = total + image.mean()\n",
        None,
    ),
    "a list that grows": (
        JOINTS,
        "        seen = []\n" + JOINTS + "            seen.append(x)\n",
        None,
    ),
    "a dictionary that is filled": (
        PAIRS,
        "        seen = {}\n" + PAIRS + '            seen["last"] = image\n',
        None,
    ),
    "an attribute of the model": (
        JOINTS,
        JOINTS + "            self.last = x\n",
        "self.last is assigned between the blocks",
    ),
    "a way out between the blocks": (
        JOINTS,
        JOINTS + "            if time is None:\n                return x\n",
        "the forward returns from between the blocks",
    ),
    "both ends of the joint stream": (
        CUT + END,
        "        image = x[:, text.shape[1] :]\n        return self.out(image), x[:, : text.shape[1]]\n",
        "x comes out of the blocks too",
    ),
}
FOLLOWED = {
    "a sum over the blocks": "total",
    "a list that grows": "seen",
    "a dictionary that is filled": "seen",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    old, new, reason = LEFT_ALONE[name]
    changes = [(old, new)]
    if reason is None:  # what the blocks made has to be used; it is harmless otherwise, see below
        changes.append((END, f"        return self.out(x), {FOLLOWED[name]}\n"))
        reason = f"{FOLLOWED[name]} comes out of the blocks too"
    model = variant(MODEL, *changes)
    found = [site for site in plan(model).sites if site.patch == "step-caching"]
    assert [site.status for site in found] == [SiteStatus.LEFT_DENSE]
    assert reason in found[0].reason
    assert "chipmunk.blocks" not in patched(model)
    assert "chipmunk.model_forward" in patched(model)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_nobody_uses_after_the_blocks_is_no_hindrance(name: str) -> None:
    old, new, _ = LEFT_ALONE[name]
    assert "chipmunk.hidden(self, x[:, text.shape[1] :])" in patched(variant(MODEL, (old, new)))


CALL = "            x = block(x, rotation)\n"

FITS = {
    "its number of tokens only": (END, "        return self.out(x)[:, : x.shape[1] - 0 * text.shape[1]]\n"),
    "a residual of the ControlNet": (PAIRS, PAIRS + "            image = image + time[:, None, None]\n"),
    "a loop inside the loop": (CALL, "            for _ in range(1):\n                pass\n" + CALL),
    "a function inside the loop": (CALL, "            def run(y):\n                return y\n\n" + CALL),
}


@pytest.mark.parametrize("name", FITS)
def test_fits(name: str) -> None:
    after = patched(variant(MODEL, FITS[name]))
    assert "in chipmunk.blocks(self.pairs, self, image):" in after
    assert "in chipmunk.blocks(self.joints, self):" in after
    assert "x = chipmunk.hidden(self, x[:, text.shape[1] :])" in after


def test_the_cut_inside_another_expression() -> None:
    model = variant(MODEL, (CUT + END, "        return self.out(x[:, text.shape[1] :])\n"))
    assert "return self.out(chipmunk.hidden(self, x[:, text.shape[1] :]))" in patched(model)


def test_lists_that_are_sliced_and_loops_that_run_no_block() -> None:
    model = variant(
        MODEL,
        ("for block in self.pairs:", "for block in self.pairs[1:]:"),
        (JOIN, "        for number in range(len(self.joints)):\n            self.joints[number].cpu()\n" + JOIN),
    )
    after = patched(model)
    assert "for block in chipmunk.blocks(self.pairs, self, image)[1:]:" in after
    assert "for number in range(len(self.joints)):" in after


def test_what_is_cut_off_an_image_stream_that_leaves_apart_has_entered_with_it() -> None:
    single = variant(
        SINGLE,
        (
            "def forward(self, x, rotation):\n",
            "def forward(self, image, text, rotation):\n        x = torch.cat((text, image), dim=1)\n",
        ),
        (
            "        return x + self.leave(torch.cat((mixed, self.act(hidden)), 2))\n",
            "        x = x + self.leave(torch.cat((mixed, self.act(hidden)), 2))\n"
            "        return x[:, text.shape[1] :], x[:, : text.shape[1]]\n",
        ),
    )
    model = variant(
        MODEL,
        (JOIN, ""),
        (JOINTS, "        for block in self.joints:\n            image, text = block(image, text, rotation)\n"),
        (CUT + END, "        image = image[:, -4:]\n        return self.out(image)\n"),
    )
    files = {path: text.encode() for path, text in {**FILES, "flow/single.py": single, "flow/model.py": model}.items()}
    (change,) = (change for change in plan_repository(files, REGISTRY).changes if change.path == "flow/model.py")
    after = change.after.decode()
    assert "        image = chipmunk.hidden(self, image)\n        image = image[:, -4:]\n" in after
    changed = {change.path: change.after for change in plan_repository(files, REGISTRY).changes}
    assert not plan_repository({**files, **changed}, REGISTRY).changes
