"""SwiGLU that a block writes out itself, MLPs without the attention's part, and cuts in equal or in many parts."""

# A case is a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mlp_program import ONLY, REGISTRY, after, check, planned, planned_files, reasons, run

from chipmunk.rewrite import SiteStatus, plan_repository
from chipmunk.rewrite.minimal import DOUBLE, SINGLE, variant

SPLIT = "qkv, hidden = torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)"
JOIN = "self.leave(torch.cat((mixed, self.act(hidden)), 2))"
CALL = "self.image_mlp(self.image_norm(image))"
BUILT = """nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )"""
LINE = "\n        "
SILU = "nn.functional.silu"

# Single blocks: both linears fused with the attention's, unless said otherwise.

HALVES = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width + 8 * width"),
    (SPLIT, SPLIT.replace("4 * self", "8 * self")),
    ("mixed = attend", f"gate, value = hidden.chunk(2, dim=-1){LINE}mixed = attend"),
    ("self.act(hidden)", f"{SILU}(gate) * value"),
)
SWAPPED = variant(
    HALVES,
    ("gate, value = hidden.chunk(2, dim=-1)", "value, gate = torch.split(hidden, hidden.shape[-1] // 2, -1)"),
    (f"{SILU}(gate) * value", "hidden"),
    ("mixed = attend", f"hidden = value * self.act(gate){LINE}mixed = attend"),
    ('nn.GELU(approximate="tanh")', "nn.SiLU()"),
)
SLICES = variant(
    HALVES,
    ("gate, value = hidden.chunk(2, dim=-1)", "half = 4 * self.width"),
    (f"{SILU}(gate) * value", f"{SILU}(hidden[..., :half]) * hidden[..., half:]"),
)
UNBOUND = variant(
    HALVES,
    ("hidden.chunk(2, dim=-1)", "hidden.unflatten(-1, (2, -1)).unbind(-2)"),
)
OWN_LINEAR = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width"),
    ("self.act =", f"self.widen = nn.Linear(width, 8 * width, bias=False){LINE}self.act ="),
    ('nn.GELU(approximate="tanh")', "nn.SiLU()"),
    (
        SPLIT,
        f"value, gate = torch.split(self.widen(x), [4 * self.width, 4 * self.width], dim=-1){LINE}gate = self.act(gate) * value{LINE}qkv = self.enter(x)",
    ),
    ("torch.cat((mixed, self.act(hidden)), 2)", "torch.cat([mixed, gate], 2)"),
)
TWO = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width"),
    ("self.act =", f"self.widen, self.also = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width){LINE}self.act ="),
    (SPLIT, f"hidden = {SILU}(self.widen(x)) * self.also(x){LINE}qkv = self.enter(x)"),
    ("self.act(hidden)", "hidden"),
)
HELD = variant(
    TWO,
    (
        f"hidden = {SILU}(self.widen(x)) * self.also(x)",
        f"gate = self.widen(x){LINE}value = self.also(\n            x\n        )",
    ),
    ("(mixed, hidden)", f"(mixed, value * {SILU}(gate))"),
)
MANY = variant(
    SINGLE,
    (SPLIT, "q, k, v, hidden = self.enter(x).split((self.width, self.width, self.width, 4 * self.width), dim=-1)"),
    ("q, k, v = qkv.unflatten", "q, k, v = torch.cat((q, k, v), -1).unflatten"),
)
CHUNKS = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width + 3 * width"),
    ("nn.Linear(width + 4 * width, width)", "nn.Linear(width + 3 * width, width)"),
    (SPLIT, "qkv, hidden = torch.chunk(self.enter(x), 2, dim=-1)"),
)
HELD_CHUNKS = variant(
    CHUNKS,
    (
        "qkv, hidden = torch.chunk(self.enter(x), 2, dim=-1)",
        f"both = self.enter(x){LINE}qkv, hidden = both.chunk(chunks=2, dim=2)",
    ),
)
ALONE = variant(
    SINGLE,
    ("nn.Linear(width + 4 * width, width)", "nn.Linear(width, width)"),
    ("self.act =", f"self.narrow = nn.Linear(4 * width, width){LINE}self.act ="),
    (JOIN, "self.leave(mixed) + self.narrow(self.act(hidden))"),
)
PARTS = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width + 8 * width"),
    (
        SPLIT,
        "qkv, gate, value = torch.split(self.enter(x), [3 * self.width, 4 * self.width, 4 * self.width], dim=-1)",
    ),
    ("self.act(hidden)", f"{SILU}(gate) * value"),
)
PARTS_FIRST = variant(
    PARTS,
    ("qkv, gate, value =", "value, gate, qkv ="),
    ("[3 * self.width, 4 * self.width, 4 * self.width]", "[4 * self.width, 4 * self.width, 3 * self.width]"),
    (f"torch.cat((mixed, {SILU}(gate) * value), 2)", "torch.cat((hidden, mixed), 2)"),
    ("mixed = attend", f"hidden = value * {SILU}(gate){LINE}mixed = attend"),
)
PARTS_HELD = variant(
    PARTS,
    ("qkv, gate, value = torch.split(self.enter(x), [", f"both = self.enter(x){LINE}qkv, gate, value = both.split(["),
)
FIVE = variant(
    PARTS,
    ("3 * width + 8 * width", "5 * width"),
    ("nn.Linear(width + 4 * width, width)", "nn.Linear(width + width, width)"),
    (
        "qkv, gate, value = torch.split(self.enter(x), [3 * self.width, 4 * self.width, 4 * self.width], dim=-1)",
        "q, k, v, gate, value = self.enter(x).chunk(5, dim=-1)",
    ),
    ("q, k, v = qkv.unflatten", "q, k, v = torch.cat((q, k, v), -1).unflatten"),
)
SINGLES = {
    "halves": HALVES, "halves the other way round, a module": SWAPPED, "slices": SLICES, "unbound": UNBOUND,
    "halves of its own linear": OWN_LINEAR, "two linears": TWO, "two linears, held": HELD,
    "many parts": MANY, "chunks": CHUNKS, "chunks of a variable": HELD_CHUNKS, "a second linear of its own": ALONE,
    "three parts": PARTS, "three parts, the value first": PARTS_FIRST, "three parts of a variable": PARTS_HELD,
    "five parts": FIVE,
}  # fmt: skip

