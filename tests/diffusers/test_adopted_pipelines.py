"""Pipelines of diffusers with Chipmunk enabled on their transformer: nothing of diffusers is patched."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import accelerate
import diffusers
import tiny_pipelines as tiny
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import KEPT, SPARSE, draw, error, flux1, pipeline, reasons, sparse_calls
from torch import Tensor, nn

import chipmunk

STEPS = 12
DENSE, RAN = (0, 0), (9, 10)
"""Sparse calls of attention and MLP in twelve steps: steps 0, 1 and 10 are full for attention, 0 and 10 for MLPs."""
NAMES = [f"{kind}.{index}" for kind in ("transformer_blocks", "single_transformer_blocks") for index in range(3)]
EVERYTHING = dict(zip(NAMES, [DENSE, DENSE, RAN, RAN, RAN, RAN], strict=True))

needs_flux2 = pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="this release has no FLUX.2")
needs_flux3 = pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="it has no FLUX.3")


@pytest.fixture(scope="module")
def dense() -> Tensor:
    """The picture that an untouched pipeline draws."""
    return draw(pipeline(flux1()))


def ours(model: nn.Module) -> list[str]:
    """Whatever of Chipmunk is in the model, or stands where something of a class's own should."""
    found = [f"{name}.{key}" for name, m in model.named_modules() for key in vars(m) if "chipmunk" in key]
    found += [f"{name}.forward" for name, m in model.named_modules() if "forward" in vars(m)]
    return found + [name for name, p in model.attn_processors.items() if type(p).__module__.startswith("chipmunk")]


# What is no FLUX transformer


def test_a_model_of_another_family_is_refused() -> None:
    other = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match="holds no model that Chipmunk knows"):
        chipmunk.enable(other, SPARSE)
    chipmunk.enable(other)
    assert ours(other) == []


def test_without_a_configuration_nothing_is_touched(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe)
    assert ours(pipe.transformer) == []
    assert not chipmunk.statistics(pipe).enabled
    assert torch.equal(draw(pipe), dense)


def test_a_pipeline_that_has_no_transformer_yet_says_so(tmp_path: Any) -> None:
    pipe = pipeline(flux1())
    pipe.transformer = None
    chipmunk.enable(pipe)
    (tmp_path / "chipmunk-config.yml").write_text("compile: false\n")  # in the working directory
    with pytest.warns(RuntimeWarning, match=r"no transformer yet.*after load_components"):
        chipmunk.enable(pipe)


def test_a_controlnet_that_shares_the_block_class_stays_dense() -> None:
    control = diffusers.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with pytest.raises(TypeError):
        chipmunk.enable(control, SPARSE)


# Off, everything kept, sparse


def test_off_on_off(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    transformer = pipe.transformer
    kind, keys = type(transformer), list(transformer.state_dict())
    before = {name: id(processor) for name, processor in transformer.attn_processors.items()}

    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), dense) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted) == EVERYTHING
    assert reasons(counted) == set()
    assert counted.token_order == {"reordered": 1}
    assert counted.cache_bytes == 0  # the scheduler said that it was the last step
    assert type(transformer) is kind
    assert list(transformer.state_dict()) == keys

    chipmunk.enable(pipe, SPARSE)
    assert 1e-4 < error(draw(pipe), dense) < 1
    assert sparse_calls(chipmunk.statistics(pipe)) == EVERYTHING

    chipmunk.disable(pipe)
    assert ours(transformer) == []
    assert {name: id(processor) for name, processor in transformer.attn_processors.items()} == before
    assert torch.equal(draw(pipe), dense)


def test_a_second_image_is_as_the_first() -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, SPARSE)
    first = draw(pipe)
    draw(pipe, seed=7, steps=9, height=128)
    assert torch.equal(draw(pipe), first)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert torch.equal(draw(pipe), first)


def test_an_image_that_was_given_up_leaves_nothing_behind() -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, SPARSE)
    first = draw(pipe)

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 5:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, seed=3, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), first)
    assert chipmunk.statistics(pipe).dense_model_calls == {}


def test_bfloat16_tells_all_steps_apart() -> None:
    # the first timesteps of this schedule are one number in bfloat16
    pipe = pipeline(flux1().to(torch.bfloat16))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    chipmunk.enable(pipe, SPARSE)
    half = {
        name: tiny.random(1, *size).bfloat16()
        for name, size in (("prompt_embeds", (11, 24)), ("pooled_prompt_embeds", (20,)))
    }
    draw(pipe, steps=40, **half)
    counted = chipmunk.statistics(pipe)
    assert counted.dense_model_calls == {}
    assert sparse_calls(counted)["single_transformer_blocks.2"] == (35, 36)


