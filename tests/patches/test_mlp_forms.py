"""MLPs in the forms that repositories give them: which are patched, why others are not, and that patched ones run."""

# A case is a line, however long.
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path

import pytest
from mlp_program import ONLY, REGISTRY, after, check, planned, planned_files, reasons, run

from chipmunk.rewrite import SiteStatus, plan_repository
from chipmunk.rewrite.minimal import DOUBLE, SINGLE, variant

CALL = "self.image_mlp(self.image_norm(image))"
BUILT = """nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )"""
SPLIT = "qkv, hidden = torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)"
JOIN = "self.leave(torch.cat((mixed, self.act(hidden)), 2))"
LINE = "\n        "


def own(body: str, built: str = "Feed(width)", head: str = "") -> str:
    """A double block whose image MLP is an object of a class of the repository's own."""
    text = f"class Feed(nn.Module):\n    {body.strip()}\n\n\n{head}class PairBlock"
    return variant(DOUBLE, (f"self.image_mlp = {BUILT}", f"self.image_mlp = {built}"), ("class PairBlock", text))


FEED = """
    def __init__(self, width, drop=0.0, act="gelu-tanh", final=False):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            print("scale has no effect")
        y = nn.functional.gelu(self.up(x), approximate="tanh")
        return self.down(self.drop(y))
"""
LISTED = '''
    def __init__(self, width, inner=None, act="geglu", final=False):
        super().__init__()
        inner = 4 * width if inner is None else inner
        if act == "gelu":
            first = Projected(width, inner)
        if act == "gelu-tanh":
            first = Projected(width, inner, approximate="tanh")
        elif act == "relu":
            first = nn.Linear(width, inner)
        self.net = nn.ModuleList([])
        self.net.append(first)
        self.net.append(nn.Dropout(0.0))
        self.net.append(nn.Linear(inner, width))
        if final:
            self.net.append(nn.Tanh())

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


class Projected(nn.Module):
    """A linear and a GELU."""

    def __init__(self, width, inner, approximate="none"):
        super().__init__()
        self.proj = nn.Linear(width, inner)
        self.approximate = approximate

    def gelu(self, gate):
        if gate.device.type == "mps":
            return nn.functional.gelu(gate.to(dtype=torch.float32), approximate=self.approximate).to(dtype=gate.dtype)
        return nn.functional.gelu(gate, approximate=self.approximate)

    def forward(self, x):
        x = self.proj(x)
        x = self.gelu(x)
        return x
'''
LIKE_TIMM = """
    def __init__(self, width, hidden=None, act_layer=nn.ReLU, norm_layer=None, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden or 4 * width)
        self.act = act_layer()
        self.norm = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden or 4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = self.fc1(x)
        x = self.drop(self.norm(self.act(x)))
        return self.drop(self.fc2(x))
"""
GATED = """
    def __init__(self, width):
        super().__init__()
        self.linear_in, self.gate = nn.Linear(width, 8 * width, bias=False), Gate()
        self.linear_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.linear_out(self.gate(self.linear_in(x)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        half = x.shape[-1] // 2
        return self.act(x[..., :half]) * x[..., half:]
"""
HELPER = variant(
    DOUBLE,
    (f"image = image + {CALL}", "image = self.widened(image)"),
    (
        "    def forward(",
        "    def widened(self, x, gate=1.0):\n        x += gate * self.image_mlp(self.image_norm(x))\n        return x\n\n"
        "    def forward(",
    ),
)
PROCESSOR = variant(
    DOUBLE,
    ("class PairBlock", "class Work:\nMETHOD\n\nclass PairBlock"),
    ("    def forward(self, image, text, rotation):", "CUT\n    def forward(self, image, text, rotation):"),
    ("        self.text_qkv =", "        self.set_work(Work())\n        self.text_qkv ="),
)
_head, _cut, _body = PROCESSOR.partition("CUT\n    def forward(self, image, text, rotation):")
PROCESSOR = variant(
    _head + "    def set_work(self, work):\n        self.work = work\n\n    def forward(self, image, text, rotation):\n"
    "        return self.work(self, image, text, rotation)\n",
    (
        "METHOD\n",
        "    def __call__(self, attn, image, text, rotation):"
        + _body.replace("self.", "attn.").replace("attn.split", "attn.split"),
    ),
)
NESTED = variant(
    DOUBLE,
    ("import attend\n", "import attend\n\n\ndef scaled(x, by, plus=None):\n    return x * by\n"),
    (
        f"image = image + {CALL}",
        "image = image + scaled(by=0.5, x=self.image_mlp(\n            input=image,\n        ))",
    ),
)

