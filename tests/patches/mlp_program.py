"""What tests of MLP forms share: planning a minimal repository, and running it as it was and patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chipmunk.registry import load
from chipmunk.rewrite import Plan, plan_repository
from chipmunk.rewrite.minimal import FILES

REGISTRY = load()
ONLY = ["mlp", "attention"]


def planned(**files: str) -> Plan:
    """The plan of the minimal repository with some of its files written otherwise: `single=…` is flow/single.py."""
    return plan_repository(planned_files(**files), REGISTRY, only=ONLY)


def reasons(plan: Plan, patch: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in plan.sites:
        if site.patch == patch:
            found.setdefault(site.status.value, []).append(site.reason)
    return found


def planned_files(**files: str) -> dict[str, bytes]:
    texts = {**FILES, **{f"flow/{name}.py": text for name, text in files.items()}}
    return {path: text.encode() for path, text in texts.items()}


def after(files: dict[str, bytes], plan: Plan) -> dict[str, bytes]:
    return {**files, **{change.path: change.after for change in plan.changes}}


PROGRAM = """
import importlib, json, sys
import torch
import chipmunk
from chipmunk.config import Config
from chipmunk.rewrite.plan import ModelFacts
from chipmunk.verify.oracle import Oracle
from pydantic import TypeAdapter

part = {"counts_multiple_of": 8, "first_n_dense_layers": 1, "full_step_every": 10}
config = {"mlp": {**part, "bm": 8, "mbm": 8}, "attn": {**part, "mbm": 8}}
everything = {"mlp": {**config["mlp"], "top_keys": 1.0}, "attn": {**config["attn"], "top_keys": 1.0}}
generator = torch.Generator().manual_seed(1)
image, text = torch.randn(2, 16, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
ids = torch.zeros(2, 16, 3)
ids[..., 1], ids[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4


def run(model):
    shown = image
    for step in chipmunk.steps(model, range(9)):
        shown = shown - 0.1 * model(shown, ids, text, torch.zeros(2, 5, 3), torch.full((2,), 1 - step / 9))
    return shown


def model_of(folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "flow"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    torch.manual_seed(int(sys.argv[1]))
    model = importlib.import_module("flow.loading").load_painter("small")
    sys.path.remove(folder)
    return model


results = {}
torch.set_grad_enabled(False)
for name, (original, patched, facts) in json.loads(sys.stdin.read()).items():
    model, changed = model_of(original), model_of(patched)
    off, dense = run(changed), run(model)
    chipmunk.enable(changed, everything)
    kept = run(changed)
    chipmunk.enable(changed, config)
    sparse = run(changed)
    layers = [layer.mlp["main"].sparse for layer in chipmunk.statistics(changed).layers]
    oracle = Oracle(model, TypeAdapter(ModelFacts).validate_python(facts), Config.model_validate(config), steps=9)
    with oracle:
        oracle.auto_step()
        wanted = run(model)
    error = lambda a, b: float((a - b).norm() / b.norm())
    results[name] = {
        "off": torch.equal(off, dense), "kept": error(kept, dense), "oracle": error(sparse, wanted),
        "sparse": error(sparse, dense), "margin": oracle.smallest_margin, "layers": layers,
    }
print(json.dumps(results))
"""


def run(tmp_path: Path, cases: Iterable[tuple[str, dict[str, str]]], seed: int = 0) -> dict[str, Any]:
    """What the program finds of each case: a name, and the files that are written otherwise."""
    given: dict[str, Any] = {}
    for index, (name, changed) in enumerate(cases):
        files = planned_files(**changed)
        plan = plan_repository(files, REGISTRY, only=ONLY)
        folders = []
        for which, content in (("original", files), ("patched", after(files, plan))):
            folder = tmp_path / f"{which}{index}"
            for path, text in content.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(text)
            folders.append(str(folder))
        given[name] = (*folders, asdict(plan.models[0]))
    environment = {k: v for k, v in os.environ.items() if k != "CHIPMUNK_CONFIG"}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def check(results: dict[str, Any]) -> None:
    """Off to the bit, everything kept within rounding, sparse as the plain statement of the rules says."""
    for name, result in results.items():
        assert result["off"], name
        assert result["kept"] < 1e-5, name
        assert result["margin"] > 2e-7, f"{name}: a tie, choose another seed"
        assert result["oracle"] < 1e-4, name
        assert result["sparse"] > 1e-3, f"{name}: nothing was sparse"
        assert result["layers"][1:] == [8] * 5, name
