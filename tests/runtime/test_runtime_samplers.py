"""Samplers and inputs of real repositories: with everything kept, each run is the dense run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, error, grid_ids, inputs, rotary_table, small
from torch import Tensor

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")

TIMES = torch.linspace(1, 0, 11).tolist()
EVERYTHING = {"attn__top_keys": 1.0, "mlp__top_keys": 1.0, "patchify__chunk_size_1": 4, "patchify__chunk_size_2": 2}


def pair(kind: type[Flux] = Flux) -> tuple[Flux, Flux]:
    """A model that keeps everything, and the dense one."""
    model, plain = (flux_model.build(0, kind, double=2, single=2) for _ in range(2))
    chipmunk.enable(model, small(**EVERYTHING))
    chipmunk.disable(plain)
    return model, plain


def compare(sampler: Callable[[Any], Tensor], kind: type[Flux] = Flux) -> chipmunk.runtime.counts.Statistics:
    """Run the sampler on both, check that they agree and that most calls were sparse; what was counted."""
    model, plain = pair(kind)
    assert error([sampler(model)], [sampler(plain)]) < 1e-5
    statistics = chipmunk.statistics(model)
    assert statistics.dense_model_calls == {}
    assert all(calls.sparse >= calls.full for layer in statistics.layers[1:] for calls in layer.mlp.values())
    assert statistics.cache_bytes == 0
    return statistics


def at(img: Tensor, time: float) -> Tensor:
    return torch.full((img.shape[0],), time)


# Samplers


def test_guidance_from_a_step_on() -> None:
    def sample(model: Any) -> Tensor:
        given = inputs()
        img, negative = given.pop("img"), {**given, "txt": -given["txt"]}
        for step, (now, then) in enumerate(chipmunk.steps(model, list(pairwise(TIMES)))):
            pred = model(img=img, timesteps=at(img, now), **given)
            if step >= 2:
                neg_pred = chipmunk.slot(model, "neg_pred")(img=img, timesteps=at(img, now), **negative)
                pred = neg_pred + 2 * (pred - neg_pred)
            img = img + (then - now) * pred
        return img

    statistics = compare(sample)
    assert statistics.layers[1].mlp.keys() == {"main", "neg_pred"}


def test_guidance_by_a_batch_of_two() -> None:
    def sample(model: Any) -> Tensor:
        given = inputs(batch=2)
        img = given.pop("img")[:1]
        for now, then in chipmunk.steps(model, list(pairwise(TIMES))):
            both = torch.cat((img, img))
            negative, pred = model(img=both, timesteps=at(both, now), **given).chunk(2)
            img = img + (then - now) * (negative + 2 * (pred - negative))
        return img

    compare(sample)


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["generation", "inversion"])
def test_a_second_order_solver(times: list[float]) -> None:
    def sample(model: Any) -> Tensor:
        given = inputs()
        img = given.pop("img")
        for now, then in chipmunk.steps(model, list(pairwise(times))):
            pred = model(img=img, timesteps=at(img, now), **given)
            middle = img + (then - now) / 2 * pred
            pred_mid = chipmunk.slot(model, "pred_mid")(img=middle, timesteps=at(img, (now + then) / 2), **given)
            img = img + (then - now) * pred_mid
        return img

    assert compare(sample).layers[1].mlp.keys() == {"main", "pred_mid"}


# Reference images and other inputs by token


def steps_of(model: Any, img: Tensor, call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    for now, then in chipmunk.steps(model, list(pairwise(TIMES))):
        img = img + (then - now) * call(img, at(img, now))
    return img


def test_reference_tokens_behind_the_image() -> None:
    """FLUX.1 Kontext: the reference's ids differ in the first column; the prediction is cut."""

    def sample(model: Any) -> Tensor:
        given, reference = inputs(8, 8), inputs(6, 8, seed=3)["img"]
        img = given.pop("img")
        ids = torch.cat((given.pop("img_ids"), grid_ids(6, 8, image=1)[None]), dim=1)

        def call(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = model(img=torch.cat((x, reference), dim=1), img_ids=ids, timesteps=t, **given)
            return out[:, : x.shape[1]]

        return steps_of(model, img, call)

    assert compare(sample).token_order == {"reordered": 1}


class References(Flux):
    """UNO: a list of reference images and of their ids, which the forward puts behind the image."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(  # type: ignore[override]
        self, img: Tensor, img_ids: Tensor, ref_img: Any = None, ref_img_ids: Any = None, **given: Any
    ) -> Tensor:
        tokens = img.shape[1]
        img, img_ids = torch.cat([img, *ref_img], dim=1), torch.cat([img_ids, *ref_img_ids], dim=1)
        out: Tensor = Flux.forward.__wrapped__(self, img=img, img_ids=img_ids, **given)  # type: ignore[attr-defined]
        return out[:, :tokens]


@pytest.mark.parametrize(
    ("second", "order"),
    [(5, "reordered"), (8, "kept: another input belongs to the image tokens one by one")],
    ids=["sizes of their own", "one of the image's size, which may be anything"],
)
def test_a_list_of_reference_images(second: int, order: str) -> None:
    def sample(model: Any) -> Tensor:
        given = inputs(8, 8)
        img = given.pop("img")
        references = [inputs(4, 6, seed=3)["img"], inputs(second, 8, seed=4)["img"]]
        ids = [grid_ids(4, 6, image=1)[None], grid_ids(second, 8, image=2)[None]]
        return steps_of(
            model, img, lambda x, t: model(img=x, timesteps=t, ref_img=references, ref_img_ids=ids, **given)
        )

    assert compare(sample, References).token_order == {order: 1}


def test_ids_of_four_columns() -> None:
    """FLUX.2: time, row, column, and the place in the text."""

    def sample(model: Any) -> Tensor:
        given = inputs(8, 8)
        img = given.pop("img")
        given["img_ids"] = torch.cat((given["img_ids"], torch.zeros(1, 64, 1)), dim=-1)
        given["txt_ids"] = torch.cat((given["txt_ids"], torch.arange(5.0)[None, :, None]), dim=-1)
        return steps_of(model, img, lambda x, t: model(img=x, timesteps=t, **given))

    assert compare(sample).token_order == {"reordered": 1}


class ImageFirst(Flux):
    """The image stands before the text, among the positions and in the joint stream."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(  # type: ignore[override]
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor
    ) -> Tensor:
        tokens, vec = img.shape[1], self.vec_in(timesteps[:, None]).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = rotary_table(torch.cat((img_ids, txt_ids), dim=1), self.size // self.count)
        swapped = torch.cat((pe[:, :, tokens:], pe[:, :, :tokens]), dim=2)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=swapped)
        x = torch.cat((img, txt), dim=1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe)
        out: Tensor = self.out(x[:, :tokens])
        return out


