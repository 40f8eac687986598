"""What a fidelity worker leaves behind where it cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chipmunk.fidelity import worker
from chipmunk.fidelity.spec import Spec
from chipmunk.verify.order import write_order
from chipmunk.verify.placeholders import PlaceholderUsed
from tests.verify.tiny_flux import FACTS


@pytest.mark.parametrize(
    ("package", "command"), [("einops", "-m pip install einops"), ("comfy.ops", "path/to/ComfyUI")]
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(
    package: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def original(spec: Spec) -> dict[str, object]:
        raise PlaceholderUsed(f"{package} is used", name=package)

    monkeypatch.setattr(worker, "original", original)
    monkeypatch.chdir(tmp_path)
    order = Spec("original", root=tmp_path, out=tmp_path, facts=FACTS, target=tmp_path, dense=tmp_path)
    write_order(order, tmp_path / "spec.json")
    with torch.enable_grad():  # which the worker turns off
        worker.main(str(tmp_path / "spec.json"))
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert (error["kind"], error["message"]) == ("import", f"{package} is used")
    assert command in error["next_command"]
