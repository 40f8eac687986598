"""The target for ComfyUI, on small modules with its interfaces: `comfy.ops`, `cli_args`, parameters, `_forward`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.run import target_of

TARGET: Any = load().targets["comfyui"].module

BLOCK = BlockFacts("comfy/ldm/flow/layers.py", "Block", True)
FACTS = ModelFacts(
    "comfy/ldm/flow/model.py", "Flow", "double", "single", "img", "img_ids", BLOCK, BLOCK, forward="_forward"
)

OPS = """
from torch import nn

class disable_weight_init:
    class Linear(nn.Linear):
        def reset_parameters(self):
            pass
"""

ARGUMENTS = """
class args:
    use_pytorch_cross_attention = False
    cpu = False
"""

MODEL = """
from dataclasses import dataclass

import torch
from torch import nn

import comfy.ops


@dataclass
class FlowParams:
    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    num_heads: int
    axes_dim: list
    patch_size: int
    guidance_embed: bool


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.Module()
        self.norm.query_norm = nn.Module()
        self.norm.query_norm.scale = nn.Parameter(torch.ones(size))


class Pair(nn.Module):
    def __init__(self, size, linear):
        super().__init__()
        self.img_mlp = nn.Sequential(linear(size, 2 * size), nn.GELU(), linear(2 * size, size))


