"""Patches a small repository and runs it, as it was and as it is: off, its bits; everything kept, its numbers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import chipmunk
from chipmunk.config import Config
from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES
from chipmunk.verify.oracle import Oracle

REGISTRY = load()
STEPS = 9
KEPT: dict[str, Any] = {
    "compile": False,
    "attn": {"top_keys": 1.0, "mbm": 8, "counts_multiple_of": 1, "first_n_dense_layers": 0},
    "mlp": {
        "top_keys": 1.0, "random_keys": 0.0, "bm": 8, "mbm": 8, "counts_multiple_of": 8, "first_n_dense_layers": 0,
    },
    "patchify": {"chunk_size_1": 2, "chunk_size_2": 1},
}  # fmt: skip
SIDE = 6


def plan_of(**files: str) -> Plan:
    """The plan for the minimal repository with some files replaced: `double=...` is `flow/double.py`."""
    return plan_repository(texts_of(files), REGISTRY)


def texts_of(files: dict[str, str]) -> dict[str, bytes]:
    return {path: text.encode() for path, text in {**FILES, **{f"flow/{n}.py": t for n, t in files.items()}}.items()}


def left_dense(plan: Plan, patch: str = "") -> list[str]:
    return [s.reason for s in plan.sites if s.status.value == "left dense" and patch in ("", s.patch)]


def order_of(plan: Plan) -> str:
    """What the report says of token order."""
    (site,) = [site for site in plan.sites if site.patch == "model-forward" and "; " in site.reason]
    return site.reason.partition("; ")[2]


class Outcome:
    """What the original draws, and the patched one, off and with everything kept."""

    def __init__(
        self,
        folder: Path,
        files: dict[str, str],
        config: dict[str, Any] | None = None,
        *,
        draw: str = "sample",
        extra: tuple[Any, ...] = (),
    ) -> None:
        """`draw`: the function of `flow/sampling.py` that is called; `extra`: what it gets after what `sample` does."""
        texts = texts_of(files)
        self.plan = plan_repository(texts, REGISTRY)
        changed = {change.path: change.after for change in self.plan.changes}
        original, patched = _imported(folder / "original", texts), _imported(folder / "patched", {**texts, **changed})
        self.original = _draw(original, _built(original), draw, extra)
        model = _built(patched)
        self.off = _draw(patched, model, draw, extra)
        chipmunk.enable(model, config or KEPT)
        self.on = _draw(patched, model, draw, extra)
        self.statistics = chipmunk.statistics(model)

    def oracle(self, folder: Path, files: dict[str, str], config: dict[str, Any]) -> Tensor:
        """What verify's plain statement of the rules draws with the original model."""
        original = _imported(folder / "oracle", texts_of(files))
        model = _built(original)
        with Oracle(model, self.plan.models[0], Config.model_validate(config), steps=STEPS) as oracle:
            oracle.auto_step()
            return _draw(original, model, "sample", ())

    @property
    def error(self) -> float:
        return float((self.on - self.original).norm() / self.original.norm())

    def check(self) -> None:
        assert torch.equal(self.off, self.original)
        assert self.error < 1e-5


def _imported(root: Path, files: dict[str, bytes]) -> dict[str, ModuleType]:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        return {name: importlib.import_module(f"flow.{name}") for name in ("sampling", "loading")}
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "flow"]:
            del sys.modules[name]


def _built(modules: dict[str, ModuleType]) -> Any:
    torch.manual_seed(0)
    return modules["loading"].load_painter("small")


def _draw(modules: dict[str, ModuleType], model: Any, draw: str, extra: tuple[Any, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(1, SIDE * SIDE, 3)
    ids[..., 1], ids[..., 2] = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    image, text = torch.randn(1, SIDE * SIDE, 4, generator=generator), torch.randn(1, 5, 4, generator=generator)
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    with torch.no_grad():
        given = (model, image, ids, text, torch.zeros(1, 5, 3), times, *extra)
        drawn: Tensor = getattr(modules["sampling"], draw)(*given)
    return drawn
