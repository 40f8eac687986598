"""The file that a user completes where no target can build or call a model: it says all that signatures tell."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.verify.skeleton import skeleton


@dataclass
class Params:
    width: int
    flavour: str


class Plain(nn.Module):
    def __init__(self, params: Params, num_heads: int = 24, head_dim: int = 128, act: Any = nn.SiLU, mode: str = "a"):
        super().__init__()


class Called(nn.Module):
    """Needs an argument whose name tells nothing."""

    def __init__(self, channels: int = 4, text_dim: int = 6) -> None:
        super().__init__()
        self.enter, self.text = nn.Conv2d(channels, 8, 1), nn.Linear(text_dim, 8)
        self.leave = nn.Conv2d(8, channels, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor, flavour: Tensor, extras: Any = None
    ) -> tuple[Tensor]:
        bias = self.text(text).mean(1) * text_mask.float().mean(1, keepdim=True) + timestep[:, None] + flavour
        return (self.leave(self.enter(sample) + bias[..., None, None]),)


def test_a_model_that_cannot_be_built_asks_for_its_parameters_alone() -> None:
    text = skeleton(Plain, calls=False)
    assert f"from {__name__} import Plain, Params\n" in text
    assert text.endswith(
        """\
    return Plain(
        params=Params(
            width=...,
            flavour=...,
        ),
        num_heads=2,
        head_dim=64,
        mode='a',
    )
"""
    )
    compile(text, "verify_factory.py", "exec")
    assert "def call(" not in text


def test_what_the_target_knows_is_filled_in() -> None:
    text = skeleton(Plain, calls=False, values={"width": 128, "mode": "b", "depth": 5})
    assert "            width=128,\n            flavour=...,\n" in text
    assert "        mode='b',\n" in text
    assert "depth" not in text


def completed() -> ModuleType:
    """What a user makes of the file for `Called`."""
    text = skeleton(Called, calls=True)
    for written, mine in (
        ("noise(batch, ..., height, width),", "noise(batch, 4, height, width),"),
        ("noise(batch, text_tokens, ...),", "noise(batch, text_tokens, 6),"),
        ('"flavour": ...', '"flavour": noise(batch, 8)'),
    ):
        assert written in text
        text = text.replace(written, mine)
    assert "..." not in text
    module = ModuleType("verify_factory")
    exec(compile(text, "verify_factory.py", "exec"), vars(module))
    return module


def test_a_completed_file_builds_and_calls_the_model() -> None:
    module = completed()
    model = module.build().requires_grad_(False)
    given = module.inputs(model, 2, 3, 5, 7, torch.Generator().manual_seed(0))
    assert set(given) == {"img", "txt", "text_mask", "flavour"}
    velocity = module.call(model, model, given, 0.5)
    assert velocity.shape == given["img"].shape == (2, 4, 3, 5)
    assert not torch.equal(module.call(model, model, given, 0.25), velocity)


def test_what_forward_can_do_without_is_named() -> None:
    assert "# it also takes extras\n" in skeleton(Called, calls=True)


def test_tokens_want_positions() -> None:
    class Tokens(nn.Module):
        def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor) -> Tensor:
            return img

    text = skeleton(Tokens, calls=True)
    assert '"img": noise(batch, height * width, ...),' in text
    assert '"img_ids": positions.expand(batch, -1, -1),  # (batch, height * width, 3)' in text
    module = ModuleType("verify_factory")
    text = text.replace("noise(batch, height * width, ...)", "noise(batch, height * width, 4)")
    text = text.replace("noise(batch, text_tokens, ...)", "noise(batch, text_tokens, 6)").partition("def inputs")[2]
    exec("import torch\n\n\ndef inputs" + text, vars(module))
    given = module.inputs(nn.Linear(1, 1), 2, 3, 5, 7, torch.Generator().manual_seed(0))
    assert given["img_ids"].shape == (2, 15, 3)
    assert given["img_ids"][1, 7].tolist() == [0, 1, 2], "row by row, behind a column of zeros"
    assert given["txt_ids"].shape == (2, 7, 3)
    assert "timesteps=times," in text


def test_a_forward_that_names_nothing_says_where_to_look() -> None:
    class Wrapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(1)

    text = skeleton(Wrapped, calls=True)
    assert "...  # its signature names nothing: as the repository's own code calls it" in text
    assert '"img": noise(batch, height * width, ...),' in text
    compile(text, "verify_factory.py", "exec")


def test_where_a_factory_builds_the_model_the_call_is_left() -> None:
    text = skeleton(Called, calls=True, builds=False)
    assert text.startswith("import torch\n\n\ndef inputs(")
    assert "def build(" not in text
    assert "def call(" in text
    compile(text, "verify_factory.py", "exec")
