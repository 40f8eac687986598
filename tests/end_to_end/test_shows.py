"""Runs that users make, from unpatched source on: off the dense run to the bit, with everything kept but for rounding.

The starter repository gets a sampling loop as in PuLID, sd-scripts or Kontext, or weights with a LoRA; it is patched
as it then stands. `python -m tests.end_to_end.test_shows` prints the figures that docs/how-it-works.md holds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk
from chipmunk import registry
from chipmunk.rewrite import plan_repository
from tests.end_to_end.starter import Repository, copy_starter, inputs, load, small_config

STEPS = 12
KEPT = small_config(attn={"top_keys": 1.0}, mlp={"top_keys": 1.0, "random_keys": 0.0})
SPARSE = small_config()
DENSE_LAYERS, LAYERS = 2, 5
ATTENTION, MLP = STEPS - 4, STEPS - 3
"""Sparse steps of twelve: attention is full at 0, 1, 5 and 10, MLPs at 0, 5 and 10."""

HEAD = """\
    guidance_vec = img.new_full((img.shape[0],), guidance)
    for t_curr, t_prev in zip(timesteps[:-1], timesteps[1:]):
"""
FROM_A_STEP = """\
    guidance_vec = img.new_full((img.shape[0],), guidance)
    for i, (t_curr, t_prev) in enumerate(zip(timesteps[:-1], timesteps[1:])):
"""
SECOND_CALL = """\
        if i >= 4:
            neg_pred = model(
                img=img,
                img_ids=img_ids,
                txt=-txt,
                txt_ids=txt_ids,
                y=-vec,
                timesteps=t_vec,
                guidance=guidance_vec,
            )
            pred = neg_pred + 3.0 * (pred - neg_pred)
"""
BATCH = """\
    img_ids, txt_ids = torch.cat((img_ids, img_ids)), torch.cat((txt_ids, txt_ids))
    txt, vec = torch.cat((txt, -txt)), torch.cat((vec, -vec))
    guidance_vec = img.new_full((2 * img.shape[0],), guidance)
    for t_curr, t_prev in zip(timesteps[:-1], timesteps[1:]):
