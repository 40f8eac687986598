"""Skipped steps would leave out more than the hidden state: then no step is skipped, and the report says why."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES, MODEL, SINGLE, variant

REGISTRY = load()
CUT = "        x = x[:, text.shape[1] :]\n"
BLOCK = "            x = block(x, rotation)\n"
END = "        return x +"
OUT = "        return self.out(x)\n"
GIVEN = ("text_ids, time):", "text_ids, time, given=None):")
TOLD = ("rotation):\n", "rotation, told=None):\n")
HANGS = "where the image stream is cut off hangs on a condition"
KEEP = "def keep(store, feature):\n    mine = {}\n    mine[0] = feature\n    store['x'] = mine\n\n\nclass Joint"


def verdict(files: dict[str, str]) -> str:
    """`patched`, or why no steps are skipped."""
    texts = {path: text.encode() for path, text in {**FILES, **files}.items()}
    (site,) = [s for s in plan_repository(texts, REGISTRY).sites if s.patch == "step-caching"]
    return "patched" if site.status.value == "patched" else site.reason.removeprefix("steps are not cached: ")


IN_MODEL: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "a difference in a dictionary that is given": (
        (GIVEN, (CUT, f"        given['change'] = x - 1\n{CUT}")),
        "what the blocks compute is kept in given",
    ),
    "one on the model": (
        ((CUT, f"        self.store['change'] = x - 1\n{CUT}"),),
        "what the blocks compute is kept in self.store",
    ),
    "an attribute": (((CUT, f"        self.last = x\n{CUT}"),), "self.last is assigned between the blocks"),
    "a list on the model": (
        ((BLOCK, f"{BLOCK}            self.features.append(x)\n"),),
        "what the blocks compute is given to self.features.append",
    ),
    "a function that is told of each block": (
        (GIVEN, (BLOCK, f"{BLOCK}            given(x)\n")),
        "what the blocks compute is given to given",
    ),
    "a way out before the image is cut off": (
        ((CUT, f"        if self.raw:\n            return x\n{CUT}"),),
        "the forward returns from between the blocks",
    ),
    "the hidden state is kept: it is known on every step": (((OUT, f"        self.last = x\n{OUT}"),), "patched"),
    "the text is kept before the blocks": (
        (GIVEN, ("        x = torch.cat", "        given['text'] = text.shape\n        x = torch.cat")),
        "patched",
    ),
    "it is printed": (((CUT, f"        print(x.mean())\n{CUT}"),), "patched"),
    "something is added to the stream in place": (
        (GIVEN, (BLOCK, f"{BLOCK}            x[:, 5:] = x[:, 5:] + given\n            x.add_(given)\n")),
        "patched",
    ),
}
JOINTS = "        for block in self.joints:\n" + BLOCK
BRANCH = "".join(f"    {line}\n" for line in JOINTS.splitlines())
IN_MODEL |= {
    "the loop and the cut in one branch": (
        ((JOINTS + CUT, f"        if self.busy:\n{BRANCH}    {CUT}"),),
        "the forward has a way around its blocks",
    ),
    "another cut in another branch": (
        (GIVEN, (CUT, f"        if given:\n            x = x[:, -given:]\n        else:\n    {CUT}")),
        "patched",
    ),
    "three cuts": (
        (
            GIVEN,
            (
                CUT,
                f"        if given:\n            x = x[:, -given:]\n        elif text_ids is None:\n    {CUT}"
                f"        else:\n    {CUT}",
            ),
        ),
        "patched",
    ),
    "none in one of three branches": (
        (
            GIVEN,
            (
                CUT,
                f"        if given:\n            x = x[:, -given:]\n        elif text_ids is None:\n    {CUT}"
                "        else:\n            pass\n",
            ),
        ),
        HANGS,
    ),
    "none where a condition does not hold": ((GIVEN, (CUT, f"        if given:\n    {CUT}")), HANGS),
    "none where the second condition does not hold either": (
        (GIVEN, (CUT, f"        if given:\n            x = x[:, -given:]\n        elif text_ids is None:\n    {CUT}")),
        HANGS,
    ),
    "more than a cut in one branch": (
        (
            GIVEN,
            (CUT, f"        if given:\n            x = x[:, -given:]\n            x = x * 2\n        else:\n    {CUT}"),
        ),
        HANGS,
    ),
    "one stream's in one branch, another one's in the other": (
        (
            GIVEN,
            (CUT, f"        if given:\n            x = image[:, -given:]\n        else:\n    {CUT}"),
        ),
        HANGS,
    ),
    "a condition of what the blocks compute": (
        ((CUT, f"        if x.mean() > 0:\n            x = x[:, -9:]\n        else:\n    {CUT}"),),
        "where the image stream is cut off hangs on what the blocks compute",
    ),
    "a second condition of what the blocks compute": (
        (
            GIVEN,
            (
                CUT,
                f"        if given:\n            x = x[:, -given:]\n        elif x.mean() > 0:\n    {CUT}"
                f"        else:\n    {CUT}",
            ),
        ),
        "where the image stream is cut off hangs on what the blocks compute",
    ),
    "a condition of how much the blocks give": (
        ((CUT, f"        if x.shape[1] > 9:\n            x = x[:, -9:]\n        else:\n    {CUT}"),),
        "patched",
    ),
    "cuts in two branches that something else comes out of too": (
        (GIVEN, (CUT, f"        if given:\n            text = x[:, -given:]\n        else:\n    {CUT}")),
        "x comes out of the blocks too, and is used after them",
    ),
    "a loop around the cut": (
        (
            GIVEN,
            (
                CUT,
                "        if given:\n            for _ in given:\n                x = x[:, -9:]\n"
                f"        else:\n    {CUT}",
            ),
        ),
        HANGS,
    ),
    "a cut in an expression with two": (
        (GIVEN, (CUT, "        x = x[:, -given:] if given else x[:, text.shape[1] :]\n")),
        "x comes out of the blocks too, and is used after them",
    ),
    "something else in their place": (
        ((JOINTS, f"        if self.busy:\n{BRANCH}        else:\n            x = 2 * x\n"),),
        "the forward has a way around self.joints",
    ),
    "nothing in their place": (((JOINTS, f"        if self.busy:\n{BRANCH}"),), "patched"),
    "two ways through them": (((JOINTS, f"        if self.busy:\n{BRANCH}        else:\n{BRANCH}"),), "patched"),
    "a context around them": (((JOINTS, f"        with torch.autocast('cpu'):\n{BRANCH}"),), "patched"),
}
IN_BLOCK: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "an attribute of the block": (
        ((END, f"        self.bank = mixed\n{END}"),),
        "JointBlock.forward keeps what it computes in self.bank",
    ),
    "a dictionary among the keywords": (
        (
            ("rotation):\n", "rotation, **more):\n        store = more.get('store')\n"),
            (END, f"        store['x'] = mixed\n{END}"),
        ),
        "JointBlock.forward keeps what it computes in store",
    ),
    "a helper keeps it in a dictionary of its own, and that in one that it is given": (
        (TOLD, (END, f"        keep(told, mixed)\n{END}"), ("class Joint", KEEP)),
        "keep keeps what it computes in store",
    ),
    "a note of the block's number": ((TOLD, (END, f"        told['kind'] = 'joint'\n{END}")), "patched"),
    "a shape": ((TOLD, (END, f"        told['size'] = mixed.shape[1]\n{END}")), "patched"),
    "a dictionary that something given makes": (
        (TOLD, (END, f"        store = told.of('joint')\n        store['x'] = mixed\n{END}")),
        "JointBlock.forward keeps what it computes in store",
    ),
    "a tensor that is made of tokens and of something given": (
        (
            TOLD,
            (
                END,
                "        scaled = torch.ones_like(mixed + told)\n        scaled[..., 0] = mixed[..., 0] / 2\n"
                f"        mixed = scaled * mixed\n{END}",
            ),
        ),
        "patched",
    ),
    "a list of its own": (((END, f"        parts = []\n        parts.append(mixed)\n{END}"),), "patched"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_MODEL)
def test_what_the_model_does_between_the_blocks(name: str) -> None:
    changes, expected = IN_MODEL[name]
    assert verdict({"flow/model.py": variant(MODEL, *changes)}) == expected


@pytest.mark.parametrize("name", IN_BLOCK)
def test_what_a_block_keeps(name: str) -> None:
    changes, expected = IN_BLOCK[name]
    assert verdict({"flow/single.py": variant(SINGLE, *changes)}) == expected