# Double blocks.

INLINE = variant(
    DOUBLE,
    (
        f"self.image_mlp = {BUILT}",
        f"self.image_up, self.image_down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width){LINE}self.act = nn.SiLU()",
    ),
    (
        f"image = image + {CALL}",
        f"normed = self.image_norm(image){LINE}gate, value = self.image_up(normed).chunk(2, -1){LINE}image = image + 0.5 * self.image_down(self.act(gate) * value)",
    ),
)
INLINE_TWO = variant(
    INLINE,
    ("nn.Linear(width, 8 * width)", "nn.Linear(width, 4 * width)"),
    ("self.act = nn.SiLU()", "self.image_gate = nn.Linear(width, 4 * width)"),
    (f"gate, value = self.image_up(normed).chunk(2, -1){LINE}", ""),
    ("self.act(gate) * value", f"self.image_up(normed) * {SILU}(self.image_gate(normed))"),
)
INLINE_GELU = variant(
    INLINE,
    ("nn.Linear(width, 8 * width)", "nn.Linear(width, 4 * width)"),
    ("self.act = nn.SiLU()", "self.act = nn.GELU()"),
    (f"gate, value = self.image_up(normed).chunk(2, -1){LINE}", ""),
    ("self.act(gate) * value", "self.act(self.image_up(normed))"),
)
PAIR = variant(
    DOUBLE,
    (f"self.image_mlp = {BUILT}", "self.image_mlp = Feed(width)"),
    (
        "class PairBlock",
        "class Feed(nn.Module):\n"
        "    def __init__(self, width):\n        super().__init__()\n"
        "        self.w1, self.w3 = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 4 * width, bias=False)\n"
        "        self.w2 = nn.Linear(4 * width, width, bias=False)\n\n"
        "    def forward(self, x):\n        x = nn.functional.silu(self.w1(x)) * self.w3(x)\n        x = self.w2(x)\n        return x\n\n\n"
        "class PairBlock",
    ),
)
DOUBLES = {"halves": INLINE, "two linears": INLINE_TWO, "GELU": INLINE_GELU, "a class with two linears": PAIR}

