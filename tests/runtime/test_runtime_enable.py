"""Turning Chipmunk on and off: which configuration counts, and when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_model import Flux, build, denoise, inputs, same, small, sparse_calls
from torch import Tensor, nn

import chipmunk
from chipmunk.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("no_gradients")

YAML = "mlp:\n  bm: 16\n  mbm: 16\n  counts_multiple_of: 8\nattn:\n  mbm: 16\n  counts_multiple_of: 8\n"


def test_a_configuration_is_a_path_a_config_or_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "some.yml"
    path.write_text(YAML)
    results = []
    for config in (path, str(path), Config.model_validate(small()), small()):
        model = build()
        chipmunk.enable(model, config)
        results.append(denoise(model, 9, **inputs()))
        assert sparse_calls(model) > 0
    assert same(results[0], results[1])
    assert same(results[2], results[3])


def test_wrong_configurations_are_refused(tmp_path: Path) -> None:
    model = build()
    path = tmp_path / "some.yml"
    path.write_text("mlp:\n  top_kyes: 0.3\n")
    with pytest.raises(ConfigError, match="top_keys"):
        chipmunk.enable(model, path)
    with pytest.raises(ValueError, match="top_kyes"):
        chipmunk.enable(model, {"mlp": {"top_kyes": 0.3}})
    with pytest.raises(ConfigError, match="cannot be read"):
        chipmunk.enable(model, tmp_path / "missing.yml")
    assert not chipmunk.statistics(model).enabled


def test_a_model_that_is_not_patched_is_refused_with_the_next_command() -> None:
    with pytest.raises(TypeError, match="chipmunk patch"):
        chipmunk.enable(nn.Linear(1, 1), small())


@pytest.mark.parametrize("where", ["environment", "working directory"])
@pytest.mark.parametrize("entry", ["enable", "steps", "call"])
def test_the_configuration_is_found(where: str, entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "chipmunk-config.yml" if where == "working directory" else "other.yml"
    (tmp_path / name).write_text(YAML)
    if where == "environment":
        monkeypatch.setenv("CHIPMUNK_CONFIG", str(tmp_path / name))
    model = build()
    if entry == "enable":
        chipmunk.enable(model, None)
    if entry == "call":
        model(**inputs(), timesteps=torch.ones(1))
    assert chipmunk.statistics(model).enabled == (entry != "steps")
    denoise(model, 9, **inputs())
    assert sparse_calls(model) > 0


def test_the_configuration_is_found_in_the_patched_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository" / ".chipmunk").mkdir(parents=True)
    (tmp_path / "repository" / "src" / "flux").mkdir(parents=True)
    (tmp_path / "repository" / "chipmunk-config.yml").write_text(YAML)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = "from flux_model import Flux, chipmunk\n" + (
        "class Model(Flux):\n"
        "    @chipmunk.model_forward(double='double_blocks', single='single_blocks', image='img', ids='img_ids')\n"
        "    def forward(self, img, img_ids, **rest):\n"
        "        return Flux.forward.__wrapped__(self, img, img_ids, **rest)\n"
    )
    names: dict[str, Any] = {}
    exec(compile(source, str(tmp_path / "repository" / "src" / "flux" / "model.py"), "exec"), names)
    model = build(kind=names["Model"])
    denoise(model, 9, **inputs())
    assert sparse_calls(model) > 0


def test_without_a_configuration_enable_leaves_the_model_off() -> None:
    model = build()
    chipmunk.enable(model, None)
    assert not chipmunk.statistics(model).enabled
    assert str(chipmunk.statistics(model)) == "Chipmunk is off for this model."


def test_enable_without_a_configuration_keeps_the_one_that_is_on(tmp_path: Path) -> None:
    """As where a script enables a model its own way, and a patched command line then calls `enable(model, None)`."""
    model = build()
    chipmunk.enable(model, small())
    denoise(model, 9, **inputs())
    before = sparse_calls(model)
    chipmunk.enable(model)
    assert sparse_calls(model) == before > 0  # the statistics go on, too
    (tmp_path / "chipmunk-config.yml").write_text("attn:\n  is_enabled: false\nmlp:\n  is_enabled: false\n")
    chipmunk.enable(model)
    denoise(model, 9, **inputs())
    assert sparse_calls(model) == 2 * before


def test_enable_without_a_configuration_in_the_middle_of_an_image_changes_nothing() -> None:
    model, other = build(), build()
    given, got = inputs(), {}
    for name, each in (("once", model), ("twice", other)):
        chipmunk.enable(each, small())
        for step in chipmunk.steps(each, range(9)):
            if step == 4 and name == "twice":
                chipmunk.enable(each)
            got[name] = each(**given, timesteps=torch.ones(1))
    assert torch.equal(got["once"], got["twice"])


def test_enable_without_a_configuration_reads_a_file_that_was_found_again(tmp_path: Path) -> None:
    file = tmp_path / "chipmunk-config.yml"
    file.write_text(YAML)
    model = build()
    chipmunk.enable(model)
    file.write_text("attn:\n  is_enabled: false\nmlp:\n  is_enabled: false\n")
    chipmunk.enable(model)
    denoise(model, 9, **inputs())
    assert chipmunk.statistics(model).enabled
    assert sparse_calls(model) == 0
    file.unlink()
    chipmunk.enable(model)  # turning off is what `disable` is for
    assert chipmunk.statistics(model).enabled


def test_a_shallow_copy_of_an_enabled_model_has_no_configuration_to_keep() -> None:
    model = build()
    chipmunk.enable(model, small())
    twin = copy.copy(model)
    chipmunk.enable(twin)
    assert not chipmunk.statistics(twin).enabled
    assert chipmunk.statistics(model).enabled


def test_disable_holds_whatever_files_there_are(tmp_path: Path) -> None:
    (tmp_path / "chipmunk-config.yml").write_text(YAML)
    model = build()
    chipmunk.disable(model)
    denoise(model, 9, **inputs())
    assert not chipmunk.statistics(model).enabled
    chipmunk.enable(model)
    assert chipmunk.statistics(model).enabled


def test_disable_in_the_middle_of_an_image_goes_on_dense() -> None:
    model, dense = build(), build()
    given, got = inputs(), []
    chipmunk.enable(model, small())
    for step in chipmunk.steps(model, range(9)):
        if step == 4:
            chipmunk.disable(model)
        got.append(model(**given, timesteps=torch.ones(1)))
    assert torch.equal(got[-1], dense(**given, timesteps=torch.ones(1)))


def test_off_steps_and_slot_hand_back_what_they_were_given() -> None:
    model, times = build(), [1, 2, 3]
    assert chipmunk.steps(model, times) is times
    assert chipmunk.slot(model, "negative") is model
    assert chipmunk.steps(object(), times) is times


class Engine:
    """What stands in the model's place under `--trt`: no module, and nothing patched in it."""

    def __call__(self, **given: Any) -> Tensor:
        return next(iter(given.values()))


