"""`chipmunk fidelity` on pipelines of diffusers: the pipeline itself draws, the VAE decodes afterwards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import diffusers
import tiny_pipelines as tiny
import torch
from torch import Tensor, nn

from chipmunk import registry
from chipmunk.apply import carry_out, plan_update
from chipmunk.fidelity import FidelityError, FidelityOptions, run
from chipmunk.fidelity.pipelines import CannotDraw, UserPipeline, is_folder, load
from chipmunk.fidelity.spec import Variant
from chipmunk.rewrite import plan_repository

SIZE = (16 * tiny.WIDTH, 16 * tiny.HEIGHT)
SCRIPT = """\
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
image = pipe("a chipmunk").images[0]
"""
MADE = f"""\
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_fidelity_of_pipelines import whole


def build():
    return whole()
"""


def whole(**components: Any) -> Any:
    """A pipeline of FLUX.1 with a VAE, without text encoders."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.36,
        shift_factor=0.11, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return tiny.pipeline(tiny.flux1(), **{"vae": tiny._random(vae), **components})


def ours(pipeline: Any, kind: type[nn.Module] = diffusers.FluxTransformer2DModel) -> UserPipeline:
    return UserPipeline(pipeline, kind, "cpu", tiny.TEXT)


def drawn(pipeline: UserPipeline, steps: int = 3, seed: int = 5, prompt: str = "a chipmunk") -> list[Tensor]:
    return pipeline.draw(prompt, seed, steps, *SIZE)


def test_latents_and_pixels_are_those_of_the_pipeline() -> None:
    pipeline = whole()
    mine = ours(pipeline)
    latents, pixels = drawn(mine), mine.decode()
    given = {**mine._conditioning("a chipmunk"), "width": SIZE[0], "height": SIZE[1], "num_inference_steps": 3}
    for kind, result in (("latent", latents[-1]), ("np", pixels)):
        theirs = pipeline(**given, generator=torch.Generator().manual_seed(5), output_type=kind).images
        if kind == "np":
            theirs = torch.from_numpy(theirs).mul(255).round().to(torch.uint8)
        assert torch.equal(result, theirs), kind
    assert len(latents) == 3
    assert not torch.equal(latents[0], latents[1])


def test_seed_and_prompt_count() -> None:
    mine = ours(whole())
    first = drawn(mine)[-1]
    assert torch.equal(first, drawn(mine)[-1])
    assert not torch.equal(first, drawn(mine, seed=6)[-1])
    assert not torch.equal(first, drawn(mine, prompt="a fox")[-1])


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = whole()
    drawn(ours(pipeline))
    assert "step" not in vars(pipeline.scheduler)
    assert "decode" not in vars(pipeline.vae)


def test_without_a_vae_latents_are_compared() -> None:
    mine = ours(whole(vae=None))
    assert not mine.decodes
    assert len(drawn(mine)) == 3


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="this release has no FLUX.2")
def test_guidance_by_a_second_call_is_one_step() -> None:
    pipeline = tiny.pipeline(tiny.flux2(), "Flux2KleinPipeline", vae=tiny.vae())
    calls: list[object] = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    mine = ours(pipeline, type(pipeline.transformer))
    assert len(drawn(mine)) == 3
    assert len(calls) == 6
    assert mine.decode().dtype == torch.uint8


@pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="this release has no FLUX.3")
def test_a_modular_pipeline() -> None:
    pipeline = tiny.flux3_pipeline(tiny.flux3())
    assert len(drawn(ours(pipeline, diffusers.Flux3Transformer2DModel))) == 3


def test_a_text_encoder_is_asked_once_for_each_prompt() -> None:
    class Encoder(nn.Module):
        asked = 0
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, ids: Tensor, output_hidden_states: bool = False) -> Tensor:
            self.asked += 1
            return ids * 2

    pipeline = whole()
    pipeline.text_encoder = encoder = Encoder()
    ours(pipeline)
    for ids in ([1, 2], [1, 2], [1, 3], [1, 2]):
        assert encoder(torch.tensor(ids)).tolist() == [2 * i for i in ids]
    assert encoder.asked == 2
    encoder(torch.tensor([1, 2]), output_hidden_states=True)
    assert encoder.asked == 3


def test_what_is_no_pipeline_of_the_model() -> None:
    with pytest.raises(CannotDraw, match="its transformer is a FluxTransformer2DModel, not a Linear"):
        ours(whole(), nn.Linear)
    with pytest.raises(CannotDraw, match="no scheduler"):
        ours(whole(scheduler=None))


def test_a_folder(tmp_path: Path) -> None:
    pipeline = whole()
    assert not is_folder(tmp_path)
    pipeline.save_pretrained(tmp_path)
    assert is_folder(tmp_path)
    assert tiny.error(drawn(ours(load(tmp_path, torch.float32)))[-1], drawn(ours(pipeline))[-1]) < 1e-5


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A patched script that loads a pipeline."""
    root = tmp_path / "scripts"
    root.mkdir()
    (root / "draw.py").write_text(SCRIPT)
    carry_out(plan_update(root, lambda files: plan_repository(files, registry.load())))
    return root


def test_the_whole_command_on_a_script(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made.py").write_text(MADE)
    monkeypatch.chdir(tmp_path)
    every = {"full_step_every": 10}
    config = {"attn": {**tiny.TILES, **every}, "mlp": {**tiny.NEURONS, **every}}
    variants = (Variant("sparse", config, family="sparse"), Variant("rival", method="cache-dit"))
    options = FidelityOptions(
        variants=variants,
        factory="made:build",
        count=1,
        seeds=(0,),
        steps=9,
        size=SIZE,
        floor=0,
        coverage=False,
        python=sys.executable,
        output=tmp_path / "out",
    )
    report = run(script, options)
    (sparse,) = report.results["variants"]
    assert sparse["pictures"][0]["kinds"] == ["dense/full", "full/sparse", *["sparse/sparse"] * 7]
    assert sparse["pictures"][0]["steps"][0]["l2"] < 1e-6
    assert 1e-4 < sparse["pictures"][0]["steps"][-1]["l2"] < 1
    assert report.summaries["sparse"].ssim is not None
    assert report.summaries["sparse"].sparsifiable_flops < 0.7
    assert report.results["environment"]["weights"] == "of a FluxPipeline of made:build"
    assert "cache-dit is compared on models in a repository only" in report.results["notes"]
    assert len(report.images) == 2


def test_a_folder_without_a_pipeline_is_refused(script: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FidelityError, match="there is no pipeline in"):
        run(script, FidelityOptions(weights=tmp_path / "empty", python=sys.executable))
