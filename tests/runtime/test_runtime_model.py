"""What users do to a model while Chipmunk is on: wrap it, copy it, save it, change it, run another one beside it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flux_model import Flux, build, denoise, inputs, same, small, sparse_calls
from torch import Tensor, nn

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


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


def test_a_watcher_is_told_of_each_layer_after_each_call() -> None:
    model, told = build(), dict[int, list[str | None]]()
    chipmunk.enable(model, small())
    model.__dict__["_chipmunk_session"].recorder.watch = lambda layer, state: told.setdefault(layer, []).append(
        None if state is None else f"{state.attention}, {state.attention_done}, {state.keys is not None}"
    )
    denoise(model, 9, **inputs())
    model(**inputs(), timesteps=torch.ones(1))  # outside of a loop: dense as a whole
    assert told.pop(0) == [None] * 9
    assert list(told) == [1, 2, 3, 4, 5]
    for kinds in told.values():
        assert kinds == ["dense, done, False", "full, done, True", *["sparse, done, True"] * 7]


def test_public_names() -> None:
    import chipmunk.runtime

    assert sorted(chipmunk.runtime.__all__) == sorted(chipmunk.__all__)
    assert all(callable(getattr(chipmunk, name)) for name in chipmunk.__all__)
