"""Features that a model keeps in its arguments from call to call, as TaylorSeer's does, are in the tokens' order."""

from __future__ import annotations

from typing import Any

import torch
from flux_model import Flux, inputs
from test_runtime_samplers import compare, steps_of
from torch import Tensor

import chipmunk


class Remembering(Flux):
    """Adds a part of the image of the call before, which it keeps in a dictionary of the caller's."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, cache: Any = None, **given: Any) -> Tensor:  # type: ignore[override]
        before = cache["features"].get("image")
        cache["features"]["image"] = img
        mixed = img if before is None else img + 0.1 * before
        out: Tensor = Flux.forward.__wrapped__(self, img=mixed, img_ids=img_ids, **given)  # type: ignore[attr-defined]
        return out


def test_features_of_a_call_with_moved_tokens_stay_with_them() -> None:
    def sample(model: Any) -> Tensor:
        given: Any = inputs(8, 8)
        img, cache = given.pop("img"), {"features": {}}
        return steps_of(model, img, lambda x, t: model(img=x, timesteps=t, cache=cache, **given))

    with torch.no_grad():
        statistics = compare(sample, Remembering)
    assert list(statistics.token_order) == ["reordered"]
    assert not statistics.restarts


def test_a_hook_that_comes_while_an_image_is_drawn_sees_tokens_in_their_own_order() -> None:
    def sample(model: Any) -> Tensor:
        given: Any = inputs(8, 8)
        img, seen, hooks = given.pop("img"), [torch.zeros(1)], list[Any]()

        def step(x: Tensor, t: Tensor) -> Tensor:
            if float(t[0]) < 0.7 and not hooks:
                watched = model.double_blocks[1].img_proj
                hooks.append(watched.register_forward_hook(lambda module, args, out: seen.append(out.clone())))
            result: Tensor = model(img=x, timesteps=t, **given)
            return result + 0.1 * seen[-1].mean(-1, keepdim=True) * torch.linspace(0, 1, x.shape[1])[:, None]

        return steps_of(model, img, lambda x, t: step(x, t))

    with torch.no_grad():
        statistics = compare(sample)
    assert list(statistics.token_order) == [
        "reordered",
        "kept: a hook of double_blocks.1.img_proj may read its tokens",
    ]
    assert dict(statistics.restarts) == {"what watches the model changed": 1}
