"""The target for diffusers' transformers: what it recognises, and what it builds where diffusers is installed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chipmunk.registry import load
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.building import installed_object
from chipmunk.verify.checkout import CheckoutError
from chipmunk.verify.run import target_of

TARGET = load().targets["diffusers"].module
BLOCK = BlockFacts("m.py", "Block", True)
FACTS = ModelFacts("m.py", "Model", "a", "b", "hidden_states", "img_ids", BLOCK, BLOCK)


def test_other_models_are_not_recognised() -> None:
    assert not TARGET.recognise([], {})
    assert not TARGET.recognise([replace(FACTS, image="img")], {})
    assert not TARGET.recognise([replace(FACTS, ids=None)], {})
    assert not load().targets["flux"].module.recognise([FACTS], {})


def test_the_names_of_diffusers_are_recognised() -> None:
    assert TARGET.recognise([FACTS], {})
    assert TARGET.recognise([replace(FACTS, installed=True)], {})


def test_a_script_beside_the_official_repository_leaves_that_its_target() -> None:
    official, installed = replace(FACTS, image="img"), replace(FACTS, installed=True)
    targets = load().targets
    assert [name for name in targets if targets[name].recognise([official, installed], {})] == ["flux"]
    assert target_of(official, "flux", targets).name == "flux.py"
    assert target_of(installed, "flux", targets).name == "diffusers.py"
    assert target_of(installed, None, targets).name == "diffusers.py"


def test_a_constructor_that_needs_something_unknown_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self, in_channels: int, moon_phase: float) -> None:
            super().__init__()

    with pytest.raises(TARGET.CannotRun, match="Odd\\(\\) needs 'moon_phase'"):
        TARGET.build(Odd, TARGET.SMALL)


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(TARGET.CannotRun, match=r"no tensor 'x_embedder\.weight'"):
        TARGET.values_of({"img_in.weight": (128, 16)})


def test_a_package_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(CheckoutError, match=r"Model of nowhere cannot be imported .* not installed") as caught:
        installed_object("nowhere/models/flux.py", "Model")
    assert caught.value.next_command is not None
    assert caught.value.next_command.endswith("-m pip install --upgrade nowhere")


def test_a_pipeline_is_no_loop() -> None:
    with pytest.raises(TARGET.CannotRun, match="encoders"):
        TARGET.loop_variants(lambda self: None, "self")


def transformer(name: str) -> Any:
    models = pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")
    if not hasattr(models, name):
        pytest.skip(f"this release has no {name}")
    return TARGET.build(getattr(models, name), TARGET.SMALL).eval().requires_grad_(False)


NAMES = ["FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reference", [False, True])
def test_small_models_are_built_and_called(name: str, reference: bool) -> None:
    model = transformer(name)
    given = TARGET.inputs(model, 2, 5, 4, 7, torch.Generator().manual_seed(0), reference=reference)
    velocity = TARGET.call(model, model, given, 0.7)
    assert velocity.shape == given["img"].shape == (2, 20, 16)
    assert torch.isfinite(velocity).all()
    again = TARGET.build(type(model), TARGET.values_of({n: tuple(t.shape) for n, t in model.state_dict().items()}))
    again.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_is_the_released_one(name: str) -> None:
    model_class = type(transformer(name))
    with torch.device("meta"):
        full = TARGET.build(model_class, TARGET.FULL)
    parameters = sum(parameter.numel() for parameter in full.parameters()) / 1e9
    expected = {NAMES[0]: (11.9, 24), NAMES[1]: (32.2, 48), NAMES[2]: (None, 24)}[name]
    if expected[0] is not None:
        assert parameters == pytest.approx(expected[0], rel=0.02)
    assert full.config.num_attention_heads == expected[1]


def test_sampling_is_euler_steps() -> None:
    model = transformer(NAMES[0])
    given = TARGET.inputs(model, 1, 3, 3, 5, torch.Generator().manual_seed(0))
    image = given["img"]
    wanted = image - 0.5 * TARGET.call(model, model, given, 1.0)
    wanted = wanted - 0.5 * TARGET.call(model, model, {**given, "img": wanted}, 0.5)
    assert torch.equal(TARGET.run_loop(TARGET.sample, "model", model, given, [1.0, 0.5, 0.0]), wanted)
