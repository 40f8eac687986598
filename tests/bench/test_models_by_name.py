"""Which model is built: the target's full size, one that it knows by name, or the small one on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from chipmunk.bench.device import CannotTime, attention_heads, need_memory
from chipmunk.bench.model import size_of
from chipmunk.bench.spec import Spec
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from targets import flux

BLOCK = BlockFacts("model.py", "Block", True)
FACTS = ModelFacts("model.py", "Model", "double_blocks", "single_blocks", "img", "img_ids", BLOCK, BLOCK)


class Model(nn.Module):
    def __init__(self, depth: int = 19) -> None:
        super().__init__()
        self.depth = depth
        self.linear = nn.Linear(1000, 1000, bias=False)


def target(**more: Any) -> ModuleType:
    module = ModuleType("target")
    vars(module).update({"NAME": "family", "SMALL": {"depth": 3}, "FULL": {"depth": 19}, **more})
    return module


def spec(**more: Any) -> Spec:
    common: dict[str, Any] = {"side": "original", "root": Path("."), "facts": FACTS, "target": Path("target.py")}
    return Spec(**{**common, "out": Path("out"), "sizes": ((1280, 768),), **more})


def test_no_name_is_the_full_size_on_a_gpu_and_the_small_one_on_a_cpu() -> None:
    assert size_of(spec(), target(), Model) == {"depth": 19}
    assert size_of(spec(device="cpu"), target(), Model) == {"depth": 3}


def test_a_name_is_asked_of_the_target_with_the_class() -> None:
    asked = []

    def named(model_class: type[nn.Module], name: str | None) -> dict[str, Any]:
        asked.append((model_class, name))
        return {"depth": 8}

    assert size_of(spec(model="klein"), target(named=named), Model) == {"depth": 8}
    assert size_of(spec(model="klein", device="cpu"), target(named=named), Model) == {"depth": 8}
    assert asked == 2 * [(Model, "klein")]
    assert size_of(spec(), target(named=named), Model) == {"depth": 8}, "the full size may depend on the class"
    assert asked[2:] == [(Model, None)]


def test_a_target_without_names_says_so() -> None:
    with pytest.raises(CannotTime, match="target 'family' knows no models by name"):
        size_of(spec(model="klein"), target(), Model)


@pytest.mark.parametrize(
    ("side", "next_command"), [("patched", "chipmunk bench mine --model schnell"), ("original", None)]
)
def test_a_name_that_is_not_known_says_which_are_and_what_to_run(side: str, next_command: str | None) -> None:
    module = target(named=flux.named, CannotRun=flux.CannotRun)
    with pytest.raises(
        CannotTime, match=r"no model 'huge' of First \(it knows, of FLUX.1: schnell; without a"
    ) as refused:
        size_of(spec(model="huge", side=side, root=Path("mine")), module, First)
    assert refused.value.kind == "build"
    assert refused.value.next_command == next_command


def test_weights_that_do_not_fit_are_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_999_999, 80_000_000))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(CannotTime, match=r"its 1\.0 million parameters take 0\.0 GB, 0\.0 GB are free") as refused:
            need_memory(spec(), Model)
        assert refused.value.kind == "weights"
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000_000, 80_000_000))
        need_memory(spec(), Model)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("attributes", "heads"),
    [
        ({"config": SimpleNamespace(num_attention_heads=48, attention_head_dim=128)}, (48, 128)),  # of diffusers
        ({"config": SimpleNamespace(anything=1), "num_heads": 2, "hidden_size": 128}, (2, 64)),
        ({"num_heads": 48, "hidden_size": 6144}, (48, 128)),
        ({"num_heads": 32}, (32, 128)),
        ({}, (24, 128)),
    ],
)
def test_the_joint_attention_is_timed_with_the_models_own_heads(
    attributes: dict[str, Any], heads: tuple[int, int]
) -> None:
    model = Model()
    for name, value in attributes.items():
        setattr(model, name, value)
    assert attention_heads(model) == heads


@dataclass
class FirstParams:
    in_channels: int
    vec_in_dim: int
    hidden_size: int
    depth: int


@dataclass
class SecondParams:
    in_channels: int = 128
    hidden_size: int = 6144
    depth: int = 8


class First(nn.Module):
    def __init__(self, params: FirstParams) -> None:
        super().__init__()


class Second(nn.Module):
    def __init__(self, params: SecondParams) -> None:
        super().__init__()


def test_the_official_repositories_have_a_full_size_each() -> None:
    """FLUX.2 is known by what its parameters lack: a pooled text."""
    assert flux.named(First, None) is flux.FULL
    assert flux.named(Second, None)["hidden_size"] == 6144
    assert flux.named(Second, "klein-9b")["hidden_size"] == 4096
    assert flux.named(First, "schnell")["guidance_embed"] is False
    for model_class, name in ((First, "klein-9b"), (Second, "schnell"), (Second, "huge")):
        with pytest.raises(flux.CannotRun, match=f"knows no model '{name}' of {model_class.__name__}"):
            flux.named(model_class, name)