def test_guidance_by_a_second_call_has_caches_of_its_own() -> None:
    pipe = pipeline(flux1())
    negative = {
        "negative_prompt_embeds": tiny.random(1, 11, 24, seed=8),
        "negative_pooled_prompt_embeds": tiny.random(1, 20, seed=9),
        "true_cfg_scale": 3.0,
    }
    wanted = draw(pipe, **negative)
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe, **negative), wanted) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert {name: tuple(2 * n for n in RAN) for name in NAMES[2:]}.items() <= sparse_calls(counted).items()
    assert set(counted.layers[2].attention) == {"main", "main 2"}
    assert counted.cache_bytes == 0


def test_a_loop_of_the_users_own_is_counted_by_its_timestep(dense: Tensor) -> None:
    transformer = flux1()
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(9.0), torch.arange(10.0), indexing="ij"), -1)
    given = {
        "encoder_hidden_states": tiny.random(1, 11, 24, seed=1),
        "pooled_projections": tiny.random(1, 20, seed=2),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(11, 3),
        "guidance": torch.ones(1),
    }

    def sample(steps: int = STEPS) -> Tensor:
        latents = tiny.random(1, 90, 16)
        for step in range(steps):
            with torch.no_grad():
                result = transformer(latents, timestep=torch.full((1,), 1 - step / steps), **given)
            latents = latents - result.sample / steps
        return latents

    wanted = sample()
    chipmunk.enable(transformer, KEPT)
    assert error(sample(), wanted) < 1e-5
    assert sparse_calls(chipmunk.statistics(transformer)) == EVERYTHING


# Other pipelines, other models


def test_control_residuals_keep_the_order_of_tokens() -> None:
    transformer = flux1()
    residuals = [tiny.random(1, 90, 32, seed=5)]
    given = {
        "hidden_states": tiny.random(1, 90, 16),
        "encoder_hidden_states": tiny.random(1, 11, 24),
        "pooled_projections": tiny.random(1, 20),
        "img_ids": torch.cat((torch.zeros(90, 1), torch.cartesian_prod(torch.arange(9.0), torch.arange(10.0))), 1),
        "txt_ids": torch.zeros(11, 3),
        "guidance": torch.ones(1),
        "controlnet_block_samples": residuals,
        "controlnet_single_block_samples": residuals,
        "return_dict": False,
    }

    def run() -> Tensor:
        return torch.cat([transformer(timestep=torch.full((1,), 1 - i / 9), **given)[0] for i in range(9)])

    with torch.no_grad():
        wanted = run()
        chipmunk.enable(transformer, KEPT)
        assert error(run(), wanted) < 1e-5
    counted = chipmunk.statistics(transformer)
    assert "controlnet" in next(iter(counted.token_order))
    assert sparse_calls(counted)["transformer_blocks.2"] == (7, 8)


@needs_flux2
def test_flux2() -> None:
    pipe = pipeline(tiny.flux2(), "Flux2KleinPipeline", vae=tiny.vae())
    given = {
        "guidance_scale": 3.0,
        "negative_prompt_embeds": tiny.random(1, 11, 24, seed=9),
    }
    check(pipe, lambda: tiny.draw_plain(pipe, **given), {name: (18, 20) for name in NAMES[2:]})


@needs_flux2
def test_flux2_with_a_reference_image() -> None:
    pipe = pipeline(tiny.flux2(), "Flux2KleinPipeline", vae=tiny.vae())
    image = Image.new("RGB", (80, 64))
    counted = check(pipe, lambda: tiny.draw_plain(pipe, image=image), {name: RAN for name in NAMES[2:]})
    assert counted.token_order == {"reordered": 1}


@needs_flux3
def test_flux3() -> None:
    pipe = tiny.flux3_pipeline(tiny.flux3())
    names = ["mode_blocks.image.2", *NAMES[3:]]
    counted = check(pipe, lambda: tiny.draw_flux3(pipe), {name: (18, 20) for name in names})
    assert counted.token_order == {"reordered": 2}


