"""Where models go: told from the statements of `ast`, however a model is bound."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import COMMAND, FILES, variant

LOAD = "    model = load_painter(name)\n"


@pytest.mark.parametrize(
    "line",
    [
        "model, count = load_painter(name), 3",
        "count, (model, rest) = 3, (load_painter(name), None)",
        "[model, count] = [load_painter(name), 3]",
        "model: 'Any' = load_painter(name)",
        "model = load_painter(name).to('cuda')",
    ],
)
def test_a_model_that_is_loaded(line: str) -> None:
    files = {path: text.encode() for path, text in FILES.items()}
    files["flow/command.py"] = variant(COMMAND, (LOAD, f"    {line}\n")).encode()
    changed = {change.path: change.after.decode() for change in plan_repository(files, load()).changes}
    assert f"    {line}\n    chipmunk.enable(model, chipmunk_config)\n" in changed["flow/command.py"]


@pytest.mark.parametrize("line", ["count, model = load_painter(name), 3", "model = [load_painter(name)]"])
def test_something_else_beside_a_model(line: str) -> None:
    files = {path: text.encode() for path, text in FILES.items()}
    files["flow/command.py"] = variant(COMMAND, (LOAD, f"    {line}\n")).encode()
    changed = {change.path: change.after.decode() for change in plan_repository(files, load()).changes}
    assert "chipmunk.enable(model" not in changed.get("flow/command.py", "")
