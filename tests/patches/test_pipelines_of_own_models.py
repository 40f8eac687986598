"""A pipeline whose transformer is a model of this repository: that one is patched, and finds its configuration."""

from __future__ import annotations

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES

SCRIPT = """\
import torch
from diffusers import FluxPipeline

from flow.model import Painter

{made}
pipe = FluxPipeline.from_pretrained("flux", transformer=painter)
picture = pipe("a chipmunk")
"""


@pytest.mark.parametrize(
    ("made", "is_enabled"),
    [
        ("painter = Painter(width=8, heads=2)", False),
        ('painter = Painter.from_pretrained("mine").to("cuda")', False),
        ('painter = torch.load("mine.pt")', True),
    ],
)
def test_enabled_only_where_the_transformer_may_be_another(made: str, is_enabled: bool) -> None:
    files = {path: text.encode() for path, text in FILES.items()}
    plan = plan_repository({**files, "draw.py": SCRIPT.format(made=made).encode()}, load())
    assert any(change.path == "draw.py" for change in plan.changes) == is_enabled
