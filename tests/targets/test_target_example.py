"""The target in docs/adding-a-target.md, as it stands there, on a repository of its family."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chipmunk import registry
from chipmunk.rewrite import plan_repository

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-target.md"


class Fluxlet(nn.Module):
    """A model as the example describes it, less the blocks."""

    def __init__(self, channels: int, text_channels: int, width: int, heads: int, doubles: int, singles: int) -> None:
        super().__init__()
        self.latents_in, self.context_in = nn.Linear(channels, width), nn.Linear(text_channels, width)
        self.out = nn.Linear(width, channels)

    def forward(self, latents: Tensor, latent_ids: Tensor, context: Tensor, pooled: Tensor, sigma: Tensor) -> Tensor:
        text = self.context_in(context).mean(1) + self.context_in(pooled) + sigma[:, None]
        return self.out(self.latents_in(latents) + text[:, None] + latent_ids.sum(-1, keepdim=True))  # type: ignore[no-any-return]


def sample(net, latents, latent_ids, context, pooled, sigmas):  # type: ignore[no-untyped-def]
    for now, after in itertools.pairwise(sigmas):
        latents = latents + (after - now) * net(latents, latent_ids, context, pooled, latents.new_full((2,), now))
    return latents


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (folder / "fluxlet.py").write_text(source)
    return folder


@pytest.fixture(scope="module")
def target(plugins: Path) -> ModuleType:
    return registry.load([plugins]).targets["fluxlet"].module


def test_it_has_every_name_that_the_built_in_target_has(target: ModuleType) -> None:
    built_in = registry.load().targets["flux"].module
    public = {name: value for name, value in vars(built_in).items() if not name.startswith("_")}
    own = {name for name, value in public.items() if getattr(value, "__module__", None) == built_in.__name__}
    own -= {"prepare", "named"}  # what a family may have that others do without
    assert own | {"NAME", "API", "SMALL", "FULL", "CannotRun"} <= set(vars(target))


def test_it_is_chosen_for_its_family_and_for_no_other(plugins: Path) -> None:
    root = registry.data_path("templates") / "flux-starter"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.py")}
    known = registry.load([plugins])
    assert plan_repository(files, known).target == "flux"
    renamed = {path: re.sub(rb"\bimg\b", b"latents", data) for path, data in files.items()}
    renamed = {path: data.replace(b"img_ids", b"latent_ids") for path, data in renamed.items()}
    assert plan_repository(renamed, known).target == "fluxlet"


def test_it_builds_calls_and_samples(target: Any) -> None:
    model = target.build(Fluxlet, target.SMALL).requires_grad_(False)
    given = target.inputs(model, 2, 3, 4, 5, torch.Generator().manual_seed(0))
    assert target.call(model, model, given, 0.5).shape == given["img"].shape == (2, 12, 16)
    assert target.loop_variants(sample, "net") == ("plain",)
    assert target.run_loop(sample, "net", model, given, (1.0, 0.5, 0.0)).shape == (2, 12, 16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert target.values_of(shapes)["width"] == 128


def test_it_names_what_it_does_not_know(target: Any) -> None:
    with pytest.raises(target.CannotRun, match="in_features"):
        target.build(nn.Linear, target.SMALL)
    with pytest.raises(target.CannotRun, match="latents_in"):
        target.values_of({})
    with pytest.raises(target.CannotRun, match="flavour"):
        target.loop_variants(lambda net, latents, flavour: None, "net")
