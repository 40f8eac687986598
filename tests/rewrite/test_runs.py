"""Patched code runs, and computes to the bit what it did while Chipmunk is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES

from .sources import REWRITES, encode, rewrite

PLAIN = {"crlf": False, "bom": False, "tabs": False, "no_final_newline": False, "latin": False}
PROGRAM = """
import importlib, json, sys
import torch

results = {}
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "flow"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    torch.manual_seed(0)
    model = importlib.import_module("flow.loading").load_painter("small")
    sample = importlib.import_module("flow.sampling").sample
    image, text = torch.randn(2, 16, 4), torch.randn(2, 5, 4)
    ids = torch.zeros(2, 16, 3)
    ids[..., 1], ids[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
    times = torch.linspace(1, 0, 9).tolist()
    with torch.no_grad():
        out = sample(model, image, ids, text, torch.zeros(2, 5, 3), times)
    results[folder] = out.flatten().tolist()
    sys.path.remove(folder)
print(json.dumps(results))
"""


def write(folder: Path, files: dict[str, bytes]) -> str:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return str(folder)


def test_off_is_the_same_to_the_bit(tmp_path: Path) -> None:
    registry = load()
    shuffled = [r for i, r in enumerate(REWRITES) if i % 3 == 0], [r for i, r in enumerate(REWRITES) if i % 3 == 1]
    variants = [FILES, *(rewrite(FILES, changes) for changes in shuffled)]
    pairs: list[tuple[str, str]] = []
    for index, texts in enumerate(variants):
        files = encode(texts, **PLAIN)
        plan = plan_repository(files, registry)
        patched = {**files, **{change.path: change.after for change in plan.changes}}
        assert patched != files
        pairs.append((write(tmp_path / f"original{index}", files), write(tmp_path / f"patched{index}", patched)))
    environment = {k: v for k, v in os.environ.items() if k != "CHIPMUNK_CONFIG"}
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(folder for pair in pairs for folder in pair)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    for original, patched_folder in pairs:
        assert len(results[original]) == 2 * 16 * 4
        assert results[original] == results[patched_folder]
