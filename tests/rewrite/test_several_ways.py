"""Blocks without a forward: one method for each way to run them, as where keys of reference tokens are kept.

One way runs the reference tokens too, which attend to themselves, and gives back their keys and values; the other one
is given these. The model's forward takes the first way, without reference tokens; two more methods of it do what their
names say. Methods of the blocks share what comes before and after the attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chipmunk.rewrite.minimal import MODEL, SAMPLING, variant

from .running import KEPT, Outcome, left_dense, order_of, plan_of

pytestmark = pytest.mark.usefixtures("no_configuration")

ATTENTION = """\
import torch
from torch.nn import functional as F


def attend_apart(q, k, v, texts, places, kept=None):
    if kept is not None:
        keys = torch.cat((k[:, :, :texts], kept["keys"], k[:, :, texts:]), dim=2)
        values = torch.cat((v[:, :, :texts], kept["values"], v[:, :, texts:]), dim=2)
        x = F.scaled_dot_product_attention(q, keys, values, is_causal=False)
    else:
        end = texts + places
        own_q, own_k, own_v = q[:, :, texts:end], k[:, :, texts:end], v[:, :, texts:end]
        other_q = torch.cat((q[:, :, :texts], q[:, :, end:]), dim=2)
        keys = torch.cat((k[:, :, :texts], own_k, k[:, :, end:]), dim=2)
        values = torch.cat((v[:, :, :texts], own_v, v[:, :, end:]), dim=2)
        other = F.scaled_dot_product_attention(other_q, keys, values, is_causal=False)
        own = F.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=False)
        x = torch.cat((other[:, :, :texts], own, other[:, :, texts:]), dim=2)
    return x.transpose(1, 2).flatten(2)