class Flow(nn.Module):
    def __init__(self, dtype=None, device=None, operations=None, **given):
        super().__init__()
        self.params = params = FlowParams(**given)
        linear, size = operations.Linear, params.hidden_size
        tokens = params.in_channels * params.patch_size**2
        self.img_in, self.txt_in = linear(tokens, size, dtype=dtype), linear(params.context_in_dim, size)
        self.vector_in = nn.Module()
        self.vector_in.in_layer = linear(params.vec_in_dim, size)
        self.double_blocks = nn.ModuleList([Pair(size, linear)])
        self.single_blocks = nn.ModuleList([Scale(size // params.num_heads) for _ in range(2)])
        self.final_layer = nn.Module()
        self.final_layer.linear = linear(size, params.out_channels * params.patch_size**2)

    def forward(self, x, timestep, context, y=None, guidance=None, transformer_options={}, **kwargs):
        b, c, h, w = x.shape
        p = self.params.patch_size
        img = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // p**2, c * p * p)
        vec = self.vector_in.in_layer(y) + timestep[:, None] + guidance[:, None]
        out = self._forward(self.img_in(img), None, self.txt_in(context), vec)
        out = out.view(b, h // p, w // p, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, -1, h, w)

    def _forward(self, img, img_ids, txt, vec):
        return self.final_layer.linear(img + vec[:, None] + txt.mean(1, keepdim=True))
"""

CHROMA = """
from dataclasses import dataclass

from torch import nn


@dataclass
class ChromaParams:
    in_channels: int
    out_channels: int
    hidden_size: int
    in_dim: int
    out_dim: int
    hidden_dim: int
    n_layers: int
    patch_size: int


class Chroma(nn.Module):
    def __init__(self, dtype=None, operations=None, **given):
        super().__init__()
        self.params = ChromaParams(**given)
"""

OTHER = """
import torch
from torch import nn


class Other(nn.Module):
    def __init__(self, in_channels=4, dim=3072, n_heads=24, depth=9, text_dim=2048, dtype=None, operations=None):
        super().__init__()
        self.patch_size = 2
        self.enter = operations.Linear(4 * in_channels, dim, dtype=dtype)
        self.context = operations.Linear(text_dim, dim, dtype=dtype)
        self.blocks = nn.ModuleList([operations.Linear(dim, dim, dtype=dtype) for _ in range(depth)])
        self.leave = operations.Linear(dim, 4 * in_channels, dtype=dtype)

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):
        b, c, h, w = x.shape
        tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        tokens = self.enter(tokens) + self.context(context).mean(1, keepdim=True) + timestep[:, None, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        out = self.leave(tokens).view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, c, h, w)
"""


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """The modules of a small ComfyUI, by name, under no name that stays."""
    root = tmp_path_factory.mktemp("comfyui")
    files = {"ops": OPS, "cli_args": ARGUMENTS, "flow": MODEL, "chroma": CHROMA, "other": OTHER}
    (root / "comfy").mkdir()
    for name, text in files.items():
        (root / "comfy" / f"{name}.py").write_text(text)
    sys.path.insert(0, str(root))
    try:
        yield {name: importlib.import_module(f"comfy.{name}") for name in files}
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name == "comfy" or name.startswith("comfy.")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def flow(comfy: dict[str, ModuleType]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = TARGET.build(comfy["flow"].Flow, TARGET.SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def test_models_elsewhere_or_that_do_their_work_in_forward_are_not_recognised() -> None:
    assert not TARGET.recognise([], {"comfy/ldm/flow/model.py": b""})
    assert not TARGET.recognise([replace(FACTS, file="src/comfy_copy/flow.py")], {})
    assert not TARGET.recognise([replace(FACTS, forward="forward")], {})


def test_models_of_its_package_are_recognised_with_positions_or_without() -> None:
    assert TARGET.recognise([FACTS], {})
    assert TARGET.recognise([replace(FACTS, ids=None)], {})
    targets = load().targets
    assert target_of(FACTS, "comfyui", targets).name == "comfyui.py"
    assert target_of(replace(FACTS, forward="forward", image="x"), "comfyui", targets).name == "by_signature.py"


def test_a_repository_of_that_layout_is_recognised() -> None:
    files = {path.replace("flow/", "comfy/ldm/flow/"): text for path, text in FILES.items()}
    above = """\
    def forward(self, x, timestep, context, **kwargs):
        b, c, h, w = x.shape
        image = x.flatten(2).transpose(1, 2)
        ids = torch.zeros(b, h * w, 3)
        out = self.forward_orig(image, ids, context, torch.zeros(b, context.shape[1], 3), timestep)
        return out.transpose(1, 2).reshape(b, c, h, w)

    def forward_orig("""
    model = files["comfy/ldm/flow/model.py"].replace("    def forward(", above)
    files["comfy/ldm/flow/model.py"] = model
    encoded = {path: text.replace("from flow.", "from comfy.ldm.flow.").encode() for path, text in files.items()}
    plan = plan_repository(encoded, load())
    assert [facts.forward for facts in plan.models] == ["forward_orig"]
    assert plan.target == "comfyui"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_told_about_device_and_attention(comfy: dict[str, ModuleType], device: str) -> None:
    asked: list[str] = []

    def load_file(path: str) -> ModuleType:
        asked.append(path)
        return comfy["cli_args"]

    TARGET.prepare(load_file, "sub/comfy/ldm/flow/model.py", device)
    assert asked == ["sub/comfy/cli_args.py"]
    assert comfy["cli_args"].args.use_pytorch_cross_attention
    assert comfy["cli_args"].args.cpu is (device == "cpu")


def test_builds_from_the_parameters_of_the_file_with_comfys_layers(comfy: dict[str, ModuleType], flow: Any) -> None:
    assert flow.params.in_channels == 4
    assert flow.params.hidden_size == 128
    assert type(flow.img_in) is comfy["ops"].disable_weight_init.Linear
    assert flow.img_in.weight.dtype == torch.float32


def test_chroma_counts_the_channels_of_tokens(comfy: dict[str, ModuleType]) -> None:
    params = TARGET.build(comfy["chroma"].Chroma, TARGET.FULL).params
    assert (params.in_channels, params.out_channels, params.out_dim) == (64, 64, 3072)
    assert (params.hidden_dim, params.n_layers) == (5120, 5)


def test_a_parameter_that_it_does_not_know_is_named(comfy: dict[str, ModuleType]) -> None:
    values = {name: value for name, value in TARGET.SMALL.items() if name != "vec_in_dim"}
    with pytest.raises(TARGET.CannotRun, match=r"FlowParams\(\) needs 'vec_in_dim', which target 'comfyui'"):
        TARGET.build(comfy["flow"].Flow, values)


def test_sizes_are_read_from_a_checkpoint(flow: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()}
    found = TARGET.values_of(shapes)
    small = {**TARGET.SMALL, "depth": 1, "depth_single_blocks": 2, "guidance_embed": False, "qkv_bias": False}
    assert found == {name: small[name] for name in found}
    with pytest.raises(TARGET.CannotRun, match=r"no tensor 'img_in\.weight'"):
        TARGET.values_of({"x_embedder.weight": (3, 3)})
    without_pooled = {name: shape for name, shape in shapes.items() if not name.startswith("vector_in")}
    with pytest.raises(TARGET.CannotRun, match=r"distilled_guidance_layer.*FLUX or Chroma"):
        TARGET.values_of(without_pooled)


def test_latents_go_in_and_come_out(flow: nn.Module) -> None:
    given = TARGET.inputs(flow, 2, 3, 5, 7, torch.Generator().manual_seed(0))
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == {
        "img": (2, 4, 6, 10), "txt": (2, 7, 32), "vec": (2, 24)
    }  # fmt: skip
    velocity = TARGET.call(flow, flow, given, 0.5)
    assert velocity.shape == given["img"].shape
    assert not torch.equal(TARGET.call(flow, flow, given, 0.25), velocity)


def test_a_forward_that_needs_something_unknown_is_refused() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_in = self.double_blocks = nn.Identity()

        def forward(self, x: Any, timestep: Any, context: Any, flavour: Any, **kwargs: Any) -> Any:
            return x

    model, given = Needs(), {"img": torch.ones(1, 4, 2, 2), "txt": torch.ones(1, 3, 8)}
    with pytest.raises(TARGET.CannotRun, match=r"Needs.forward\(\) needs 'flavour', which target 'comfyui'"):
        TARGET.call(model, model, given, 0.5)
    assert TARGET.call(model, model, given, 0.5, {"flavour": "oak"}).shape == (1, 4, 2, 2)


def test_another_model_is_built_and_called_by_its_signatures(comfy: dict[str, ModuleType]) -> None:
    model = TARGET.build(comfy["other"].Other, TARGET.SMALL)
    assert (model.enter.in_features, model.enter.out_features, len(model.blocks)) == (16, 128, 5)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.1)
    given = TARGET.inputs(model, 2, 3, 5, 7, torch.Generator().manual_seed(0))
    assert given["img"].shape == (2, 4, 6, 10)
    assert given["txt"].shape == (2, 7, model.context.in_features)
    assert TARGET.call(model, model, given, 0.5).shape == (2, 4, 6, 10)


def test_samplers_are_no_loops_and_its_own_one_makes_euler_steps(flow: nn.Module) -> None:
    with pytest.raises(TARGET.CannotRun, match="loaded checkpoint"):
        TARGET.loop_variants(lambda model: None, "model")
    given = TARGET.inputs(flow, 1, 2, 2, 3, torch.Generator().manual_seed(0))
    half = given["img"] - 0.5 * TARGET.call(flow, flow, given, 1.0)
    wanted = half - 0.5 * TARGET.call(flow, flow, {**given, "img": half}, 0.5)
    assert torch.equal(TARGET.run_loop(TARGET.sample, "model", flow, given, [1.0, 0.5, 0.0]), wanted)
