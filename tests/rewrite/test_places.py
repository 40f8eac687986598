"""Where a model treats image tokens by where they lie, their order stays; where it only seems to, it is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, MODEL, SAMPLING, SINGLE, variant

from .running import Outcome, order_of, plan_of

pytestmark = pytest.mark.usefixtures("no_configuration")

MIX = "        text = text + self.text_out(text_x)\n"
HEADS = "        self.heads = heads\n"
END = "        return x + self.leave"
OUT = "        return self.out(x)\n"
TIME, LAST, LOOP = "time[:, None, None]\n", "        self.out = ", "        for block in self.joints:"
MIXED = "        mixed = attend(q, k, v, rotation)\n"

_LOCAL = variant(
    DOUBLE,
    (MIX, "        image = image + self.near(image, 6)\n" + MIX),
    (HEADS, HEADS + "        self.near = Near(width)\n"),
    (
        "class PairBlock",
        "class Near(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.SiLU())\n\n"
        "    def forward(self, tokens, rows):\n"
        "        grid = tokens.transpose(1, 2).unflatten(2, (rows, -1))\n"
        "        return self.mix(grid).flatten(2).transpose(1, 2)\n\n\nclass PairBlock",
    ),
)
_MASKED = variant(ATTENTION, ("rotation):", "rotation, mask=None):"), ("(q, k, v)\n", "(q, k, v, attn_mask=mask)\n"))
_WRITES = "        image = image + (then - now) * velocity\n"
_BANK = variant(
    SINGLE,
    (
        MIXED,
        "        if self.writing:\n            self.bank = k, v\n            mixed = attend(q, k, v, rotation)\n"
        "        else:\n            more = (1 + self.bank[0]) * rotation\n"
        "            mixed = attend(q, more, v + self.bank[1], rotation)\n",
    ),
    ("        self.act =", "        self.writing, self.bank = True, None\n        self.act ="),
)
_BANKS = variant(
    SAMPLING,
    ("    for now", "    first = True\n    for now"),
    (
        "        velocity = model(",
        "        for block in model.joints:\n            block.writing = first\n"
        "        if first:\n"
        "            model(image=image.flip(0), image_ids=image_ids, text=text, text_ids=text_ids, time=time)\n"
        "        first = False\n        for block in model.joints:\n            block.writing = False\n"
        "        velocity = model(",
    ),
    ("image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time)\n" + _WRITES,
     "image=image, image_ids=image_ids.flip(1), text=text, text_ids=text_ids, time=time)\n" + _WRITES),
)  # fmt: skip

BY_PLACE: dict[str, tuple[dict[str, str], str]] = {
    "a convolution in a module of the block's": ({"double": _LOCAL}, "Near.forward mixes neighbours (Conv2d)"),
    "a functional convolution": (
        {
            "double": variant(
                DOUBLE,
                (
                    MIX,
                    "        image = image + nn.functional.avg_pool1d(image.transpose(1, 2), 3, 1, 1).transpose(1, 2)\n"
                    + MIX,
                ),
            )
        },
        "PairBlock.forward goes by where tokens lie (avg_pool1d)",
    ),
    "a picture made of the tokens": (
        {
            "double": variant(
                DOUBLE,
                (
                    MIX,
                    "        side = int(image.shape[1] ** 0.5)\n        seen = image.mean(-1).reshape(-1, side, side)\n"
                    "        image = image + seen.transpose(1, 2).flatten(1)[..., None]\n" + MIX,
                ),
            )
        },
        "PairBlock.forward goes by where tokens lie (reshape)",
    ),
    "a roll of the joint stream": (
        {"single": variant(SINGLE, (END, "        x = x + 0.1 * x.roll(1, 1)\n" + END))},
        "JointBlock.forward goes by where tokens lie (roll)",
    ),
    "a running sum after the blocks": (
        {"model": variant(MODEL, (OUT, "        x = x + torch.cumsum(x, dim=1)\n" + OUT))},
        "Painter.forward goes by where tokens lie (cumsum)",
    ),
    "a table of positions that the model learns": (
        {
            "model": variant(
                MODEL,
                (TIME, TIME + "        image = image + self.places[:, : image.shape[1]]\n"),
                (LAST, "        self.places = nn.Parameter(torch.randn(1, 40, width))\n" + LAST),
            )
        },
        "Painter.forward adds self.places to the tokens, row by row",
    ),
    "a buffer of positions": (
        {
            "model": variant(
                MODEL,
                (TIME, TIME + "        image = image * self.places\n"),
                (LAST, '        self.register_buffer("places", torch.rand(36, width))\n' + LAST),
            )
        },
        "Painter.forward adds self.places to the tokens, row by row",
    ),
    "a mask of the block's own": (
        {
            "attention": _MASKED,
            "single": variant(
                SINGLE,
                ("v, rotation)", "v, rotation, self.mask)"),
                ("        self.act =", "        self.mask = torch.ones(41, 41).tril(8).bool()\n        self.act ="),
            ),
        },
        "attend computes attention with a mask of the model's own",
    ),
    "a mask that the model makes": (
        {
            "attention": _MASKED,
            "single": variant(SINGLE, ("x, rotation):", "x, rotation, mask):"), ("v, rotation)", "v, rotation, mask)")),
            "model": variant(
                MODEL,
                (LOOP, "        near = torch.ones(x.shape[1], x.shape[1]).tril(8).bool()\n" + LOOP),
                ("x = block(x, rotation)", "x = block(x, rotation, near)"),
            ),
        },
        "attend computes attention with a mask of the model's own",
    ),
    "a slice at a fixed place": (
        {"single": variant(SINGLE, (END, "        x = torch.cat((x[:, :20] * 0.5, x[:, 20:]), 1)\n" + END))},
        "JointBlock.forward goes by where tokens lie (a slice at a fixed place)",
    ),
    "the first half of the image alone": (
        {
            "double": variant(
                DOUBLE,
                (
                    MIX,
                    f"        a, b = image.chunk(2, 1)\n        image = torch.cat((0.5 * a, b), 1)\n{MIX}",
                ),
            )
        },
        "PairBlock.forward goes by where tokens lie (chunk)",
    ),
    "keys that are kept on the block for a call with other positions": (
        {"single": _BANK, "sampling": _BANKS},
        "JointBlock.forward keeps what it computes in self.bank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_PLACE)
def test_tokens_keep_their_order_where_it_matters(name: str, tmp_path: Path) -> None:
    files, why = BY_PLACE[name]
    outcome = Outcome(tmp_path, files)
    assert order_of(outcome.plan) == f"token order is off: {why}"
    outcome.check()
    assert all("reordered" not in order for order in outcome.statistics.token_order)


ALIKE: dict[str, dict[str, str]] = {
    "a roll along the channels": {"single": variant(SINGLE, (END, "        x = x + x.roll(1, -1).flip(-1)\n" + END))},
    "a slice of the channels": {
        "single": variant(SINGLE, (END, "        x = torch.cat((x[:, :, 16:], x[..., :16]), -1)\n" + END))
    },
    "heads by their number": {
        "double": variant(
            DOUBLE,
            (
                MIX,
                "        b, n, h = image.shape[0], image.shape[1], self.heads\n"
                "        image = image + image.view(b, n, h, -1).flip(-1).reshape(b, n, -1)\n" + MIX,
            ),
        )
    },
    "halves of the channels": {
        "double": variant(DOUBLE, (MIX, "        image = torch.cat(image.chunk(2, dim=-1)[::-1], -1)\n" + MIX))
    },
    "a number for each channel": {
        "model": variant(
            MODEL,
            (OUT, "        x = x * self.gain + self.shift\n" + OUT),
            (
                "        self.out = ",
                "        self.gain = nn.Parameter(torch.ones(width))\n"
                '        self.register_buffer("shift", torch.zeros(1, 1, width))\n        self.out = ',
            ),
        )
    },
    "the largest value of all is kept": {
        "single": variant(
            SINGLE,
            (END, "        self.largest = x.abs().max().float()\n" + END),
            ("        self.act =", "        self.largest = None\n        self.act ="),
        )
    },
    "pieces of another tensor, put together for the second kind of block": {
        "single": variant(
            SINGLE,
            ("x, rotation):", "x, rotation, gains):"),
            ("        return x + self", "        a, b = gains.chunk(2, dim=1)\n        return a * x + b * self"),
        ),
        "model": variant(
            MODEL,
            ("x = block(x, rotation)", "x = block(x, rotation, gains)"),
            ("        x = torch.cat((text,", "        time = time[:, None, None]\n"
             "        gains = torch.cat((1 - time, 1 + time), dim=1)\n        x = torch.cat((text,"),
        ),
    },
    "a mask that is none": {
        "attention": _MASKED,
        "single": variant(SINGLE, ("v, rotation)", "v, rotation, None)")),
    },
    "a convolution of something else": {
        "model": variant(
            MODEL,
            (TIME, TIME + "        text = self.near(text.transpose(1, 2)).transpose(1, 2)\n"),
            (LAST, "        self.near = nn.Conv1d(4, 4, 3, padding=1)\n" + LAST),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_what_treats_all_tokens_alike_does_not_keep_their_order(name: str, tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, ALIKE[name])
    assert order_of(outcome.plan) == "token order follows image_ids"
    outcome.check()
    assert "reordered" in outcome.statistics.token_order


@pytest.mark.parametrize("pattern", ["b (h w) c -> b c h w", "b n (g w) c -> b n g w c"])
def test_taking_the_tokens_axis_apart_is_told_by_the_pattern(pattern: str) -> None:
    taken_apart = f'        self.seen(rearrange(image, "{pattern}", w=6))\n'
    text = variant(DOUBLE, ("import torch\n", "import torch\nfrom einops import rearrange\n"), (MIX, taken_apart + MIX))
    assert (
        order_of(plan_of(double=text)) == "token order is off: PairBlock.forward goes by where tokens lie (rearrange)"
    )
    heads = text.replace(pattern, "b n (h c) -> b h n c")
    assert order_of(plan_of(double=heads)) == "token order follows image_ids"


def test_a_patched_repository_says_the_same() -> None:
    files, _ = BY_PLACE["a mask of the block's own"]
    plan = plan_of(**files)
    changed = {change.path[5:-3]: change.after.decode() for change in plan.changes}
    again = plan_of(**{**files, **changed})
    assert not again.changes
    assert again.models[0].ids is plan.models[0].ids is None


@pytest.mark.parametrize(
    ("shape", "is_grid"),
    [
        ("b, h, w, -1", True),
        ("(-1, self.grid_h, self.grid_w)", True),
        ("b, height, width, c", True),
        ("b, h_len, w_len, c", True),
        ("rows, cols, -1", True),
        ("side, side", True),
        ("b, n, heads, -1", False),
        ("b, n, h, d", False),
        ("-1, 4, 4", False),
        ("b, w, h", False),
    ],
)
def test_rows_and_columns_are_told_by_their_names(shape: str, is_grid: bool) -> None:
    text = variant(DOUBLE, (MIX, f"        self.seen(image.reshape({shape}))\n" + MIX))
    off = "token order is off: PairBlock.forward goes by where tokens lie (reshape)"
    assert order_of(plan_of(double=text)) == (off if is_grid else "token order follows image_ids")


_PROCESSORS = variant(
    SINGLE,
    ("from flow.attention import attend\n", "from diffusers.models.attention_processor import Attention\n"),
    (
        "class JointBlock",
        "class Mix:\n    def __call__(self, attn, hidden_states, rotation=None, mask=None):\n"
        "        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)\n"
        "        return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n\n\n"
        "class Coarse:\n    def __call__(self, attn, hidden_states, rotation=None, mask=None):\n"
        "        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)\n"
        "        k, v = k[:, 512:].unflatten(1, (-1, 4)).mean(2), v[:, 512:].unflatten(1, (-1, 4)).mean(2)\n"
        "        return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n\n\nclass JointBlock",
    ),
    ("self.act = nn", "self.attn = Attention(width, heads=heads, processor=Mix())\n        self.act = nn"),
    ("        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)\n", ""),
    ("attend(q, k, v, rotation)", "self.attn(hidden_states=qkv, rotation=rotation)"),
)
_SETS = variant(
    SAMPLING,
    ("from flow.model import Painter\n", "from flow.model import Painter\nfrom flow.single import Coarse\n"),
    ("    for now", "    model.set_attn_processor(Coarse())\n    for now"),
)


_FOR_MAPS = (
    "        k, v = k[:, 512:].unflatten(1, (-1, 4)).mean(2), v[:, 512:].unflatten(1, (-1, 4)).mean(2)\n",
    "        if hidden_states.ndim == 4:\n            k = k.reshape(1, height, width, 4)\n",
)


@pytest.mark.parametrize(
    ("single", "files", "is_read"),
    [
        (_PROCESSORS, {"sampling": _SETS}, True),
        (_PROCESSORS, {}, False),
        (_PROCESSORS.replace(*_FOR_MAPS), {"sampling": _SETS}, False),
    ],
)
def test_a_processor_that_is_set_later_is_read_too(single: str, files: dict[str, str], is_read: bool) -> None:
    """The module that asks for it is another package's; one that nothing sets, or that treats maps apart, is none."""
    why = "token order is off: Coarse.__call__ goes by where tokens lie (a slice at a fixed place)"
    assert order_of(plan_of(single=single, **files)) == (why if is_read else "token order follows image_ids")
