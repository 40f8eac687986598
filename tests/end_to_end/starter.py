"""The starter repository, unpatched and patched, and a model of it that is as small as tests want."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk import registry
from chipmunk.config import Config
from chipmunk.rewrite import BlockFacts, ModelFacts, plan_repository

STARTER = Path(__file__).parents[2] / "templates" / "flux-starter"

WIDTH, CONTEXT = 32, 24

FACTS = ModelFacts(
    file="flux/model.py",
    name="Flux",
    double="double_blocks",
    single="single_blocks",
    image="img",
    ids="img_ids",
    double_block=BlockFacts("flux/modules/layers.py", "DoubleStreamBlock", attention=True, mlp="img_mlp"),
    single_block=BlockFacts(
        "flux/modules/layers.py", "SingleStreamBlock", attention=True, linear_in="linear1", linear_out="linear2"
    ),
    step_caching=True,
)


@dataclass(frozen=True)
class Repository:
    """A starter repository whose `flux` package was imported under no name that another one could find."""

    root: Path
    modules: dict[str, ModuleType]

    def model(self, depth: int = 3, seed: int = 0) -> nn.Module:
        """A model of `depth` double blocks and one single block fewer; the same weights in every repository."""
        params = self.modules["flux.model"].FluxParams(
            in_channels=8,
            out_channels=8,
            vec_in_dim=12,
            context_in_dim=CONTEXT,
            hidden_size=WIDTH,
            mlp_ratio=4.0,
            num_heads=2,
            depth=depth,
            depth_single_blocks=depth - 1,
            axes_dim=[4, 6, 6],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
        )
        model: nn.Module = self.modules["flux.model"].Flux(params).eval()
        self.modules["flux.util"].randomise(model, seed)
        return model

    @contextmanager
    def importable(self) -> Iterator[None]:
        """While this is open, `import flux` gives this repository's package; unpickling needs that."""
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            for name in self.modules:
                del sys.modules[name]


def copy_starter(folder: Path) -> Path:
    """Write a copy of the starter into `folder` and return its root."""
    root = folder / "flux-starter"
    shutil.copytree(STARTER, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def patch(folder: Path) -> Path:
    """Write a patched copy of the starter into `folder`, without a journal, and return its root."""
    root = copy_starter(folder)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.py")}
    plan = plan_repository(files, registry.load())
    assert {change.path for change in plan.changes} >= {f"flux/{name}.py" for name in ("math", "model", "sampling")}
    (facts,) = plan.models
    assert (facts.double_block, facts.single_block) == (FACTS.double_block, FACTS.single_block)
    for change in plan.changes:
        (root / change.path).write_bytes(change.after)
    return root


def load(root: Path) -> Repository:
    """Import the `flux` package in `root` afresh, whatever other `flux` was imported before."""
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "flux"}
    sys.path.insert(0, str(root))
    try:
        importlib.invalidate_caches()
        for name in ("flux.sampling", "flux.cli"):
            importlib.import_module(name)
        modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "flux"}
        assert modules["flux"].__file__ == str(root / "flux" / "__init__.py")
        return Repository(root, modules)
    finally:
        sys.path.remove(str(root))
        for name in [*sys.modules]:
            if name.split(".")[0] == "flux":
                del sys.modules[name]
        sys.modules.update(hidden)


def inputs(
    height: int = 5, width: int = 7, text: int = 6, batch: int = 1, seed: int = 1, channels: int = 8
) -> dict[str, Tensor]:
    """Arguments of the model's forward but for the time; the tokens are no whole number of groups by default."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1).float()
    return {
        "img": torch.randn(batch, height * width, channels, generator=generator),
        "img_ids": ids.expand(batch, -1, -1),
        "txt": torch.randn(batch, text, CONTEXT, generator=generator),
        "txt_ids": torch.zeros(batch, text, 3),
        "y": torch.randn(batch, 12, generator=generator),
        "guidance": torch.full((batch,), 3.5),
    }


def small_config(
    attn: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    patchify: dict[str, Any] | None = None,
    **others: Any,
) -> Config:
    """The default configuration with tiles small enough for a small model."""
    return Config.model_validate(
        {
            "compile": False,
            "implementation": "reference",
            "attn": {"mbm": 8, "counts_multiple_of": 4, "full_step_every": 5} | (attn or {}),
            "mlp": {"bm": 8, "mbm": 8, "counts_multiple_of": 8, "full_step_every": 5} | (mlp or {}),
            "patchify": {"chunk_size_1": 4, "chunk_size_2": 2} | (patchify or {}),
        }
        | others
    )
