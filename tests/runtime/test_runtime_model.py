"""Turning Chipmunk on and off, and all that users do to a model while it is on."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flux_model import Flux, build, denoise, inputs, same, small
from torch import Tensor, nn

import chipmunk
from chipmunk.config import Config, ConfigError


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


YAML = "mlp:\n  bm: 16\n  mbm: 16\n  counts_multiple_of: 8\nattn:\n  mbm: 16\n  counts_multiple_of: 8\n"


def sparse_calls(model: Any) -> int:
    return sum(layer.mlp["main"].sparse for layer in chipmunk.statistics(model).layers if layer.mlp)


# Configuration.


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


# Wrappers.


class Pipeline:
    def __init__(self, model: Flux) -> None:
        self.model = model
        self.other = nn.Linear(1, 1)

    def __call__(self, **given: Any) -> Tensor:
        return self.model(**given)


WRAPPERS = {
    "itself": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "inside a module": lambda model: nn.ModuleDict({"flux": model, "vae": nn.Linear(1, 1)}),
    "inside an object": Pipeline,
    "bound method": lambda model: model.forward,
    "partial function": lambda model: functools.partial(model),
    "twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_the_model_is_found_through_its_wrappers(wrapper: str) -> None:
    model = build()
    wrapped = WRAPPERS[wrapper](model)
    chipmunk.enable(wrapped, small())
    assert chipmunk.statistics(model).enabled
    for _ in chipmunk.steps(wrapped, range(9)):
        model(**inputs(), timesteps=torch.ones(1))
    assert sparse_calls(wrapped) > 0
    chipmunk.disable(wrapped)
    assert not chipmunk.statistics(model).enabled


def test_a_wrapper_that_is_called() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    expected = denoise(model, 9, **given)
    assert same(denoise(nn.DataParallel(model), 9, **given), expected)
    assert same(denoise(Pipeline(model), 9, **given), expected)


def test_a_holder_of_two_models_is_refused() -> None:
    with pytest.raises(TypeError, match="or several"):
        chipmunk.enable(nn.ModuleList([build(), build()]), small())


def test_a_subclass_that_overrides_forward() -> None:
    class Wrapped(Flux):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs) * 1.0

    model = build(kind=Wrapped)
    chipmunk.enable(model, small())
    denoise(model, 9, **inputs())
    assert sparse_calls(model) > 0


def test_a_decorator_with_a_parameter_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="no parameter 'pixels'"):

        @chipmunk.model_forward(double="a", single="b", image="pixels")
        def forward(self: Any, img: Tensor) -> Tensor:
            return img


# Copies, files, weights.


def test_copies_carry_no_state() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    copies: list[Flux] = []
    for step in chipmunk.steps(model, range(9)):
        model(**given, timesteps=torch.ones(1))
        if step == 4:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copies = [
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(buffer, weights_only=False),
            ]
            block = copy.deepcopy(model.single_blocks[1])
            assert block.__dict__.get("_chipmunk") is None
            assert len(pickle.dumps(model)) < len(pickle.dumps(build())) + 2000
    for other in copies:
        assert not chipmunk.statistics(other).enabled
        assert same(denoise(other, 9, **given), denoise(build(), 9, **given))
        chipmunk.enable(other, small())
        alone = build()
        chipmunk.enable(alone, small())
        assert same(denoise(other, 9, **given), denoise(alone, 9, **given))


def test_copies_made_inside_a_call_carry_no_state() -> None:
    model, copies = build(), []
    chipmunk.enable(model, small())

    def copy_block(block: nn.Module, args: Any) -> None:
        assert block.__dict__["_chipmunk"] is not None
        copies.append(copy.deepcopy(block))
        copies.append(pickle.loads(pickle.dumps(model.double_blocks[1])))

    model.single_blocks[1].register_forward_pre_hook(copy_block)
    for _ in chipmunk.steps(model, range(9)):
        model(**inputs(), timesteps=torch.ones(1))
    assert copies
    assert all(block.__dict__.get("_chipmunk") is None for block in copies)


def test_a_shallow_copy_runs_dense() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    other = copy.copy(model)
    got = denoise(other, 9, **given)
    assert same(got, denoise(build(), 9, **given))
    assert chipmunk.statistics(model).dense_model_calls == {"a replica of the model": 9}


def test_state_dict_is_untouched_while_enabled(tmp_path: Path) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chipmunk.enable(model, small())
    for step in chipmunk.steps(model, range(9)):
        model(**inputs(), timesteps=torch.ones(1))
        if step == 4:
            now = model.state_dict()
            assert list(now) == list(before)
            assert all(torch.equal(now[name], value) for name, value in before.items())
            assert [name for name, _ in model.named_modules()] == [name for name, _ in build().named_modules()]
            safetensors.torch.save_model(model, str(tmp_path / "weights.safetensors"))
            build(seed=7).load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"), strict=True)
    model.load_state_dict(before, strict=True)


def test_weights_are_read_when_they_are_used() -> None:
    """A LoRA merged, weights loaded, or data swapped after enable: the next image uses them."""
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    denoise(model, 9, **given)
    model.load_state_dict(build(seed=8).state_dict())
    model.single_blocks[1].linear1.weight.add_(0.1)
    model.double_blocks[1].img_mlp[0].weight.data = model.double_blocks[1].img_mlp[0].weight.data * 1.1
    got = denoise(model, 9, **given)
    other = build(seed=8)
    other.single_blocks[1].linear1.weight.add_(0.1)
    other.double_blocks[1].img_mlp[0].weight.mul_(1.1)
    chipmunk.enable(other, small())
    assert same(got, denoise(other, 9, **given))


def test_to_after_enable_is_honoured() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    denoise(model, 9, **given)
    double = {name: value.double() if name in ("img", "txt") else value for name, value in given.items()}
    got = denoise(model.double(), 9, **double)
    other = build().double()
    chipmunk.enable(other, small())
    assert same(got, denoise(other, 9, **double))
    assert got[0].dtype == torch.float64


# Several models.


class Control(nn.Module):
    """Like a ControlNet: it shares the block class of a FLUX model, and is no patched model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in build(seed=4).double_blocks)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        for block in self.blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        return img