PRODUCT = f"{SILU}(gate) * value"


@pytest.mark.parametrize(
    "text",
    [
        variant(HALVES, (PRODUCT, "nn.functional.gelu(gate) * value")),
        variant(HALVES, (PRODUCT, f"{SILU}(gate) * gate")),
        variant(HALVES, (PRODUCT, f"{SILU}(gate) + value")),
        variant(HALVES, (PRODUCT, f"{SILU}(gate, True) * value")),
        variant(HALVES, (PRODUCT, f"{SILU}(gate) * (value + 1)")),
        variant(HALVES, (PRODUCT, "torch.sigmoid(gate) * value")),
        variant(HALVES, (PRODUCT, "self.act(gate) * value")),  # which is a GELU
        variant(HALVES, (PRODUCT, "self.silu(gate) * value"), ("    def forward", "    def silu(self, x):\n        return x\n\n    def forward")),
        variant(HALVES, ("hidden.chunk(2, dim=-1)", "hidden.chunk(2, dim=1)")),
        variant(HALVES, ("gate, value = hidden.chunk(2, dim=-1)", "gate, value, _ = hidden.chunk(3, dim=-1)")),
        variant(HALVES, ("hidden.chunk(2, dim=-1)", "(2 * hidden).chunk(2, dim=-1)")),
        variant(UNBOUND, ("(2, -1)).unbind(-2)", "(-1, 2)).unbind(-1)")),
        variant(UNBOUND, ("(2, -1)).unbind(-2)", "(2, -1)).unbind(-1)")),
        variant(SLICES, ("hidden[..., half:]", "hidden[..., half - 1 :]")),
        variant(SLICES, ("hidden[..., half:]", "x[..., half:]")),
        variant(SWAPPED, ("value * self.act(gate)", "value * self.act(gate) * 2")),
        variant(HELD, ("value = self.also(", "x = 2 * x\n        value = self.also(")),
        variant(TWO, ("self.also(x)", "self.also(rotation)")),
        variant(TWO, ("self.also(x)", "self.also(2 * x)")),
        variant(TWO, ("self.also(x)", "self.widen")),
        variant(MANY, ("q, k, v, hidden =", "q, k, hidden, v ="), ("self.width, self.width, 4 * self.width)", "self.width, 4 * self.width, self.width)")),
        variant(CHUNKS, ("chunk(self.enter(x), 2,", "chunk(self.enter(x), 3,")),
        variant(ALONE, ("self.narrow(self.act(hidden))", "self.narrow(torch.relu(hidden))")),
        variant(PARTS, ("qkv, gate, value =", "gate, qkv, value =")),
        variant(PARTS, (f"{SILU}(gate) * value", f"{SILU}(gate) * gate")),
        variant(PARTS, (f"{SILU}(gate) * value", "nn.functional.gelu(gate) * value")),
        variant(PARTS, (f"{SILU}(gate) * value", f"{SILU}(gate) * qkv[..., : 4 * self.width]")),
        variant(FIVE, ("q, k, v, gate, value = self", "q, k, gate, v, value = self")),
    ],
)  # fmt: skip
def test_a_single_block_that_stays_dense(text: str) -> None:
    found = reasons(planned(single=text), "single-mlp")
    assert set(found) == {"left dense"}
    assert all("missing" in reason for reason in found["left dense"])


@pytest.mark.parametrize(
    "text",
    [
        variant(HALVES, ("return x +", "return value.mean() +")),
        variant(HALVES, ("return x +", "return hidden.mean() +")),
        variant(PARTS, ("return x +", "return value.mean() +")),
        variant(PARTS, ("mixed = attend", f"gate.clamp_(-1){LINE}mixed = attend")),
        variant(HALVES, ("mixed = attend", f"gate.clamp_(-1){LINE}mixed = attend")),
        variant(HELD, ("return x +", "return value.mean() +")),
        variant(OWN_LINEAR, ("[mixed, gate]", "[mixed, gate + gate]"), ("qkv = self.enter(x)", "qkv = self.enter(x) + value.mean()")),
    ],
)  # fmt: skip
def test_a_half_that_is_read_elsewhere(text: str) -> None:
    assert "patched" not in reasons(planned(single=text), "single-mlp")