"""

GATE = """\
class Gate(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


"""

DOUBLE = f"""\
import torch
from torch import nn

from flow.attention import attend_apart


{GATE}class PairBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.image_qkv, self.text_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.image_out, self.text_out = nn.Linear(width, width), nn.Linear(width, width)
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_mlp = nn.Sequential(nn.Linear(width, 8 * width), Gate(), nn.Linear(4 * width, width))
        self.text_mlp = nn.Sequential(nn.Linear(width, 8 * width), Gate(), nn.Linear(4 * width, width))

    def split(self, x):
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def prepare(self, image, text, rotation):
        image_q, image_k, image_v = self.split(self.image_qkv(image))
        text_q, text_k, text_v = self.split(self.text_qkv(text))
        q = torch.cat((text_q, image_q), dim=2) * rotation
        k = torch.cat((text_k, image_k), dim=2) * rotation
        v = torch.cat((text_v, image_v), dim=2)
        return q, k, v, text_q.shape[2]

    def finish(self, image, text, image_x, text_x):
        image = image + self.image_out(image_x)
        image = image + self.image_mlp(self.image_norm(image))
        text = text + self.text_out(text_x)
        text = text + self.text_mlp(self.text_norm(text))
        return image, text

    def run_and_keep(self, image, text, rotation, places):
        q, k, v, texts = self.prepare(image, text, rotation)
        kept = {{"keys": k[:, :, texts : texts + places].clone(), "values": v[:, :, texts : texts + places].clone()}}
        x = attend_apart(q, k, v, texts, places)
        image, text = self.finish(image, text, x[:, texts:], x[:, :texts])
        return image, text, kept

    def run_again(self, image, text, rotation, kept):
        q, k, v, texts = self.prepare(image, text, rotation)
        x = attend_apart(q, k, v, texts, kept["keys"].shape[2], kept)
        return self.finish(image, text, x[:, texts:], x[:, :texts])
"""

SINGLE = f"""\
import torch
from torch import nn

from flow.attention import attend_apart


{GATE}class JointBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.width, self.heads = width, heads
        self.enter = nn.Linear(width, 3 * width + 8 * width)
        self.leave = nn.Linear(width + 4 * width, width)
        self.act = Gate()

    def begin(self, x, rotation):
        qkv, hidden = torch.split(self.enter(x), [3 * self.width, 8 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q * rotation, k * rotation, v, hidden

    def end(self, x, mixed, hidden):
        return x + self.leave(torch.cat((mixed, self.act(hidden)), 2))

    def run_and_keep(self, x, rotation, texts, places):
        q, k, v, hidden = self.begin(x, rotation)
        kept = {{"keys": k[:, :, texts : texts + places].clone(), "values": v[:, :, texts : texts + places].clone()}}
        mixed = attend_apart(q, k, v, texts, places)
        return self.end(x, mixed, hidden), kept

    def run_again(self, x, rotation, texts, kept):
        q, k, v, hidden = self.begin(x, rotation)
        mixed = attend_apart(q, k, v, texts, kept["keys"].shape[2], kept)
        return self.end(x, mixed, hidden)
"""

_CALLS = (
    ("image, text = block(image, text, rotation)", "image, text, _ = block.run_and_keep(image, text, rotation, 0)"),
    ("x = block(x, rotation)", "x, _ = block.run_and_keep(x, rotation, text.shape[1], 0)"),
)
_KEEPING = """
    def forward_and_keep(self, image, image_ids, text, text_ids, time, pictures, picture_ids):
        places = pictures.shape[1]
        image = self.image_in(torch.cat((pictures, image), 1)) + time[:, None, None]
        text = self.text_in(text)
        rotation = self.rotate(torch.cat((text_ids, picture_ids, image_ids), dim=1)).unsqueeze(1)
        kept = []
        for block in self.pairs:
            image, text, cache = block.run_and_keep(image, text, rotation, places)
            kept.append(cache)
        x = torch.cat((text, image), dim=1)
        for block in self.joints:
            x, cache = block.run_and_keep(x, rotation, text.shape[1], places)
            kept.append(cache)
        x = x[:, text.shape[1] + places :]
        return self.out(x), kept

    def forward_again(self, image, image_ids, text, text_ids, time, kept):
        image = self.image_in(image) + time[:, None, None]
        text = self.text_in(text)
        rotation = self.rotate(torch.cat((text_ids, image_ids), dim=1)).unsqueeze(1)
        for i, block in enumerate(self.pairs):
            image, text = block.run_again(image, text, rotation, kept[i])
        x = torch.cat((text, image), dim=1)
        for i, block in enumerate(self.joints):
            x = block.run_again(x, rotation, text.shape[1], kept[len(self.pairs) + i])
        x = x[:, text.shape[1] :]
        return self.out(x)
"""
WAYS = variant(MODEL, *_CALLS) + _KEEPING

_INPUTS = "image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time"
AGAIN = (
    SAMPLING
    + f"""

def sample_with(model: Painter, image, image_ids, text, text_ids, times, pictures, picture_ids):
    for i, (now, then) in enumerate(zip(times[:-1], times[1:])):
        time = torch.full((image.shape[0],), now)
        if i == 0:
            velocity, kept = model.forward_and_keep({_INPUTS}, pictures=pictures, picture_ids=picture_ids)
        else:
            velocity = model.forward_again({_INPUTS}, kept=kept)
        image = image + (then - now) * velocity
    return image
"""
)

FILES = {"attention": ATTENTION, "double": DOUBLE, "single": SINGLE, "model": WAYS, "sampling": AGAIN}
SPARSE: dict[str, Any] = {
    **KEPT,
    "attn": {**KEPT["attn"], "top_keys": 0.25, "recompute_mask": True},
    "mlp": {**KEPT["mlp"], "top_keys": 0.25},
}


def test_the_way_without_reference_tokens_is_sparse_and_the_others_say_why_they_are_not() -> None:
    plan = plan_of(**FILES)
    patched = [(s.patch, s.matched) for s in plan.sites if s.status.value == "patched"]
    assert ("model-forward", "Painter.forward") in patched
    facts = plan.models[0]
    assert (facts.double_block.attention, facts.single_block.attention) == (True, True)
    assert (facts.double_block.mlp, facts.single_block.linear_in) == ("image_mlp", "enter")
    assert left_dense(plan, "model-forward") == [
        f"Painter.{name} runs the blocks too: only the calls of Painter.forward are sparse"
        for name in ("forward_and_keep", "forward_again")
    ]


def test_it_computes_the_same_with_everything_kept_and_is_sparse_otherwise(tmp_path: Path) -> None:
    kept = Outcome(tmp_path / "kept", FILES)
    kept.check()
    sparse = Outcome(tmp_path / "sparse", FILES, SPARSE)
    assert 1e-4 < sparse.error < 0.3
    for layer in sparse.statistics.layers:
        assert sum(calls.sparse for calls in layer.attention.values()) > 0, layer.name
        assert sum(calls.sparse for calls in layer.mlp.values()) > 0, layer.name
    wanted = sparse.oracle(tmp_path, FILES, SPARSE)
    assert float((sparse.on - wanted).norm() / wanted.norm()) < 1e-4


def test_calls_of_the_other_ways_are_those_of_the_original(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, FILES, SPARSE, draw="sample_with", extra=(torch.ones(1, 4, 4), torch.ones(1, 4, 3)))
    assert torch.equal(outcome.off, outcome.original)
    assert torch.equal(outcome.on, outcome.original)


def test_attention_is_dense_where_reference_tokens_make_keys_of_another_length(tmp_path: Path) -> None:
    places = ("rotation, 0)", "rotation, 6)"), ("text.shape[1], 0)", "text.shape[1], 6)")
    some = {**FILES, "model": variant(WAYS, *places)}
    kept = Outcome(tmp_path / "kept", some)
    kept.check()
    assert kept.plan.models[0].ids is None
    sparse = Outcome(tmp_path / "sparse", some, SPARSE)
    assert 1e-5 < sparse.error < 0.3
    for layer in sparse.statistics.layers:
        reasons = {reason for calls in layer.attention.values() for reason in calls.dense}
        assert reasons == {"query, key and value differ in shape"}, layer.name
        assert sum(calls.sparse for calls in layer.mlp.values()) > 0, layer.name


def test_tokens_keep_their_order_where_blocks_are_told_how_many_of_them_are_reference_tokens() -> None:
    assert order_of(plan_of(**FILES)) == "token order follows image_ids"
    places = ("rotation, 0)", "rotation, places)"), ("text.shape[1], 0)", "text.shape[1], places)")
    given = variant(
        WAYS,
        *places,
        (
            "text_ids, time):\n        image = self.image_in(image) +",
            "text_ids, time, places=0):\n        image = self.image_in(image) +",
        ),
    )
    assert order_of(plan_of(**{**FILES, "model": given})).startswith(
        "token order is off: PairBlock.run_and_keep goes by where tokens lie (a slice at places"
    )


_HAND_ON = "        mixed = attend_apart(q, k, v, texts, places)\n"
_DENSE = {
    "what is handed on is read in between": (
        (_HAND_ON, _HAND_ON.replace("mixed =", "mixed = hidden.mean() +")),
        "JointBlock.run_and_keep does not just hand on what JointBlock.begin makes to JointBlock.end",
    ),
    "one of the ways does more with it": (
        ("        return self.end(x, mixed, hidden)\n", "        return self.end(x, mixed, 2 * hidden)\n"),
        "JointBlock.run_again does not just hand on what JointBlock.begin makes to JointBlock.end",
    ),
    "it begins twice": (
        (_HAND_ON, "        x = self.begin(x, rotation)[2] + x\n" + _HAND_ON),
        "JointBlock.run_and_keep does not just hand on what JointBlock.begin makes to JointBlock.end",
    ),
    "it is read where it ends": (
        ("        return x + self.leave", "        return hidden.mean() + x + self.leave"),
        "hidden is used in other places too: on a sparse step it would not hold what they expect",
    ),
    "it is read where it begins": (
        ("v, hidden\n\n    def end", "v * hidden.mean(), hidden\n\n    def end"),
        "hidden is used in other places too: on a sparse step it would not hold what they expect",
    ),
    "something else calls it too": (
        ("class JointBlock", "def look(block, x):\n    return block.begin(x, 1)[3]\n\n\nclass JointBlock"),
        "JointBlock.begin or JointBlock.end may be called in other places too",
    ),
}


@pytest.mark.parametrize("name", _DENSE)
def test_an_mlp_that_two_methods_share_is_dense_where_they_do_more_with_it(name: str) -> None:
    change, reason = _DENSE[name]
    plan = plan_of(**{**FILES, "single": variant(SINGLE, change)})
    assert left_dense(plan, "single-mlp") == [reason, reason]
    assert plan.models[0].single_block.linear_in is None
    assert plan.models[0].single_block.attention


def test_keys_of_a_parameter_that_is_not_given_and_parts_beside_the_whole() -> None:
    plan = plan_of(**FILES)
    assert left_dense(plan, "attention") == [
        "key and value come from kept too, which PairBlock.run_and_keep does not give",
        "attention among some of the tokens, beside that of the others",
    ]
    twice = variant(ATTENTION, ("own = F.scaled_dot_product_attention(own_q", "own = F.scaled_dot_product_attention(q"))
    several = "the block computes joint attention at several places in one call"
    assert left_dense(plan_of(**{**FILES, "attention": twice}), "attention")[1:] == [several, several]
