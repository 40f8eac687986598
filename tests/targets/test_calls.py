"""Calling models of no known family: roles by name, widths by asking, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk.target.calls import Signature, call, inputs, probe, roles_of, signature_of
from chipmunk.target.signature import CannotRun


def roles(function: Callable[..., Any]) -> dict[str, str]:
    return roles_of(inspect.signature(function).parameters)


def test_roles_of_the_known_families() -> None:
    def diffusers(
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        guidance,
        joint_attention_kwargs,
        controlnet_block_samples,
        return_dict,
    ): ...  # type: ignore[no-untyped-def]

    assert roles(diffusers) == {
        "hidden_states": "image", "encoder_hidden_states": "text", "pooled_projections": "pooled", "timestep": "time",
        "img_ids": "image ids", "txt_ids": "text ids", "guidance": "guidance",
    }  # fmt: skip

    def hunyuan(
        hidden_states,
        timestep,
        text_states,
        encoder_attention_mask,
        byt5_text_states,
        byt5_text_mask,
        rotary_pos_emb_cache,
    ): ...  # type: ignore[no-untyped-def]

    assert roles(hunyuan) == {
        "hidden_states": "image", "timestep": "time", "text_states": "text", "encoder_attention_mask": "mask",
        "byt5_text_states": "text", "byt5_text_mask": "mask",
    }  # fmt: skip

    def comfyui(x, timestep, context, y=None, transformer_options={}, **kwargs): ...  # type: ignore[no-untyped-def]  # noqa: B006

    assert roles(comfyui) == {"x": "image", "timestep": "time", "context": "text", "y": "pooled"}


def test_a_second_image_or_time_is_no_guess() -> None:
    def forward(hidden_states, image_embeds, image_cond_hidden_states, timestep, timestep_r, target_timestep): ...  # type: ignore[no-untyped-def]

    assert roles(forward) == {"hidden_states": "image", "timestep": "time"}


class Tokens(nn.Module):
    """Image tokens with positions; text whose width shows in its mean first; a guidance that breaks for a batch."""

    def __init__(self, channels: int = 12, text: int = 20, pooled: int = 6) -> None:
        super().__init__()
        self.axes_dim = [4, 4, 4, 4]
        self.image_in, self.out = nn.Linear(channels, 8), nn.Linear(8, channels)
        self.text_norm, self.text_mean, self.text_in = nn.LayerNorm(text), nn.Linear(text, 8), nn.Linear(text, 8)
        self.pooled_in = nn.Linear(pooled, 8)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, t: Tensor, y: Tensor, guidance: Any = None
    ) -> Tensor:
        if guidance is not None and guidance:
            raise ValueError("never")
        assert img_ids.shape == (img.shape[1], 4)
        mean = self.text_mean((txt * 2.0).mean(1)) + self.pooled_in(y) + t[:, None]
        text = self.text_in(self.text_norm(txt)).sum(1)
        out: Tensor = self.out(self.image_in(img) + mean[:, None] + text[:, None])
        return out


class Latents(nn.Module):
    """Latents in patches of two; a mask that is needed though it is optional; fewer channels out than in."""

    def __init__(self, into: int = 5, out: int = 3, text: int = 10) -> None:
        super().__init__()
        self.patch_size = [2, 2]
        self.embed = nn.Conv2d(into, 8, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(text))
        self.text_in, self.out = nn.Linear(text, 8), nn.ConvTranspose2d(8, out, 2, stride=2)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, context_mask: Tensor | None = None
    ) -> tuple[Tensor]:
        assert context_mask is not None
        text = self.text_in(context * self.scale) * context_mask[..., None]
        return (self.out(self.embed(x) + text.sum(1)[..., None, None] + timesteps[:, None, None, None]),)


def test_widths_are_found_by_asking() -> None:
    found = probe(Tokens())
    assert found.widths == {"img": 12, "txt": 20, "y": 6}
    assert (found.dimensions, found.axes, found.outputs) == (3, 4, 12)
    assert "guidance" not in found.roles  # the model does not run with it


def test_positions_may_be_given_for_each_image() -> None:
    class Batched(Tokens):
        def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            assert img_ids.shape == (*img.shape[:2], 4)
            return super().forward(img, img_ids[0], txt, txt_ids[0], t, y)

    assert probe(Batched()).ids_by_image
    assert not probe(Tokens()).ids_by_image


def test_latents_masks_and_a_condition_beside_the_image() -> None:
    found = probe(Latents())
    assert found.widths == {"x": 5, "context": 10}
    assert (found.dimensions, found.patch, found.outputs) == (4, 2, 3)
    assert found.roles["context_mask"] == "mask"


@pytest.mark.parametrize("model", [Tokens(), Latents()])
def test_inputs_fit_the_call_and_depend_on_the_prompt(model: nn.Module) -> None:
    given = inputs(model, 2, 5, 7, 3, torch.Generator().manual_seed(0))
    again = inputs(model, 2, 5, 7, 3, torch.Generator().manual_seed(0))
    assert all(torch.equal(given[name], again[name]) for name in given)
    velocity = call(model, model, given, 0.5)
    assert velocity.shape == given["img"].shape
    other = {**given, "txt": given["txt"] + 1}
    assert not torch.equal(call(model, model, other, 0.5), velocity)
    assert not torch.equal(call(model, model, given, 0.25), velocity)
    assert "img_cond" in given or isinstance(model, Tokens)


def test_a_model_is_asked_once() -> None:
    model = Tokens()
    calls: list[object] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    first = signature_of(model)
    asked = len(calls)
    assert signature_of(model) is first
    assert len(calls) == asked > 0


def test_an_argument_that_no_name_tells_is_refused_unless_it_is_given() -> None:
    class Wants(Tokens):
        def forward(self, flavour: str, **others: Any) -> Tensor:  # type: ignore[override]
            assert flavour == "oak"
            return super().forward(**others)

    Wants.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(Tokens.forward).parameters.values(),
            inspect.Parameter("flavour", inspect.Parameter.KEYWORD_ONLY),
        ]
    )
    with pytest.raises(CannotRun, match=r"Wants.forward\(\) needs 'flavour', and its name does not tell"):
        probe(Wants())
    assert isinstance(probe(Wants(), {"flavour": "oak"}), Signature)


def test_a_model_that_fails_for_another_reason_says_which() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, img: Tensor, t: Tensor) -> Tensor:
            raise KeyError("where")

    with pytest.raises(CannotRun, match=r"Broken cannot be called .* KeyError: 'where'"):
        probe(Broken())

    class Pictures(Broken):
        def forward(self, picture: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return picture

    with pytest.raises(CannotRun, match="needs 'picture'"):
        probe(Pictures())