@pytest.mark.parametrize(
    "text",
    [
        variant(INLINE, ("image = image + 0.5 * self", "text = text + 0.5 * self")),
        variant(INLINE, ("normed = self.image_norm(image)", "normed = self.image_norm(rotation)")),
        variant(INLINE, ("normed = self.image_norm(image)", "normed = self.image_norm(image)[:, ::2]"), ("self.act(gate) * value)", "self.act(gate) * value).repeat_interleave(2, dim=1)")),
        variant(INLINE, ("self.act(gate) * value", "self.act(gate + value)")),
        variant(INLINE_GELU, ("nn.GELU()", "nn.Tanh()")),
        variant(PAIR, ("self.w3(x)\n", "self.w1(x)\n")),
        variant(PAIR, ("self.w3(x)\n", "self.w3(2 * x)\n")),
        variant(PAIR, ("functional.silu", "functional.gelu")),
    ],
)  # fmt: skip
def test_a_double_block_that_stays_dense(text: str) -> None:
    found = reasons(planned(double=text), "double-mlp")
    assert set(found) == {"left dense"}


@pytest.mark.parametrize(("patch", "name"), [*(("single", n) for n in SINGLES), *(("double", n) for n in DOUBLES)])
def test_a_form_is_patched_once(patch: str, name: str) -> None:
    changed = {patch: SINGLES[name] if patch == "single" else DOUBLES[name]}
    plan = planned(**changed)
    assert set(reasons(plan, f"{patch}-mlp")) == {"patched"}
    assert not [site for site in plan.sites if site.status is SiteStatus.REFUSED]
    again = plan_repository(after(planned_files(**changed), plan), REGISTRY, only=ONLY)
    assert not again.changes
    assert set(reasons(again, f"{patch}-mlp")) == {"already patched"}
    assert (again.models[0].single_block, again.models[0].double_block) == (
        plan.models[0].single_block,
        plan.models[0].double_block,
    )


def test_the_change() -> None:
    def after_of(text: str) -> str:
        found = next(c.after.decode() for c in planned(single=text).changes if c.path == "flow/single.py")
        found = re.sub(r"(?<=\() *\n *|,? *\n *(?=\))", "", found)  # a call on one line
        return re.sub(r",\n *", ", ", found)

    assert f"chipmunk.cat_linear(self, self.leave, mixed, None, chipmunk.gated(self, {SILU}, gate, value))" in after_of(
        HALVES
    )
    sizes = "[3 * self.width, 4 * self.width, 4 * self.width], gated=True)"
    assert f"qkv, gate, value = chipmunk.split_linear(self, self.enter, x, {sizes}" in after_of(PARTS)
    assert f"qkv, gate, value = chipmunk.split_held(self, both, {sizes}" in after_of(PARTS_HELD)
    assert "4 * self.width, 3 * self.width], mlp_first=True, gated=True)" in after_of(PARTS_FIRST)
    assert "hidden = chipmunk.gated(self, self.act, gate, value, value_first=True)" in after_of(SWAPPED)
    assert "chipmunk.split_linear(self, self.enter, x, [-1, -1])" in after_of(CHUNKS)
    assert "chipmunk.split_held(self, both, [-1, -1])" in after_of(HELD_CHUNKS)
    assert (
        "self.leave(mixed) + chipmunk.out_linear(self, self.narrow, chipmunk.activate(self, self.act, hidden))"
        in after_of(ALONE)
    )
    two = f'chipmunk.gated(self, {SILU}, chipmunk.mlp_linear(self, self.widen, x, half="gate"), chipmunk.mlp_linear(self, self.also, x, half="value"))'
    assert f"hidden = {two}\n" in after_of(TWO)


def test_they_run(tmp_path: Path) -> None:
    doubles = list(DOUBLES)
    cases = []
    for index, (name, text) in enumerate(SINGLES.items()):
        double = doubles[index % len(doubles)]
        cases.append((f"{double}; {name}", {"double": DOUBLES[double], "single": text}))
    results = run(tmp_path, cases, seed=4)
    check(results)
    assert len(results) == len(SINGLES)