HELD = variant(
    SINGLE,
    (
        SPLIT,
        f"x_in = x{LINE}x_in = self.enter(x_in)  # both in one{LINE}cut = x_in.shape[-1] * 3 // 7{LINE}"
        f"qkv, hidden = torch.split(x_in, [cut, x_in.shape[-1] - cut], dim=-1)",
    ),
    (JOIN, JOIN.replace("self.act(hidden)", "hidden")),
    ("mixed = attend", f"hidden = self.act(hidden){LINE}mixed = attend"),
)
LINES = variant(
    SINGLE,
    (
        SPLIT,
        f"both = self.enter(x){LINE}hidden = both[:, :, 3 * self.width :]{LINE}qkv = both[:, :, : 3 * self.width]{LINE}"
        "del both",
    ),
    (f"return x + {JOIN}", f"hidden = torch.cat((mixed, self.act(hidden)), 2){LINE}return x + self.leave(hidden)"),
)
METHOD = variant(
    SINGLE,
    (SPLIT, f"both = self.enter(x){LINE}hidden, qkv = both.split([4 * self.width, 3 * self.width], -1)"),
    ("(mixed, self.act(hidden))", "(nn.functional.gelu(hidden), mixed)"),
)
APART = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width"),
    ("self.act =", "self.widen = nn.Linear(width, 4 * width)\n        self.act ="),
    (SPLIT, f"hidden = self.widen(x){LINE}hidden = self.act(hidden){LINE}qkv = self.enter(x)"),
    ("self.act(hidden)), 2)", "hidden), 2)"),
)
WHOLE = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width"),
    ("nn.Linear(width + 4 * width, width)", "nn.Linear(width, width)"),
    ('self.act = nn.GELU(approximate="tanh")', f"self.mlp = {BUILT}"),
    (SPLIT, "qkv = self.enter(x)"),
    (JOIN, "self.leave(mixed) + self.mlp(x)"),
)
MODULE = """\
import torch
from torch import nn

from flow.attention import attend


class Gate(nn.Module):
    def forward(self, x):
        first, second = x.chunk(2, dim=-1)
        return first * nn.functional.silu(second)


class Work:
    def __call__(self, attn, x, rotation):
        x = attn.enter(x)
        qkv, hidden = torch.split(x, [3 * attn.width, 8 * attn.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, rotation)
        hidden = attn.act(hidden)
        x = torch.cat([mixed, hidden], dim=-1)
        x = attn.leave(x)
        return x


class Both(nn.Module):
    def __init__(self, width, heads, work=None):
        super().__init__()
        self.width, self.heads = width, heads
        self.enter = nn.Linear(width, 3 * width + 8 * width, bias=False)
        self.leave = nn.Linear(width + 4 * width, width, bias=False)
        self.act = Gate()
        self.work = Work() if work is None else work

    def forward(self, x, rotation):
        return self.work(self, x, rotation)


class JointBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Both(width, heads, work=Work())

    def forward(self, x, rotation):
        return x + self.attn(x, rotation)
"""

