"""What is said where a target's way from a prompt to a picture cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk.fidelity.spec import Picture
from chipmunk.fidelity.studio import BuildError, Studio
from chipmunk.rewrite.plan import LoopFacts


def broken(load: Any, file: str, autoencoder: str | None) -> Any:
    raise KeyError("decoder.weight")


@pytest.mark.parametrize(
    ("given", "named"), [(Path("ae.safetensors"), "ae.safetensors"), (None, "what target 'family' decodes with")]
)
def test_a_decoder_that_does_not_load_is_named(given: Path | None, named: str) -> None:
    studio: Any = object.__new__(Studio)  # without the checkout that a whole one imports
    studio.order = SimpleNamespace(weights=None, factory=None, autoencoder=given)
    studio.target = SimpleNamespace(NAME="family", pipeline=broken)
    studio.checkout = SimpleNamespace(load=None)
    studio.facts = SimpleNamespace(file="model.py", installed=False)
    with pytest.raises(BuildError, match=f"^{named} cannot be used to decode: KeyError"):
        studio._build("model")


SECOND_ORDER = """\
import chipmunk


def denoise(model, img, times):
    for name in ("unrelated",):
        assert name
    for now, then in {steps}:
        velocity = model(img)
        for _ in range(2):
            velocity = model(img + (then - now) / 2 * velocity)
        img = img + (then - now) * velocity
    return img
"""
PAIRS = "zip(times[:-1], times[1:])"


class Velocity(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.cos()


@pytest.mark.parametrize("side", ["original", "patched"])
def test_a_step_that_iterates_is_one_step(side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines run several times: told by them alone, each iteration would be a step."""
    monkeypatch.chdir(tmp_path)  # where no configuration lies
    text = SECOND_ORDER.format(steps=PAIRS if side == "original" else f"chipmunk.steps(model, {PAIRS})")
    if side == "patched":
        text = "# lines moved\n" + text
    path = tmp_path / "sampling.py"
    path.write_text(text)
    module: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), module)
    loop = LoopFacts("sampling.py", "denoise", 7, "model", ("velocity",))
    studio: Any = object.__new__(Studio)
    studio.order = studio.spec = SimpleNamespace(side=side)
    studio._whole = studio.pipeline = None
    studio.width = studio.height = 4
    studio.token_size = 2
    studio.checkout = SimpleNamespace(root=tmp_path)
    studio.facts = SimpleNamespace(image="img", loops=(loop,))
    studio.loop = (loop, module["denoise"], ("plain",))
    studio._models = {"model": Velocity()}
    studio.inputs = lambda picture: {"img": torch.ones(1, 4, 2)}
    studio.target = SimpleNamespace(
        run_loop=lambda run, name, model, given, times, way: run(model, given["img"], times)
    )
    img, wanted = torch.ones(1, 4, 2), []
    for _ in range(4):
        velocity = img.cos()
        for _ in range(2):
            velocity = (img - 0.125 * velocity).cos()
        img = img - 0.25 * velocity
        wanted.append(img)
    drawing = studio.draw(Picture("a prompt", 0), 4, decode=False)
    assert [torch.allclose(a, b) for a, b in zip(drawing.latents, wanted, strict=True)] == [True] * 4
