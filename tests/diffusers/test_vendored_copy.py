"""A copy of diffusers' transformer in the user's repository, patched like any other code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers.models", reason="diffusers is not installed: pip install -e '.[dev]'")

import diffusers

from chipmunk.registry import load
from chipmunk.rewrite import SiteStatus, plan_repository


def vendored(name: str) -> bytes:
    """The installed file, its relative imports turned into ones of the package."""
    folder = Path(diffusers.__file__).parent / "models/transformers"
    if not (folder / name).exists():
        pytest.skip(f"this release has no {name}")
    text = (folder / name).read_text()
    return re.sub(
        r"^from \.\.(?=\w)",
        "from diffusers.models.",
        re.sub(r"(?m)^from \.\.\.(?=\w)", "from diffusers.", text),
        flags=re.M,
    ).encode()


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        ("transformer_flux.py", {"attention", "double-mlp", "single-mlp", "model-forward"}),
        ("transformer_flux2.py", {"attention", "double-mlp", "single-mlp", "model-forward"}),
        ("transformer_flux3.py", {"attention", "double-mlp", "single-mlp", "model-forward"}),
    ],
)
def test_attention_is_found_behind_an_inherited_setter(name: str, patches: set[str]) -> None:
    plan = plan_repository({"mine/transformer.py": vendored(name)}, load())
    patched = {site.patch for site in plan.sites if site.status is SiteStatus.PATCHED}
    assert patches <= patched
    assert plan.target == "diffusers"
    (facts,) = plan.models
    assert facts.double_block.attention
    assert facts.single_block.attention
    assert not facts.installed


def test_a_script_names_the_installed_model() -> None:
    script = b'from diffusers import FluxPipeline\n\npipe = FluxPipeline.from_pretrained("x")\n'
    plan = plan_repository({"draw.py": script}, load())
    (facts,) = plan.models
    assert facts.installed
    file = Path(diffusers.__file__).parent.parent / facts.file
    source = file.read_text()
    for name in (facts.name, facts.double_block.name, facts.single_block.name):
        assert f"class {name}(" in source
    assert plan.target == "diffusers"
