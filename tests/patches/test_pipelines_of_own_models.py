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


OWN_FORWARD = """\
def transformer_forward(transformer, image, text, temb):
    self = transformer
    for block in self.transformer_blocks:
        text, image = block_forward(block, image, text, temb)
    for i, block in enumerate(self.single_transformer_blocks):
        {line}
    return image
"""


@pytest.mark.parametrize(
    ("line", "is_named"),
    [
        ("text, image = block_forward(block, image, text, temb)", True),
        ("image = block(image, temb=temb)", True),
        ("given = {'self': block, 'image': image}\n        image = single_forward(**given)", True),
        ("block.attn.processor = Processor(block)", False),
        ("block.to('cpu')", False),
        ("print(i)", False),
    ],
)
@pytest.mark.parametrize("name", ["transformer", "self"])
def test_a_function_that_runs_the_blocks_itself_is_told(line: str, is_named: bool, name: str) -> None:
    """OminiControl's way: the pipeline is enabled, and the transformer's forward never runs."""
    own = OWN_FORWARD.format(line=line).replace("forward(transformer", f"forward({name}")
    script = SCRIPT.format(made="painter = None").replace("from flow.model import Painter", "from own import *")
    plan = plan_repository({"own.py": own.encode(), "draw.py": script.encode()}, load())
    told = [site for site in plan.sites if site.file == "own.py"]
    assert [site.matched for site in told] == ["transformer_forward"] * (is_named and name == "transformer")
    assert all("runs the blocks" in site.reason for site in told)


def test_a_function_that_puts_another_forward_in_its_place_is_not_that() -> None:
    inner = OWN_FORWARD.format(line="image = block(image, temb=temb)").replace("(transformer,", "(self,")
    own = "def changed(transformer):\n" + "".join(f"    {line}\n" for line in inner.splitlines())
    own += "    transformer.forward = transformer_forward.__get__(transformer)\n"
    script = SCRIPT.format(made="painter = None").replace("from flow.model import Painter", "from own import *")
    plan = plan_repository({"own.py": own.encode(), "draw.py": script.encode()}, load())
    assert not any(site.file == "own.py" for site in plan.sites)


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