def test_another_model_with_the_same_block_class_stays_dense() -> None:
    from flux_model import rotary_table

    model, control, given = build(), Control(), inputs()
    chipmunk.enable(model, small())
    arguments = {
        "img": torch.randn(1, 63, 32, generator=torch.Generator().manual_seed(0)),
        "txt": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)),
        "vec": torch.ones(1, 32),
        "pe": rotary_table(torch.cat((given["txt_ids"], given["img_ids"]), 1), 16),
    }
    expected = control(**arguments)
    for _ in chipmunk.steps(model, range(9)):
        assert torch.equal(control(**arguments), expected)
        model(**given, timesteps=torch.ones(1))
    assert sparse_calls(model) == 5 * 8


def test_models_of_two_classes_in_one_process() -> None:
    class Other(Flux):
        @chipmunk.model_forward(double="doubles", single="single_blocks", image="pixels", ids="img_ids")
        def forward(self, pixels: Tensor, img_ids: Tensor, **rest: Tensor) -> Tensor:
            inner = Flux.forward.__wrapped__  # type: ignore[attr-defined]
            return inner(self, pixels, img_ids, **rest)

        @property
        def doubles(self) -> nn.ModuleList:
            return self.double_blocks

    one, two, given = build(), build(kind=Other), inputs()
    chipmunk.enable(one, small())
    chipmunk.enable(two, small())
    renamed = {"pixels" if name == "img" else name: value for name, value in given.items()}
    for _ in chipmunk.steps(one, chipmunk.steps(two, range(9))):
        a = one(**given, timesteps=torch.ones(1))
        b = two(**renamed, timesteps=torch.ones(1))
        assert torch.equal(a, b)
    assert sparse_calls(one) == sparse_calls(two) > 0


def test_positional_and_keyword_arguments_are_the_same() -> None:
    model, given = build(), inputs()
    chipmunk.enable(model, small())
    keyword = [model(**given, timesteps=torch.ones(1)) for _ in chipmunk.steps(model, range(9))]
    positional = [
        model(given["img"], given["img_ids"], given["txt"], given["txt_ids"], torch.ones(1))
        for _ in chipmunk.steps(model, range(9))
    ]
    assert same(keyword, positional)


def test_wrong_arguments_raise_the_error_of_the_original() -> None:
    model = build()
    chipmunk.enable(model, small())
    with pytest.raises(TypeError, match=r"forward\(\) missing 5 required positional arguments: 'img'"):
        model()


# Statistics.


def test_statistics_read_well() -> None:
    model = build()
    chipmunk.enable(model, small())
    model(**inputs(), timesteps=torch.ones(1))
    for _ in chipmunk.steps(model, range(12)):
        model(**inputs(), timesteps=torch.ones(1))
        chipmunk.slot(model, "negative")(**inputs(), timesteps=torch.ones(1))
    statistics = chipmunk.statistics(model)
    assert [layer.name for layer in statistics.layers] == [
        *(f"double_blocks.{index}" for index in range(3)),
        *(f"single_blocks.{index}" for index in range(3)),
    ]
    assert statistics.model_calls == 25
    assert statistics.peak_cache_bytes > 2 * 5 * 63 * 64 * 4
    lines = str(statistics).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Chipmunk: 25 model calls, 1 of them dense; caches 0 bytes now, ")
    assert "  dense model calls: outside a sampling loop (1)" in lines
    assert "  token order: reordered (2)" in lines
    assert "double_blocks.0 attention: 0 sparse, 0 full, 12 dense (one of the first 1 layers)" in " ".join(
        str(statistics).split()
    )
    # layers that did the same are one line
    assert "  double_blocks.1 to 2 mlp: 10 sparse, 2 full" in lines
    assert "  single_blocks.0 to 2 mlp [negative]: 10 sparse, 2 full" in lines


def test_public_names() -> None:
    import chipmunk.runtime

    assert sorted(chipmunk.runtime.__all__) == sorted(chipmunk.__all__)
    assert all(callable(getattr(chipmunk, name)) for name in chipmunk.__all__)


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