DOUBLES = {
    "own class": own(FEED),
    "parts in a list": own(LISTED, 'Feed(width, act="gelu-tanh")'),
    "like timm's": own(LIKE_TIMM, 'Feed(width, act_layer=tanh, drop=0)', 'def tanh():\n    return nn.GELU(approximate="tanh")\n\n\n').replace("act_layer=tanh", 'act_layer=lambda: nn.GELU(approximate="tanh")'),
    "gated": own(GATED),
    "in a helper": HELPER,
    "in a processor": PROCESSOR,
    "nested, by keyword": NESTED,
}  # fmt: skip
SINGLES = {
    "held, its shape asked": HELD,
    "slices line by line": LINES,
    "the other way round": METHOD,
    "its own linear": APART,
    "in a module's processor, gated": MODULE,
    "whole, beside the attention": WHOLE,
}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (own(FEED.replace("return self.down(", "return x + self.down(")), ""),
        (own(FEED.replace("nn.functional.gelu(self.up(x), approximate", "nn.functional.elu(self.up(x), alpha")), ""),
        (own(FEED.replace("    def forward", "    @torch.autocast('cpu')\n    def forward")), ""),
        (own(FEED.replace("        y = nn", "        x.clamp_(-1, 1)\n        y = nn")), ""),
        (own(FEED.replace("        y = nn", "        if args:\n            x = x + 1\n        y = nn")), ""),
        (own(FEED.replace("y = nn.functional.gelu(self.up(x)", "y = nn.functional.gelu(self.up(x.abs())")), ""),
        (own(FEED + "\n    def __call__(self, x):\n        return 2 * self.forward(x)\n"), ""),
        (own(LISTED, 'Feed(width, act="gelu-tanh", final=True)'), ""),
        (own(LISTED, 'Feed(width, act="relu")'), ""),
        (own(LISTED.replace("return nn.functional.gelu(gate.to", "return nn.functional.elu(gate.to"), 'Feed(width, act="gelu-tanh")'), ""),
        (own(LIKE_TIMM), ""),
        (own(GATED.replace("x[..., :half]) * x[..., half:]", "x[..., :half]) * x[..., :half]")), ""),
        (own(GATED.replace("x[..., :half]) * x[..., half:]", "x[..., :half]) + x[..., half:]")), ""),
        (own(GATED.replace("// 2", "// 4")), ""),
        (variant(DOUBLE, (CALL, "self.image_mlp(self.image_norm(image), 2)")), "the MLP is called with more than its input"),
        (variant(DOUBLE, (CALL, "self.image_mlp(image[:, image.sum(-1)[0] > 0]).sum()")), "the MLP sees only some of the tokens"),
        (variant(DOUBLE, (CALL, "sum(0 * x for x in (image,))"), ("return image", "for part in range(2):\n            image = image + self.image_mlp(image)\n        return image")), "the MLP is called piece by piece, in a loop"),
        (variant(DOUBLE, (CALL, "self.image_mlp(image) + 2 * self.image_mlp(-image)")), "the MLP is called at several places in one call of the block"),
    ],
)  # fmt: skip
def test_a_double_mlp_that_stays_dense(text: str, problem: str) -> None:
    found = reasons(planned(double=text), "double-mlp")
    assert "patched" not in found
    assert set(found["left dense"]) == {
        problem or "no Linear, GELU or SwiGLU, Linear was found on the image stream alone"
    }


USED = "{} is used in other places too: on a sparse step it would not hold what they expect"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (variant(SINGLE, ("mixed = attend", "hidden = hidden.relu() if rotation is None else hidden\n        mixed = attend")), "missing"),
        (variant(SINGLE, ("mixed = attend", "if rotation is None:\n            hidden = hidden * 2\n        mixed = attend")), "missing"),
        (variant(SINGLE, ("mixed = attend", "hidden *= 2\n        mixed = attend")), "missing"),
        (variant(SINGLE, ("mixed = attend", "print(hidden.shape)\n        mixed = attend")), USED.format("hidden")),
        (variant(SINGLE, ("mixed = attend", "self.last = hidden\n        mixed = attend")), USED.format("hidden")),
        (variant(SINGLE, ("mixed = attend", "keep(tokens=hidden)\n        mixed = attend")), USED.format("hidden")),
        (variant(HELD, ("mixed = attend", "print(x_in.sum())\n        mixed = attend")), USED.format("x_in")),
        (variant(HELD, ("return x +", "return hidden.mean() +")), USED.format("hidden")),
        (variant(LINES, ("return x +", "return hidden.mean() +")), USED.format("hidden")),
        (variant(LINES, ("hidden = both[:, :, 3 * self.width :]", "hidden = both[:, :, 4 * self.width :]")), "missing"),
        (variant(LINES, ("del both", "tail = both[:, :, : 2 * self.width]")), "missing"),
        (variant(LINES, (f"{LINE}qkv = both", "; qkv = both")), "missing"),
        (variant(LINES, ("\n        qkv = both", "\n        x = x + 1\n        qkv = both")), "the parts of the first linear's output are cut off at places apart from each other"),
        (variant(LINES, ("hidden = both[:, :, 3 * self.width :]", "hidden = both[:, 3 * self.width :]")), "missing"),
        (variant(SINGLE, ("mixed, self.act(hidden)), 2)", "mixed, self.act(hidden)), 1)")), "missing"),
        (variant(SINGLE, ("4 * self.width], dim=-1)", "4 * self.width], dim=1)")), "missing"),
        (variant(SINGLE, (f"return x + {JOIN}", f"for _ in range(2):\n            x = x + {JOIN}\n        return x")), "the MLP is computed piece by piece, in a loop"),
        (variant(APART, ("self.widen(x)", "self.widen(x, 2)")), "missing"),
        (variant(WHOLE, ("self.mlp(x)", "self.mlp(x[:, 3:]).sum()")), "the MLP sees only some of the tokens"),
        (variant(WHOLE, ("self.mlp(x)", "self.mlp(x) - self.mlp(-x)")), "the MLP is called at several places in one call of the block"),
        (variant(WHOLE, ("nn.GELU(", "nn.Mish(")), "missing"),
        (variant(METHOD, ("nn.functional.gelu(hidden)", "nn.functional.gelu(hidden, approximate=self.how)")), "missing"),
        (variant(METHOD, ("(nn.functional.gelu(hidden), mixed)", "(nn.functional.gelu(hidden), attend(q, k, v, rotation))")), "something is computed inside the concatenation"),
    ],
)  # fmt: skip
def test_a_single_mlp_that_stays_dense(text: str, problem: str) -> None:
    found = reasons(planned(single=text), "single-mlp")
    assert "patched" not in found
    assert all(problem in reason for reason in found["left dense"])


