"""Users' scripts, from the unpatched file on: patched and run, off to the bit, everything kept but for rounding."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import tiny_pipelines as tiny
from diffusers import FluxPipeline
from diffusers.pipelines.flux import pipeline_flux

import chipmunk
from chipmunk.registry import load
from chipmunk.rewrite import plan_repository

SCRIPT = """\
import sys

import torch
from diffusers import {kind}

none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
pipe = {kind}.from_pretrained(sys.argv[1], **none)
pipe.set_progress_bar_config(disable=True)
{setup}

def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


latents = pipe(
    prompt_embeds=random(1, 11, 24, seed=1),
    pooled_prompt_embeds=random(1, 20, seed=2),
    {options}
    height=144,
    width=160,
    num_inference_steps=12,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).images
"""


@dataclass(frozen=True)
class Script:
    kind: str = "FluxPipeline"
    setup: str = ""
    options: str = ""
    sparse: tuple[int, int] = (9, 10)
    """Sparse calls of attention and MLP in each layer that is not always dense."""


SCRIPTS = {
    "as it is": Script(),
    "with a LoRA": Script(setup="pipe.load_lora_weights(sys.argv[1])\n", sparse=(9, 0)),
    "with a second call for guidance": Script(
        options="true_cfg_scale=3.0,\n"
        "    negative_prompt_embeds=random(1, 11, 24, seed=8),\n"
        "    negative_pooled_prompt_embeds=random(1, 20, seed=9),",
        sparse=(18, 20),
    ),
    "Kontext": Script(
        "FluxKontextPipeline",
        options="image=random(1, 16, 12, 16, seed=3),\n    max_area=144 * 160,\n    _auto_resize=False,",
    ),
}


def saved(folder: Path) -> None:
    """A pipeline on the disk, and beside it a LoRA on attention and MLPs."""
    tiny.pipeline(tiny.flux1(in_channels=64)).save_pretrained(folder)
    layers = {}
    generator = torch.Generator().manual_seed(7)
    for name, module in tiny.flux1(in_channels=64).named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "proj_mlp", "ff.net.0.proj")):
            layers[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator) / 4
            layers[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) / 4
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    saved(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = SCRIPTS[name]
    text = SCRIPT.format(kind=script.kind, setup=script.setup, options=script.options)
    (change,) = plan_repository({"draw.py": text.encode()}, load()).changes
    original, patched = tmp_path / "original.py", tmp_path / "draw.py"
    original.write_text(text)
    patched.write_bytes(change.after)
    config = tmp_path / "some.yml"
    every = {"full_step_every": 10}
    config.write_text(
        json.dumps({**tiny.KEPT, "attn": {**tiny.KEPT["attn"], **every}, "mlp": {**tiny.KEPT["mlp"], **every}})
    )
    monkeypatch.setattr(sys, "argv", ["draw.py", str(weights)])

    wanted = runpy.run_path(str(original))["latents"]
    assert torch.equal(runpy.run_path(str(patched))["latents"], wanted)
    monkeypatch.setenv("CHIPMUNK_CONFIG", str(config))
    ran = runpy.run_path(str(patched))
    assert tiny.error(ran["latents"], wanted) < 1e-5
    counted = chipmunk.statistics(ran["pipe"])
    assert counted.dense_model_calls == {}
    assert set(counted.token_order) == {"reordered"}
    assert [tiny.sparse_calls(counted)[layer.name] for layer in counted.layers[2:]] == [script.sparse] * 4
    if name == "with a LoRA":
        assert tiny.reasons(counted) == {"the linear layer is a peft.tuners.lora.layer.Linear"}


def test_a_script_with_a_copy_of_the_pipeline(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is the user's own, with a loop of its own around diffusers' transformer."""
    copied = re.sub(r"^from \.\.\.", "from diffusers.", inspect.getsource(pipeline_flux), flags=re.MULTILINE)
    copied = re.sub(r"^from \.\.", "from diffusers.pipelines.", copied, flags=re.MULTILINE)
    copied = re.sub(r"^from \.", "from diffusers.pipelines.flux.", copied, flags=re.MULTILINE)
    text = SCRIPT.format(kind="FluxPipeline", setup="", options="").replace("from diffusers", "from copied_pipeline")
    files = {"draw.py": text.encode(), "copied_pipeline.py": copied.encode()}
    (change,) = plan_repository(files, load()).changes
    assert change.path == "draw.py"
    (tmp_path / "draw.py").write_bytes(change.after)
    (tmp_path / "original.py").write_text(text)
    (tmp_path / "copied_pipeline.py").write_text(copied)
    (tmp_path / "some.yml").write_text(json.dumps(tiny.KEPT))
    monkeypatch.setattr(sys, "argv", ["draw.py", str(weights)])
    monkeypatch.syspath_prepend(str(tmp_path))

    wanted = runpy.run_path(str(tmp_path / "original.py"))["latents"]
    monkeypatch.setenv("CHIPMUNK_CONFIG", str(tmp_path / "some.yml"))
    ran = runpy.run_path(str(tmp_path / "draw.py"))
    assert tiny.error(ran["latents"], wanted) < 1e-5
    counted = chipmunk.statistics(ran["pipe"])
    assert [tiny.sparse_calls(counted)[layer.name] for layer in counted.layers[2:]] == [(9, 10)] * 4
