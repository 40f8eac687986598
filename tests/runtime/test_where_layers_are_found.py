"""Which modules find the state of a layer, and which inputs and outputs keep the order of tokens."""

from __future__ import annotations

from typing import Any

import torch
from flux_model import Flux, build, inputs, small
from torch import Tensor, nn

import chipmunk
from chipmunk.config import Attention, Mlp
from chipmunk.runtime.block_list import blocks_of, holders
from chipmunk.runtime.find_model import ForwardSpec
from chipmunk.runtime.layer_state import AttentionRules, LayerState, MlpRules


def state() -> LayerState:
    return LayerState(AttentionRules.of(Attention()), MlpRules.of(Mlp()), "reference")


class Block(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.shared = nn.Sequential(nn.Linear(2, 2)), shared


def test_modules_below_a_block_find_its_layer_but_shared_ones_none() -> None:
    shared = nn.Identity()
    blocks, states = [Block(shared), Block(shared), Block(shared)], [state(), None, state()]
    found = list(holders(blocks, states))
    assert found == [
        (blocks[0], states[0]),
        (blocks[0].own, states[0]),
        (blocks[2], states[2]),
        (blocks[2].own, states[2]),
    ]


def test_a_list_in_a_dictionary() -> None:
    model = nn.Module()
    model.lists = nn.ModuleDict({"image": nn.ModuleList([nn.Identity()]), "text": nn.ModuleList([nn.Identity()])})
    model.joint = nn.ModuleList([nn.Identity(), nn.Identity()])
    named = blocks_of(model, ForwardSpec("lists.image", "joint", "x", None, __file__))
    assert [name for name, _ in named] == ["lists.image.0", "joint.0", "joint.1"]
    assert named[0][1] is model.lists["image"][0]


def order_of(model: Flux, **more: Any) -> list[str]:
    chipmunk.enable(model, small())
    given = {**inputs(), **more}
    with torch.no_grad():
        for _ in chipmunk.steps(model, range(9)):
            model(**given, timesteps=torch.ones(1))
    return list(chipmunk.statistics(model).token_order)


class Own(Flux):
    """A model of the user's: residuals for some of the tokens, functions that see them, a crop."""

    @chipmunk.model_forward(
        double="double_blocks", single="single_blocks", image="img", ids="img_ids", per_token=("control",)
    )
    def forward(self, img: Tensor, img_ids: Tensor, control: Any = None, options: Any = None, **more: Any) -> Tensor:
        out: Tensor = Flux.forward.__wrapped__(self, img=img, img_ids=img_ids, **more)  # type: ignore[attr-defined]
        return out[:, -(options or {}).get("rows", img.shape[1]) :]


def own() -> Flux:
    return build(kind=Own)


def test_what_keeps_the_order() -> None:
    assert order_of(own()) == ["reordered"]
    assert "control is given" in order_of(own(), control=[torch.zeros(1, 3, 4)])[0]
    assert "one by one" in order_of(own(), options={"patches": {"double": [print]}})[0]
    assert "one by one" in order_of(own(), options={"deep": [{"x": (torch.zeros(1, 63, 4),)}]})[0]


def test_an_output_of_fewer_rows_is_computed_again_in_the_old_order() -> None:
    model = own()
    tokens = inputs()["img"].shape[1]
    assert order_of(model, options={"rows": tokens - 1}) == [
        "reordered",
        "kept: the model's output is not (B, tokens, …)",
    ]
