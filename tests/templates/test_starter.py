"""The starter repository works as a repository of its own: it runs, draws, saves, loads, and needs little."""

from __future__ import annotations

import ast
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from chipmunk.registry import data_path

STARTER = data_path("templates") / "flux-starter"


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(STARTER, tmp_path_factory.mktemp("starter") / "flux-starter"))


def python(starter: Path, *arguments: str, **environment: str) -> str:
    """Run Python in the repository, as its user does."""
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=starter, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_draws_the_same_png_for_the_same_seed_and_another_for_another(starter: Path) -> None:
    size = ("--name", "flux-tiny", "--width", "160", "--height", "97", "--num-steps", "2")
    python(starter, "-m", "flux", *size, "--seed", "5", "--num-images", "2", "--output-dir", "first")
    python(starter, "-m", "flux.cli", *size, "--seed", "5", "--output-dir", "second")
    image = (starter / "first/img_5.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    # rounded down to a multiple of 16
    assert struct.unpack(">II", image[16:24]) == (160, 96)
    assert image == (starter / "second/img_5.png").read_bytes()
    assert image != (starter / "first/img_6.png").read_bytes()


def test_its_pieces_fit(starter: Path) -> None:
    """Packing is undone by unpacking, a checkpoint of one's own loads, and every parameter has a say in the output."""
    code = """
import os, sys, torch
from flux.sampling import get_noise, prepare, unpack, get_schedule
from flux.util import configs, load_clip, load_flow_model, load_t5, save_checkpoint
noise = get_noise(2, 64, 48, torch.device("cpu"), torch.float32, seed=1)
inp = prepare(load_t5("flux-tiny"), load_clip("flux-tiny"), noise, "a chipmunk")
assert torch.equal(unpack(inp["img"], 64, 48), noise)
assert inp["img_ids"][1, 4].tolist() == [0, 1, 1]
assert inp["txt"].shape[0] == inp["vec"].shape[0] == 2
times = get_schedule(12, 1120)
assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True)
model = load_flow_model("flux-tiny")
p = configs["flux-tiny"].params
assert p.hidden_size // p.num_heads in (64, 128) and min(p.depth, p.depth_single_blocks) >= 5
half = torch.full((2,), 0.5)
call = dict(img=inp["img"], img_ids=inp["img_ids"], txt=inp["txt"], txt_ids=inp["txt_ids"], y=inp["vec"])
model(**call, timesteps=half, guidance=4 * half).square().mean().backward()
assert not [n for n, q in model.named_parameters() if q.grad is None or not q.grad.any()]
with torch.no_grad():
    model.img_in.weight += 1
save_checkpoint(model, "mine.safetensors")
configs["flux-tiny"].ckpt_path = "mine.safetensors"
assert torch.equal(load_flow_model("flux-tiny").img_in.weight, model.img_in.weight)
"""
    python(starter, "-c", code)


def test_it_needs_only_torch_and_safetensors() -> None:
    imported = set()
    for file in STARTER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"flux", "torch", "safetensors"}


def test_its_default_images_have_a_thousand_tokens(starter: Path) -> None:
    code = """
from flux.util import configs
assert set(configs) == {"flux-mini", "flux-tiny"}
for spec in configs.values():
    assert spec.width % spec.token_size == spec.height % spec.token_size == 0
    assert (spec.width // spec.token_size) * (spec.height // spec.token_size) >= 1000
"""
    python(starter, "-c", code)


def test_the_reference_model_draws_with_one_command_and_its_weights_can_be_replaced(starter: Path) -> None:
    size = ("--width", "71", "--height", "64", "--num-steps", "2", "--seed", "5", "--prompt", "a red fish, two boats")
    python(starter, "-m", "flux.cli", *size, "--output-dir", "first")
    image = (starter / "first/img_5.png").read_bytes()
    # rounded down to a multiple of 8
    assert struct.unpack(">II", image[16:24]) == (64, 64)
    code = """
from flux.util import load_flow_model, save_checkpoint
model = load_flow_model("flux-mini")
model.final_layer.linear.bias.data += 1
save_checkpoint(model, "mine.safetensors")
"""
    python(starter, "-c", code)
    told = python(starter, "-m", "flux", *size, "--output-dir", "second", FLUX_MINI="mine.safetensors")
    assert "Loading mine.safetensors" in told
    assert image != (starter / "second/img_5.png").read_bytes()