def test_an_engine_in_the_place_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = [1, 2, 3]
    chipmunk.enable(Engine())  # as the patched command line does where no configuration is given
    assert chipmunk.steps(Engine(), loop) is loop
    with pytest.raises(TypeError, match="--trt"):
        chipmunk.enable(Engine(), small())
    (tmp_path / "other.yml").write_text(YAML)
    monkeypatch.setenv("CHIPMUNK_CONFIG", str(tmp_path / "other.yml"))
    chipmunk.enable(Engine())  # nobody asked this command for it: the loop will say that it has no effect
    with pytest.warns(RuntimeWarning, match=r"other\.yml has no effect on this sampling loop.*Engine"):
        assert chipmunk.steps(Engine(), loop) is loop


class TwoWays(Flux):
    """As FLUX.2 with a cache of reference tokens: another method goes through the blocks too."""

    def forward_cached(self, **given: Any) -> Tensor:
        return Flux.forward.__wrapped__(self, **given)  # type: ignore[attr-defined, no-any-return]


def test_statistics_say_where_no_call_came_through_the_marked_forward() -> None:
    model = build(kind=TwoWays)
    dense = denoise(model, 9, **inputs())
    chipmunk.enable(model, small())
    assert same(denoise(model.forward_cached, 9, **inputs()), dense)
    told = " ".join(str(chipmunk.statistics(model)).split())
    assert told.endswith(" no call came through TwoWays.forward: other methods that run the blocks are dense")
    denoise(model, 9, **inputs())
    assert "no call came" not in str(chipmunk.statistics(model))