def test_image_first() -> None:
    def sample(model: Any) -> Tensor:
        given = inputs(8, 8)
        img = given.pop("img")
        return steps_of(model, img, lambda x, t: model(img=x, timesteps=t, **given))

    assert compare(sample, ImageFirst).token_order == {"reordered": 1}


class Controlled(Flux):
    """A ControlNet's residuals, one row for each image token, are added to the image."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, control: Any = None, **given: Any) -> Tensor:  # type: ignore[override]
        for residual in control["input"] if control is not None else ():
            img = img + residual
        out: Tensor = Flux.forward.__wrapped__(self, img=img, img_ids=img_ids, **given)  # type: ignore[attr-defined]
        return out


def test_residuals_of_a_controlnet_keep_the_order() -> None:
    def sample(model: Any) -> Tensor:
        given = inputs(8, 8)
        img, residuals = given.pop("img"), [inputs(8, 8, seed=seed)["img"] for seed in (5, 6)]
        return steps_of(model, img, lambda x, t: model(img=x, timesteps=t, control={"input": residuals}, **given))

    assert list(compare(sample, Controlled).token_order) == [
        "kept: another input belongs to the image tokens one by one"
    ]


def test_a_controlnet_that_comes_and_goes() -> None:
    """What comes after tokens were moved would not be moved with them: the slot starts over."""

    def sample(model: Any) -> Tensor:
        given = inputs(8, 8)
        img, residuals = given.pop("img"), [inputs(8, 8, seed=5)["img"]]
        for step, (now, then) in enumerate(chipmunk.steps(model, list(pairwise(TIMES)))):
            control = {"input": residuals} if 3 <= step < 6 else None
            img = img + (then - now) * model(img=img, timesteps=at(img, now), control=control, **given)
        return img

    assert compare(sample, Controlled).restarts == {"what belongs to the image tokens one by one changed": 1}
