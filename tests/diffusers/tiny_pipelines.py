"""Pipelines of diffusers as they are installed, around transformers so small that a CPU draws in a second."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

TILES = {"mbm": 16, "counts_multiple_of": 8, "full_step_every": 10}
NEURONS = {"bm": 16, "mbm": 16, "counts_multiple_of": 8, "full_step_every": 10}
SPARSE = {"attn": TILES, "mlp": NEURONS, "compile": False}
KEPT = {
    "attn": {**TILES, "top_keys": 1.0},
    "mlp": {**NEURONS, "top_keys": 1.0, "random_keys": 0.0},
    "compile": False,
}
HEIGHT, WIDTH, TEXT = 9, 10, 11
"""Tokens; pictures have sixteen pixels a token."""


def flux1(**changes: Any) -> nn.Module:
    values = {
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return _random(diffusers.FluxTransformer2DModel(**{**values, **changes}))


def flux2() -> nn.Module:
    return _random(
        diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


def flux3(**changes: Any) -> nn.Module:
    values = {
        "in_channels": 16,
        "cond_in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "timestep_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    return _random(diffusers.Flux3Transformer2DModel(**{**values, **changes}))


def _random(model: nn.Module) -> nn.Module:
    """Weights of which every output depends, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if "norm" in name and parameter.dim() < 2 else 0.0, scale, generator=generator)
    return model.eval().requires_grad_(False)


def pipeline(transformer: nn.Module, kind: str = "FluxPipeline", **components: Any) -> Any:
    """A real pipeline without encoders or VAE."""
    shifting = {"use_dynamic_shifting": True} if kind == "FluxPipeline" else {}
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(**shifting), "transformer": transformer, **components}
    others = ["vae", "text_encoder", "tokenizer"]
    others += [] if kind.startswith("Flux2") else ["text_encoder_2", "tokenizer_2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, kind)(**{**dict.fromkeys(others), **parts})
    made.set_progress_bar_config(disable=True)
    return made


def vae() -> nn.Module:
    """FLUX.2's pipelines need one for its statistics, and to encode reference images."""
    made = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32
    )
    return _random(made)


def flux3_pipeline(transformer: nn.Module) -> Any:
    """The modular pipeline of FLUX.3, from the noise to the latents."""
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep

    made = Flux3CoreDenoiseStep().init_pipeline()
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "guider": ClassifierFreeGuidance(guidance_scale=3.5)}
    made.update_components(transformer=transformer, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, steps: int = 12, seed: int = 0, **options: Any) -> Tensor:
    """The latents of one picture of a FLUX.1 pipeline."""
    return draw_with(pipe, steps, seed, **{"pooled_prompt_embeds": random(1, 20, seed=seed + 2), **options})


def draw_with(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    given = {
        "prompt_embeds": random(1, TEXT, 24, seed=seed + 1),
        "height": 16 * HEIGHT,
        "width": 16 * WIDTH,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
    }
    latents: Tensor = pipe(**{**given, **options})[0]
    return latents


def draw_plain(pipe: Any, steps: int = 12, seed: int = 0, **options: Any) -> Tensor:
    """The latents of one picture of a pipeline without a pooled text."""
    return draw_with(pipe, steps, seed, **{"guidance_scale": 1.0, **options})


def draw_flux3(pipe: Any, steps: int = 12, seed: int = 0) -> Tensor:
    latents: Tensor = pipe(
        prompt_embeds=random(1, TEXT, 24, seed=seed + 1),
        negative_prompt_embeds=random(1, TEXT, 24, seed=seed + 3),
        height=16 * HEIGHT,
        width=16 * WIDTH,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output="latents",
    )
    return latents


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def sparse_calls(counted: Any) -> dict[str, tuple[int, int]]:
    """By layer, how many calls of attention and MLP were sparse."""
    return {
        layer.name: tuple(sum(calls.sparse for calls in part.values()) for part in (layer.attention, layer.mlp))
        for layer in counted.layers
    }


def reasons(counted: Any) -> set[str]:
    """Why any part of any layer after the first two was dense."""
    return {
        reason
        for layer in counted.layers[2:]
        for part in (layer.attention, layer.mlp)
        for calls in part.values()
        for reason in calls.dense
    }


Draw = Callable[..., Tensor]
