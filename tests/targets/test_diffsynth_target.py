"""The target for DiffSynth-Studio's FLUX.1, on a small module with its parts, and a function that does the work."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk.registry import load
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.run import target_of

TARGET: Any = load().targets["diffsynth"].module

BLOCK = BlockFacts("models/dit.py", "Block", True)
FACTS = ModelFacts(
    "models/dit.py", "Dit", "blocks", "single_blocks", "latents", None, BLOCK, BLOCK,
    forward="run", forward_file="pipelines/image.py", receiver="dit",
)  # fmt: skip


class TimestepEmbeddings(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, width)

    def forward(self, time: Tensor) -> Tensor:
        out: Tensor = self.layer(time[:, None] / 1000)
        return out


class RoPEEmbedding(nn.Module):
    def __init__(self, width: int, theta: int, axes: list[int]) -> None:
        super().__init__()
        self.axes = axes


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q_a = nn.LayerNorm(width // heads)
        self.layer = nn.Linear(width, width)


class AdaLayerNormContinuous(nn.LayerNorm):
    pass


class Dit(nn.Module):
    """Its full size is written into its constructor, which nobody may call here."""

    def __init__(self) -> None:
        raise MemoryError("the full size")


PARTS = {
    "TimestepEmbeddings": TimestepEmbeddings,
    "RoPEEmbedding": RoPEEmbedding,
    "FluxJointTransformerBlock": Block,
    "FluxSingleTransformerBlock": Block,
    "AdaLayerNormContinuous": AdaLayerNormContinuous,
}


def run(
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_emb: Tensor,
    pooled_prompt_emb: Tensor,
    guidance: Tensor,
    text_ids: Tensor,
    tea_cache: Any = None,
) -> Tensor:
    """What the repository's function does, with less between."""
    b, c, h, w = latents.shape
    assert text_ids.shape == (b, prompt_emb.shape[1], 3)
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    vec = dit.time_embedder(timestep) + dit.guidance_embedder(guidance) + dit.pooled_text_embedder(pooled_prompt_emb)
    x = dit.x_embedder(tokens) + vec[:, None] + dit.context_embedder(prompt_emb).mean(1, keepdim=True)
    out: Tensor = dit.final_proj_out(dit.final_norm_out(x))
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("diffsynth_parts")
    vars(made).update(PARTS, Dit=type("Dit", (Dit,), {"__module__": made.__name__}))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def dit(module: Any) -> Any:
    torch.manual_seed(0)
    model = TARGET.build(module.Dit, TARGET.SMALL).requires_grad_(False)
    vars(model)["forward"] = functools.partial(run, dit=model)  # as verify does
    return model


def test_other_models_are_not_recognised() -> None:
    assert not TARGET.recognise([], {})
    assert not TARGET.recognise([replace(FACTS, receiver=None, forward="forward", forward_file=None)], {})
    assert not TARGET.recognise([replace(FACTS, receiver="model")], {})
    assert not TARGET.recognise([replace(FACTS, image="hidden_states")], {})


def test_a_model_that_a_function_takes_is_recognised() -> None:
    assert TARGET.recognise([FACTS], {})
    assert target_of(FACTS, "diffusers", load().targets).name == "diffsynth.py"


def test_builds_from_the_parts_without_the_constructor(module: Any, dit: Any) -> None:
    assert type(dit) is module.Dit
    assert (len(dit.blocks), len(dit.single_blocks)) == (5, 3)
    assert dit.pos_embedder.axes == [8, 28, 28]
    assert dit.blocks[0].norm_q_a.normalized_shape == (64,)
    assert dit.input_dim == 16


def test_a_file_without_such_parts_is_refused(module: Any) -> None:
    del module.RoPEEmbedding
    with pytest.raises(TARGET.CannotRun, match="the file of Dit has no 'RoPEEmbedding'"):
        TARGET.build(module.Dit, TARGET.SMALL)


def test_guidance_is_left_out_where_the_size_says_so(module: Any) -> None:
    assert TARGET.build(module.Dit, {**TARGET.SMALL, "guidance_embed": False}).guidance_embedder is None


def test_sizes_are_read_from_a_checkpoint(dit: Any) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert TARGET.values_of(shapes) == TARGET.SMALL
    with pytest.raises(TARGET.CannotRun, match=r"no tensor 'x_embedder\.weight'.*DiffSynth"):
        TARGET.values_of({"img_in.weight": (3, 3)})


def test_latents_go_in_and_come_out(dit: Any) -> None:
    given = TARGET.inputs(dit, 2, 3, 5, 7, torch.Generator().manual_seed(0))
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == {
        "img": (2, 4, 6, 10), "txt": (2, 7, 32), "vec": (2, 24)
    }  # fmt: skip
    velocity = TARGET.call(dit, dit, given, 0.5)
    assert velocity.shape == given["img"].shape
    assert not torch.equal(TARGET.call(dit, dit, given, 0.25), velocity)
    assert not torch.equal(TARGET.call(dit, dit, {**given, "txt": given["txt"] + 1}, 0.5), velocity)


def test_a_function_of_another_kind_is_refused(dit: Any) -> None:
    given = TARGET.inputs(dit, 1, 2, 2, 3, torch.Generator().manual_seed(0))
    vars(dit)["forward"] = lambda latents, timestep, prompt_emb: latents
    with pytest.raises(TARGET.CannotRun, match="does not take pooled_prompt_emb, guidance, text_ids"):
        TARGET.call(dit, dit, given, 0.5)


def test_pipelines_are_no_loops_and_its_own_one_makes_euler_steps(dit: Any) -> None:
    with pytest.raises(TARGET.CannotRun, match="encoders and VAE"):
        TARGET.loop_variants(lambda self: None, "self")
    given = TARGET.inputs(dit, 1, 2, 2, 3, torch.Generator().manual_seed(0))
    half = given["img"] - 0.5 * TARGET.call(dit, dit, given, 1.0)
    wanted = half - 0.5 * TARGET.call(dit, dit, {**given, "img": half}, 0.5)
    assert torch.equal(TARGET.run_loop(TARGET.sample, "model", dit, given, [1.0, 0.5, 0.0]), wanted)