@needs_flux3
def test_flux3_tokens_of_a_reference_image_stay() -> None:
    transformer = tiny.flux3()
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(9.0), torch.arange(10.0), torch.zeros(1))
    given = {
        "hidden_states": tiny.random(1, 90, 16),
        "encoder_hidden_states": tiny.random(1, 11, 24),
        "img_ids": grid,
        "txt_ids": torch.zeros(11, 4),
        "image_cond_hidden_states": tiny.random(1, 40, 16, seed=1),
        "image_cond_ids": grid[:40] + torch.tensor([0, 0, 0, -1]),
        "return_dict": False,
    }

    def run() -> Tensor:
        return torch.cat([transformer(timestep=torch.full((1,), 1 - i / 9), **given)[0] for i in range(9)])

    with torch.no_grad():
        wanted = run()
        chipmunk.enable(transformer, KEPT)
        assert error(run(), wanted) < 1e-5
    assert chipmunk.statistics(transformer).token_order == {"reordered": 1}


def check(pipe: Any, run: Any, expected: dict[str, tuple[int, int]]) -> Any:
    """Off bit-identical, everything kept, and coverage as expected."""
    wanted = run()
    chipmunk.enable(pipe, KEPT)
    assert error(run(), wanted) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert expected.items() <= sparse_calls(counted).items()
    assert reasons(counted) == set()
    chipmunk.enable(pipe, SPARSE)
    assert 1e-4 < error(run(), wanted) < 1
    chipmunk.disable(pipe)
    assert ours(pipe.transformer) == []
    assert torch.equal(run(), wanted)
    return counted


# LoRA, offloading, compiling, sharing: in whichever order


@pytest.mark.parametrize("first", ["chipmunk", "lora"])
def test_lora(first: str, dense: Tensor) -> None:
    pipe = pipeline(flux1())
    if first == "chipmunk":
        chipmunk.enable(pipe, KEPT)
        draw(pipe)
    targets = ["to_q", "to_k", "proj_mlp", "net.0.proj"]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    chipmunk.disable(pipe)
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    wanted, wanted_half = draw(pipe), draw(pipe, **half)
    assert error(wanted, dense) > 0.01
    assert error(wanted, wanted_half) > 0.01

    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), wanted) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted) == {name: (ran[0], 0) for name, ran in EVERYTHING.items()}
    assert reasons(counted) == {"the linear layer is a peft.tuners.lora.layer.Linear"}
    assert error(draw(pipe, **half), wanted_half) < 1e-5

    pipe.transformer.delete_adapters("default")
    pipe.transformer.unload_lora()
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), dense) < 1e-5
    assert sparse_calls(chipmunk.statistics(pipe)) == EVERYTHING


def test_lora_on_the_second_linear_alone(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    draw(pipe)
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["proj_out"])
    pipe.transformer.add_adapter(adapter)
    with_lora = draw(pipe)
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted)["single_transformer_blocks.0"] == (18, 10)
    chipmunk.disable(pipe)
    assert error(with_lora, draw(pipe)) < 1e-5


@pytest.mark.parametrize("first", ["chipmunk", "accelerate"])
def test_offloading_as_the_pipeline_does_it(first: str, dense: Tensor) -> None:
    pipe = pipeline(flux1())
    if first == "chipmunk":
        chipmunk.enable(pipe, KEPT)
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    if first == "accelerate":
        chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), dense) < 1e-5
    # what maybe_free_model_hooks() does after every picture
    remove_hook_from_module(pipe.transformer, recurse=True)
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    assert error(draw(pipe), dense) < 1e-5
    assert sparse_calls(chipmunk.statistics(pipe))["single_transformer_blocks.0"] == (18, 20)
    chipmunk.disable(pipe)
    assert torch.equal(draw(pipe), dense)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(draw(pipe), dense)


@pytest.mark.parametrize("first", ["chipmunk", "accelerate"])
def test_offloading_every_layer_leaves_mlps_dense(first: str, dense: Tensor) -> None:
    pipe = pipeline(flux1())
    if first == "chipmunk":
        chipmunk.enable(pipe, KEPT)
        draw(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), dense) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted) == {name: (ran[0], 0) for name, ran in EVERYTHING.items()}
    assert all("hook" in reason for reason in reasons(counted))
    chipmunk.disable(pipe)
    assert torch.equal(draw(pipe), dense)


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_compiled_by_the_user(how: str) -> None:
    few = flux1(num_layers=2, num_single_layers=1)
    dense = draw(pipeline(copy.deepcopy(few)))
    pipe = pipeline(few)
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    if how == "whole":
        pipe.transformer = torch.compile(pipe.transformer, **options)
    elif how == "in place":
        pipe.transformer.compile(**options)
    else:
        pipe.transformer.compile_repeated_blocks(**options)
    compiled = vars(pipe.transformer).get("forward"), vars(pipe.transformer).get("_compiled_call_impl")
    chipmunk.enable(pipe, KEPT)
    chipmunk.enable(pipe)  # the line that the tool adds, after the user's own: nothing changes
    assert error(draw(pipe), dense) < 1e-5
    assert sparse_calls(chipmunk.statistics(pipe))["single_transformer_blocks.0"] == RAN
    chipmunk.disable(pipe)
    assert ours(getattr(pipe.transformer, "_orig_mod", pipe.transformer)) == []
    assert (vars(pipe.transformer).get("forward"), vars(pipe.transformer).get("_compiled_call_impl")) == compiled