"""
REFERENCE = """\
    img_cond_seq = img.new_full((img.shape[0], 24, img.shape[2]), 0.5)
    img_cond_seq[:, ::3] *= -1
    rows = torch.arange(24)
    cond_ids = torch.stack((torch.ones(24), rows // 6, rows % 6), dim=-1).expand(img.shape[0], -1, -1)
    guidance_vec = img.new_full((img.shape[0],), guidance)
    for t_curr, t_prev in zip(timesteps[:-1], timesteps[1:]):
"""


class LinearLora(nn.Linear):
    """As the official Control LoRA: a subclass that adds to the linear's own result."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.in_features, inner.out_features, inner.bias is not None)
        self.load_state_dict(inner.state_dict())
        self.down, self.up = nn.Linear(inner.in_features, 4, bias=False), nn.Linear(4, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def with_lora(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    torch.manual_seed(5)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and wanted(name):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LinearLora(module))


def with_peft(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    targets = ["qkv", "proj", "linear1", "img_mlp.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets), model)


@dataclass(frozen=True)
class Show:
    what: str
    edits: tuple[tuple[str, str], ...] = ()
    """Of flux/sampling.py."""
    prepare: Callable[[nn.Module], None] = lambda model: None
    attention: int = ATTENTION
    """Sparse calls of attention in each layer that is not always dense, in the main slot."""
    double_mlp: int = MLP
    single_mlp: int = MLP
    other: int = 0
    """Sparse attention calls in the second slot."""
    reason: str | None = None
    """Why MLPs are dense."""


CALL = "            img=img,\n            img_ids=img_ids,\n"
SHOWS = {
    "LoRA (peft) on attention, linear1 and the image MLP": Show(
        "attention sparse; every MLP has a linear with a LoRA, and is dense",
        prepare=with_peft,
        double_mlp=0,
        single_mlp=0,
        reason="the linear layer is a peft.tuners.lora.layer.Linear",
    ),
    "LoRA (a subclass of Linear) on all linears": Show(
        "the same",
        prepare=lambda model: with_lora(model, lambda name: "blocks" in name),
        double_mlp=0,
        single_mlp=0,
        reason="the linear layer is a LinearLora",
    ),
    "LoRA on the attention of double blocks alone": Show(
        "attention and MLPs sparse", prepare=lambda model: with_lora(model, lambda name: "attn" in name)
    ),
    "CFG by a second call, from step 4 on": Show(
        "two call slots; the second starts with a full step of its own",
        ((HEAD, FROM_A_STEP), ("        img = img + (t_prev", SECOND_CALL + "        img = img + (t_prev")),
        other=8 - 3,  # of its eight steps 0, 1 and 5 are full
    ),
    "CFG by a batch of two": Show(
        "one slot, two batch elements",
        (
            (HEAD, BATCH),
            ("img.new_full((img.shape[0],), t_curr)", "img.new_full((2 * img.shape[0],), t_curr)"),
            (CALL, CALL.replace("img=img,", "img=torch.cat((img, img)),")),
            ("        img = img + (t_prev", "        pred, neg_pred = pred.chunk(2)\n"
             "        pred = neg_pred + 3.0 * (pred - neg_pred)\n        img = img + (t_prev"),
        ),
    ),
    "Kontext: tokens of a reference image behind the image": Show(
        "image tokens reordered, the reference's keep their place",
        (
            (HEAD, REFERENCE),
            (
                CALL,
                "            img=torch.cat((img, img_cond_seq), dim=1),\n"
                "            img_ids=torch.cat((img_ids, cond_ids), dim=1),\n",
            ),
            ("        img = img + (t_prev", "        pred = pred[:, : img.shape[1]]\n        img = img + (t_prev"),
        ),
    ),
}  # fmt: skip


def pair(folder: Path, edits: tuple[tuple[str, str], ...]) -> tuple[Repository, Repository]:
    """The edited starter as it is, and patched."""
    roots = [copy_starter(folder / name) for name in ("original", "patched")]
    for root in roots:
        path = root / "flux" / "sampling.py"
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text)
    files = {path.relative_to(roots[1]).as_posix(): path.read_bytes() for path in roots[1].rglob("*.py")}
    for change in plan_repository(files, registry.load()).changes:
        (roots[1] / change.path).write_bytes(change.after)
    return load(roots[0]), load(roots[1])


def draw(repository: Repository, model: Any) -> Tensor:
    given = inputs(8, 6)
    sampling = repository.modules["flux.sampling"]
    times = sampling.get_schedule(STEPS, given["img"].shape[1])
    names = ("img", "img_ids", "txt", "txt_ids", "y")
    with torch.no_grad():
        latents: Tensor = sampling.denoise(model, *(given[name] for name in names), times, 3.5)
    return latents


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def run(show: Show, folder: Path) -> tuple[bool, float, float, Any]:
    """Whether off is the same to the bit, the error with everything kept, the sparse one, and the statistics."""
    original, patched = pair(folder, show.edits)
    plain, model = original.model(), patched.model()
    show.prepare(plain)
    show.prepare(model)
    wanted = draw(original, plain)
    off = torch.equal(draw(patched, model), wanted)
    chipmunk.enable(model, KEPT)
    kept = error(draw(patched, model), wanted)
    counted = chipmunk.statistics(model)
    chipmunk.enable(model, SPARSE)
    sparse = error(draw(patched, model), wanted)
    chipmunk.disable(model)
    return off and torch.equal(draw(patched, model), wanted), kept, sparse, counted


@pytest.mark.parametrize("name", SHOWS)
def test_everything_kept_is_the_dense_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "peft" in name:
        pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    show = SHOWS[name]
    off, kept, sparse, counted = run(show, tmp_path)
    assert off
    assert kept < 1e-5
    assert 1e-4 < sparse < 1
    assert counted.dense_model_calls == {}
    assert counted.token_order == {"reordered": 2 if show.other else 1}
    assert len(counted.layers) == LAYERS
    for layer in counted.layers[DENSE_LAYERS:]:
        mlp = show.double_mlp if layer.name.startswith("double") else show.single_mlp
        assert (layer.attention["main"].sparse, layer.mlp["main"].sparse) == (show.attention, mlp)
        assert set(layer.mlp["main"].dense) == ({show.reason} if show.reason else set())
        assert [calls.sparse for slot, calls in layer.attention.items() if slot != "main"] == [show.other] * bool(
            show.other
        )


def main() -> None:
    os.environ.pop("CHIPMUNK_CONFIG", None)
    print("| run | what happens | off | everything kept | sparse |\n|---|---|---|---|---|")
    for name, show in SHOWS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            off, kept, sparse, _ = run(show, Path(folder))
            os.chdir("/")
        print(f"| {name} | {show.what} | {'same bits' if off else 'DIFFERS'} | {kept:.1e} | {sparse:.1e} |")


if __name__ == "__main__":
    sys.exit(main())
