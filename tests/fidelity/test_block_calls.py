"""Blocks that the model runs by a method of theirs are counted as those that it calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk
from chipmunk.fidelity.block_calls import block_calls
from chipmunk.fidelity.coverage import coverage
from chipmunk.fidelity.flops import ModelCost
from chipmunk.fidelity.recording import measure_cost, recording
from tests.runtime.flux_model import DoubleBlock, Flux, SingleBlock, build, denoise, inputs, rotary_table, small


class MethodDouble(DoubleBlock):
    """No `forward`; the method that the model calls hands on to another one."""

    forward = nn.Module.forward

    def run(self, **given: Any) -> tuple[Tensor, Tensor]:
        return self.work(**given)

    def work(self, **given: Any) -> tuple[Tensor, Tensor]:
        return DoubleBlock.forward(self, **given)


class MethodSingle(SingleBlock):
    """Has a `forward` too, which nobody calls."""

    run = SingleBlock.forward

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError


class MethodFlux(Flux):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        for block in self.double_blocks:
            block.__class__ = MethodDouble
        for block in self.single_blocks:
            block.__class__ = MethodSingle

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Any, img_ids: Any, txt: Any, txt_ids: Any, timesteps: Any, **options: Any) -> Tensor:
        vec = self.vec_in(timesteps[:, None].to(img.dtype)).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.size // self.count)
        for block in chipmunk.blocks(self.double_blocks, self, img):
            img, txt = block.run(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), dim=1)
        for block in chipmunk.blocks(self.single_blocks, self):
            img = block.run(img, vec=vec, pe=pe)
        return self.out(chipmunk.hidden(self, img[:, txt.shape[1] :]))


def blocks_of(model: Any) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def models() -> tuple[Flux, Flux]:
    return build(double=2, single=2), build(kind=MethodFlux, double=2, single=2)


def test_their_operations_are_theirs(models: tuple[Flux, Flux]) -> None:
    def cost(model: Flux) -> ModelCost:
        return measure_cost(model, blocks_of(model), lambda: denoise(model, 1, **inputs()))

    called, run = map(cost, models)
    assert run == called
    assert min(run.blocks) > 0


def test_which_of_them_ran_is_noted(models: tuple[Flux, Flux]) -> None:
    for model in models:
        with recording(model, blocks_of(model), watched=True) as found:
            denoise(model, 2, **inputs())
        assert [sorted(call) for call in found.calls] == [[0, 1, 2, 3]] * 2


def test_what_they_cover_is_noted_for_each(models: tuple[Flux, Flux]) -> None:
    noted = []
    for model in models:
        chipmunk.enable(model, small())
        with coverage(model, blocks_of(model)) as found:
            denoise(model, 9, **inputs())
        chipmunk.disable(model)
        noted.append(found)
    assert noted[0] == noted[1]
    assert sorted(noted[1]["mlp"]) == sorted(noted[1]["attention"]) == [1, 2, 3]


class Part(nn.Module):
    def forward(self, x: int) -> int:
        return self.help(x) + 1

    def help(self, x: int) -> int:
        return 2 * x

    def fail(self) -> None:
        raise KeyError


def test_a_method_that_the_block_calls_itself_is_part_of_the_call() -> None:
    blocks: list[nn.Module] = [Part(), Part()]
    seen: list[tuple[str, int]] = []
    with block_calls(blocks, lambda i: seen.append(("in", i)), lambda i: seen.append(("out", i))):
        assert blocks[1](3) == 7
        assert blocks[0].help(3) == 6  # type: ignore[operator]
        with pytest.raises(KeyError):
            blocks[0].fail()  # type: ignore[operator]
        assert blocks[0](3) == 7
    assert seen == [("in", 1), ("out", 1)] + [("in", 0), ("out", 0)] * 3
    assert blocks[0](3) == 7
    assert len(seen) == 8
    assert all(name.startswith("_") or name == "training" for block in blocks for name in block.__dict__)