def test_blocks_compiled_by_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    from chipmunk.runtime import compiling

    monkeypatch.setattr(compiling, "BACKEND", "eager")
    few = flux1(num_layers=2, num_single_layers=1)
    dense = draw(pipeline(few), steps=9)
    pipe = pipeline(few)
    chipmunk.enable(pipe, {**KEPT, "compile": True})
    assert error(draw(pipe, steps=9), dense) < 1e-5
    assert sparse_calls(chipmunk.statistics(pipe))["single_transformer_blocks.0"] == (7, 8)


def test_pipelines_that_share_a_transformer_take_turns(dense: Tensor) -> None:
    transformer = flux1()
    first, second = pipeline(transformer), pipeline(transformer)
    chipmunk.enable(first, SPARSE)
    alone, other = draw(first), draw(second, seed=5)
    inside: list[Tensor] = []

    def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 5:
            inside.append(draw(second, seed=5))
        return {}

    assert torch.equal(draw(first, callback_on_step_end=interrupt), alone)
    assert torch.equal(inside[0], other)
    chipmunk.disable(second)
    assert torch.equal(draw(first), dense)


def test_copies_and_pickles_carry_nothing(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, SPARSE)
    draw(pipe)
    for other in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert not any(type(p).__module__.startswith("chipmunk") for p in other.attn_processors.values())
        copied = pipeline(other)
        assert not chipmunk.statistics(copied).enabled
        assert torch.equal(draw(copied), dense)


# Attention that is not understood, or becomes something else


class Loud(FluxAttnProcessor):
    pass


def test_a_processor_of_the_users_own_stays(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    loud = Loud()
    pipe.transformer.transformer_blocks[2].attn.set_processor(loud)
    assert error(draw(pipe), dense) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted)["transformer_blocks.2"] == (0, 10)
    assert reasons(counted) == {"the attention processor is a Loud"}
    chipmunk.disable(pipe)
    assert pipe.transformer.transformer_blocks[2].attn.processor is loud


def test_a_release_that_computes_something_else_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformer_flux.apply_rotary_emb

    def louder(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 1.1 * original(x, *args, **kwargs)

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", louder)
    pipe = pipeline(flux1())
    wanted = draw(pipe)
    chipmunk.enable(pipe, KEPT)
    assert error(draw(pipe), wanted) < 1e-5
    counted = chipmunk.statistics(pipe)
    assert sparse_calls(counted) == {name: (0, ran[1]) for name, ran in EVERYTHING.items()}
    assert reasons(counted) == {"this release's FluxAttnProcessor computes something that Chipmunk does not know"}


def test_fused_projections(dense: Tensor) -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, KEPT)
    draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert error(draw(pipe), dense) < 1e-5
    assert sparse_calls(chipmunk.statistics(pipe))["single_transformer_blocks.0"] == (18, 20)


def test_the_attention_backend_is_the_processors_own() -> None:
    pipe = pipeline(flux1())
    attn = pipe.transformer.transformer_blocks[2].attn
    theirs = attn.processor
    chipmunk.enable(pipe, KEPT)
    draw(pipe)
    attn.set_attention_backend("native")
    assert theirs._attention_backend == "native"
    chipmunk.disable(pipe)
    assert attn.processor is theirs


def test_random_numbers_are_left_alone() -> None:
    pipe = pipeline(flux1())
    chipmunk.enable(pipe, SPARSE)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    draw(pipe)
    assert torch.equal(torch.rand(1), wanted)


def test_the_configuration_of_the_callers_repository_is_found(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "repository"
    (root / ".chipmunk").mkdir(parents=True)
    (root / "chipmunk-config.yml").write_text("compile: false\n")
    script = root / "draw.py"
    script.write_text("import chipmunk\n\n\ndef enable(pipe):\n    chipmunk.enable(pipe)\n")
    names: dict[str, Any] = {}
    exec(compile(script.read_text(), str(script), "exec"), names)
    pipe = pipeline(flux1())
    names["enable"](pipe)
    assert chipmunk.statistics(pipe).enabled
