"""The FLUX target: building models by their constructors, calling them and their loops by their signatures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from chipmunk import registry
from chipmunk.rewrite.plan import BlockFacts, LoopFacts, ModelFacts
from chipmunk.verify.run import target_of

flux: Any = registry.load().targets["flux"].module

FACTS = ModelFacts(
    "model.py", "Flux", "double_blocks", "single_blocks", "img", "img_ids",
    BlockFacts("layers.py", "Double", attention=True, mlp="img_mlp"),
    BlockFacts("layers.py", "Single", attention=True, linear_in="linear1", linear_out="linear2"),
    (LoopFacts("sampling.py", "denoise", 1, "model", ("pred",)),),
)  # fmt: skip


@pytest.fixture(scope="module")
def starter() -> Iterator[ModuleType]:
    """The starter's `flux.model`, under no name that stays."""
    root = str(registry.data_path("templates") / "flux-starter")
    sys.path.insert(0, root)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        from flux import model  # type: ignore[import-not-found]

        yield model
    finally:
        sys.path.remove(root)
        sys.dont_write_bytecode = before
        for name in [name for name in sys.modules if name == "flux" or name.startswith("flux.")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(starter: ModuleType) -> nn.Module:
    built: nn.Module = flux.build(starter.Flux, flux.SMALL)
    return built.requires_grad_(False)


def test_recognises_by_the_model_not_by_files(tmp_path: Path) -> None:
    assert flux.recognise([FACTS], {})
    assert flux.recognise([replace(FACTS, ids=None), FACTS], {"unrelated.py": b""})
    assert not flux.recognise([], {"flux/model.py": b""})
    assert not flux.recognise([replace(FACTS, ids=None)], {})
    assert flux.recognise([replace(FACTS, ids=None)], {FACTS.file: b"def forward(self, img, img_ids): ..."})
    assert target_of(replace(FACTS, ids=None), "flux", registry.load().targets).name == "by_signature.py"
    (tmp_path / FACTS.file).write_text("def forward(self, img, img_ids): ...")
    assert target_of(replace(FACTS, ids=None), "flux", registry.load().targets, tmp_path).name == "flux.py"
    assert not flux.recognise([replace(FACTS, ids="positions")], {FACTS.file: b"img_ids"})
    assert not flux.recognise([replace(FACTS, image="latents")], {})
    assert not flux.recognise([replace(FACTS, double_block=replace(FACTS.double_block, attention=False))], {})


# Building.


@dataclass
class OlderParams:
    """Before `out_channels` came."""

    in_channels: int
    hidden_size: int
    theta: int = 7


class Older(nn.Module):
    def __init__(self, params: OlderParams) -> None:
        super().__init__()
        self.params = params


class SpelledOut(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, patch_size: int = 2) -> None:
        super().__init__()
        self.given = hidden_size, num_heads, patch_size


class Wrapper(Older):
    def __init__(self, lora_rank: int = 128, lora_scale: float = 1.0, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rank = lora_rank


class Flavoured(nn.Module):
    def __init__(self, hidden_size: int, flavour: str) -> None:
        super().__init__()


@dataclass
class FlavouredParams:
    hidden_size: int
    flavour: str


class FlavouredInside(nn.Module):
    def __init__(self, params: FlavouredParams) -> None:
        super().__init__()


def test_builds_from_a_dataclass_with_the_fields_it_has() -> None:
    assert flux.build(Older, flux.SMALL).params == OlderParams(16, 128, 10_000)


def test_builds_from_spelled_out_parameters() -> None:
    assert flux.build(SpelledOut, flux.FULL).given == (3072, 24, 2)


def test_builds_a_wrapper_that_passes_its_arguments_on() -> None:
    wrapper = flux.build(Wrapper, flux.SMALL)
    assert wrapper.rank == 4
    assert wrapper.params.hidden_size == 128


@pytest.mark.parametrize("model_class", [Flavoured, FlavouredInside])
def test_names_the_parameter_that_it_does_not_know(model_class: type[nn.Module]) -> None:
    with pytest.raises(flux.CannotRun, match="'flavour'"):
        flux.build(model_class, flux.SMALL)


def test_small_leaves_three_blocks_of_each_kind_after_two_dense_layers() -> None:
    assert flux.SMALL["depth"] >= 5
    assert flux.SMALL["depth_single_blocks"] >= 3
    assert flux.SMALL["num_heads"] >= 2


@pytest.mark.parametrize("size", ["SMALL", "FULL"])
def test_reads_the_size_of_a_model_from_its_checkpoint(size: str, starter: ModuleType) -> None:
    values = getattr(flux, size)
    with torch.device("meta"):
        model = flux.build(starter.Flux, values)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert flux.values_of(shapes) == values


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(flux.CannotRun, match="no tensor 'img_in"):
        flux.values_of({"conv.weight": (1, 2, 3, 3)})


# Calling.


def given(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = flux.inputs(model, 2, 5, 7, 3, torch.Generator().manual_seed(0), **options)
    return made


def test_inputs_are_a_row_major_grid(model: nn.Module) -> None:
    made = given(model)
    assert made["img"].shape == (2, 35, 16)
    assert made["img_ids"][1, 7 * 2 + 4].tolist() == [0, 2, 4]
    assert "img_cond" not in made


def test_reference_tokens_carry_the_number_of_their_image(model: nn.Module) -> None:
    made = given(model, reference=True)
    assert made["img_cond_seq"].shape == (2, 3 * 6, 16)
    assert made["img_cond_seq_ids"][0, -1].tolist() == [1, 2, 5]


def test_a_model_with_more_channels_in_than_out_gets_the_rest_as_condition(starter: ModuleType) -> None:
    wide = flux.build(starter.Flux, {**flux.SMALL, "in_channels": 40}).requires_grad_(False)
    made = given(wide)
    assert made["img_cond"].shape == (2, 35, 24)
    assert flux.call(wide, wide, made, 0.5).shape == (2, 35, 16)


class Wrapped(nn.Module):
    """A linear layer with a LoRA beside it, under names of its own; its small matrices come first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(2, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, 2))
        self.base = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Packed(Wrapped):
    """Its weight is packed, and says nothing of its widths; the layer does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        linear.register_buffer("packed", linear.weight.data.half().flatten())
        linear.weight = None  # type: ignore[assignment]
        del self.down, self.up


class Silent(nn.Module):
    """Whatever it does, it does not say how wide."""


LINEARS = {"img_in": "", "txt_in": "", "vector_in": "in_layer", "final_layer": "linear"}


def wrap(model: nn.Module, wrapper: type[nn.Module]) -> nn.Module:
    for name, inside in LINEARS.items():
        holder, last = (model.get_submodule(name), inside) if inside else (model, name)
        setattr(holder, last, wrapper(getattr(holder, last)) if wrapper is not Silent else Silent())
    return model


@pytest.mark.parametrize("wrapper", [Wrapped, Packed])
def test_widths_are_asked_of_linears_that_are_wrapped(starter: ModuleType, wrapper: type[nn.Module]) -> None:
    plain = flux.build(starter.Flux, {**flux.SMALL, "in_channels": 40}).requires_grad_(False)
    wanted = given(plain)
    wrapped = wrap(plain, wrapper)
    made = given(wrapped)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_a_layer_that_does_not_tell_its_widths_is_named(starter: ModuleType) -> None:
    model = wrap(flux.build(starter.Flux, flux.SMALL), Silent)
    with pytest.raises(flux.CannotRun, match="'img_in', a Silent, does not tell how wide"):
        given(model)
    del model.img_in
    with pytest.raises(flux.CannotRun, match="no layer 'img_in'"):
        given(model)


def test_call_goes_through_the_slot_and_takes_the_first_of_several_results(model: nn.Module) -> None:
    def slot(**arguments: Any) -> Any:
        assert set(arguments) == {"img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance"}
        return model(**arguments), "info"

    made = given(model)
    assert torch.equal(flux.call(slot, model, made, 0.5), flux.call(model, model, made, 0.5))
    assert not torch.equal(flux.call(model, model, made, 0.5), flux.call(model, model, made, 0.25))


def test_call_names_an_argument_that_it_does_not_know_unless_it_is_given() -> None:
    class Wants(nn.Module):
        def forward(self, img: Any, flavour: str, masks: Any = None) -> Any:
            return img + len(flavour)

    wants, made = Wants(), {"img": torch.zeros(1, 2, 3), "img_ids": 0, "txt": 0, "txt_ids": 0, "vec": 0}
    with pytest.raises(flux.CannotRun, match=r"Wants.forward\(\) needs 'flavour'"):
        flux.call(wants, wants, made, 1.0)
    assert flux.call(wants, wants, made, 1.0, {"flavour": "oak"}).max() == 3


# Loops.


def plain(model, img, img_ids, txt, txt_ids, vec, timesteps, guidance=4.0, img_cond=None, img_cond_seq=None):  # type: ignore[no-untyped-def]
    return img, (img_cond is not None, img_cond_seq is not None)


def with_cfg(net, img, img_ids, txt, txt_ids, vec, timesteps, true_cfg=1.0, neg_txt=None, neg_vec=None, id=None):  # type: ignore[no-untyped-def]
    return img + (true_cfg != 1.0) * (neg_txt is not None)


def inverting(model, img, timesteps, inverse, info):  # type: ignore[no-untyped-def]
    info.setdefault("passes", []).append(inverse)
    return img + (1 if inverse else 10 * len(info["passes"])), info


def wanting(model, img, timesteps, flavour):  # type: ignore[no-untyped-def]
    return img


def test_variants_follow_from_the_signature() -> None:
    assert flux.loop_variants(plain, "model") == ("plain", "reference", "channels")
    assert flux.loop_variants(with_cfg, "net") == ("plain", "cfg")
    assert flux.loop_variants(inverting, "model") == ("inversion",)
    with pytest.raises(flux.CannotRun, match=r"wanting\(\) needs 'flavour'"):
        flux.loop_variants(wanting, "model")
    with pytest.raises(flux.CannotRun, match="needs 'net'"):
        flux.loop_variants(with_cfg, "model")


def test_run_loop_passes_what_the_variant_asks_for() -> None:
    made = {name: torch.zeros(1) for name in ("img", "img_ids", "txt", "txt_ids", "vec", "img_cond", "neg_txt")}
    seen = []

    def spy(model, img, img_ids, txt, txt_ids, vec, timesteps, guidance=4.0, img_cond=None):  # type: ignore[no-untyped-def]
        seen.append((len(timesteps), img_cond is not None))
        return img

    flux.run_loop(spy, "model", None, made, (1.0, 0.5, 0.0))
    flux.run_loop(spy, "model", None, made, (1.0, 0.5, 0.0), "channels")
    assert seen == [(3, False), (3, True)]
    assert flux.run_loop(with_cfg, "net", None, made, (1.0, 0.0)) == 0
    assert flux.run_loop(with_cfg, "net", None, made, (1.0, 0.0), "cfg") == 1
    # to noise and back, with one `info` for both passes
    assert flux.run_loop(inverting, "model", None, made, (1.0, 0.0), "inversion") == 21