def test_of_two_mlps_the_first_is_sparse() -> None:
    """A block keeps the caches of one: with two, a sparse step of one would take the other's."""
    text = variant(
        WHOLE,
        ("        self.mlp =", f"        self.more = {BUILT}\n        self.mlp ="),
        ("self.mlp(x)", "self.mlp(x) + self.more(x)"),
    )
    found = reasons(planned(single=text), "single-mlp")
    assert len(found["patched"]) == len(found["left dense"]) == 1
    assert "has another MLP" in found["left dense"][0]


def test_a_module_that_computes_the_same_in_branches() -> None:
    """The double block's MLP in each of two branches, of which one runs."""
    text = variant(
        DOUBLE,
        (
            f"        image = image + {CALL}\n",
            f"        if rotation is None:\n            image = image + {CALL}\n        else:\n"
            "            image = image + 0.5 * self.image_mlp(image)\n",
        ),
    )
    assert len(reasons(planned(double=text), "double-mlp")["patched"]) == 2


@pytest.mark.parametrize(
    ("built", "parts"),
    [
        ('FeedForward(width, activation_fn="geglu")', None),
        ("FeedForward(width)", None),
        ("FeedForward(width, *sizes)", None),
        (
            'FeedForward(dim=width, dim_out=width, activation_fn="gelu-approximate")',
            'parts="net.0.proj, gelu_tanh, net.2", of="FeedForward, GELU"',
        ),
        ('FeedForward(width, width, 4, 0.0, "gelu")', 'parts="net.0.proj, gelu, net.2", of="FeedForward, GELU"'),
        ("Mlp(width, 4 * width)", 'parts="fc1, act, fc2", of="Mlp"'),
    ],
)
def test_a_class_of_a_library(built: str, parts: str | None) -> None:
    imports = "from diffusers.models.attention import FeedForward\nfrom timm.layers import Mlp\n"
    text = variant(
        DOUBLE,
        (f"self.image_mlp = {BUILT}", f"self.image_mlp = {built}"),
        ("from torch import nn\n", f"from torch import nn\n{imports}"),
    )
    plan = planned(double=text)
    assert ("patched" in reasons(plan, "double-mlp")) == (parts is not None)
    change = next(change.after.decode() for change in plan.changes if change.path == "flow/double.py")
    assert parts is None or parts in change


@pytest.mark.parametrize("name", DOUBLES)
def test_a_double_mlp_is_patched_once(name: str) -> None:
    plan = planned(double=DOUBLES[name])
    assert len(reasons(plan, "double-mlp")["patched"]) == 1
    assert not [site for site in plan.sites if site.status is SiteStatus.REFUSED]


@pytest.mark.parametrize("name", SINGLES)
def test_a_single_mlp_is_patched_whole(name: str) -> None:
    plan = planned(single=SINGLES[name])
    found = reasons(plan, "single-mlp")
    assert set(found) == {"patched"}
    assert len(found["patched"]) in (1, 2, 3)
    assert not [site for site in plan.sites if site.status is SiteStatus.REFUSED]
    again = plan_repository(after(planned_files(single=SINGLES[name]), plan), REGISTRY, only=ONLY)
    assert not again.changes
    assert set(reasons(again, "single-mlp")) == {"already patched"}
    assert again.models[0].single_block == plan.models[0].single_block


def test_patched_forms_run(tmp_path: Path) -> None:
    singles = list(SINGLES)
    cases = []
    for index, double in enumerate(DOUBLES):
        single = singles[index % len(singles)]
        cases.append((f"{double}; {single}", {"double": DOUBLES[double], "single": SINGLES[single]}))
    results = run(tmp_path, cases)
    check(results)
    assert len(results) == len(DOUBLES) >= len(SINGLES)


def test_an_mlp_whose_input_has_a_form_in_each_branch_says_so() -> None:
    apart = f"if self.fused:{LINE}    {SPLIT}{LINE}else:{LINE}    qkv, hidden = self.qkv(x), self.other(self.enter)(x)"
    plan = planned(single=variant(SINGLE, (SPLIT, apart)))
    said = "no fused MLP was found: what makes its input has another form in each branch"
    assert reasons(plan, "single-mlp") == {"left dense": [said]}
