"""Blocks under torch.compile: whole graphs, few of them, and none anew for the second image."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_model import DoubleBlock, Flux, SingleBlock, build, denoise, error, inputs, rotary_table, same, small
from torch import nn
from torch._dynamo.utils import counters

import chipmunk
from chipmunk.runtime import compiling


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def tiny() -> Flux:
    """Two double blocks, the first of them always dense, and one single block."""
    return build(double=2, single=1)


def single() -> Flux:
    """One single block and nothing else: half the graphs."""
    return build(double=0, single=1)


def alone(**changes: Any) -> dict[str, Any]:
    """A configuration that has no layers which are always dense."""
    return small(mlp__first_n_dense_layers=0, attn__first_n_dense_layers=0, **changes)


def blocks_of(model: Flux) -> list[nn.Module]:
    return [*model.double_blocks, *model.single_blocks]


def compile_blocks(model: Flux, backend: str) -> None:
    for block in blocks_of(model):
        block.compile(fullgraph=True, backend=backend)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def eager(given: dict[str, Any], steps: int = 12) -> list[torch.Tensor]:
    model = tiny()
    chipmunk.enable(model, small())
    return denoise(model, steps, **given)


def test_blocks_compile_whole_and_second_images_compile_nothing() -> None:
    given, config = inputs(), small(mlp__random_keys=0.2, attn__random_keys=0.1)
    model, plain = tiny(), tiny()
    compile_blocks(model, "aot_eager")
    chipmunk.enable(model, config)
    chipmunk.enable(plain, config)
    assert error(denoise(model, 12, **given), denoise(plain, 12, **given)) < 1e-5
    assert not counters["graph_break"]
    # (dense, full), (full, sparse), (sparse, sparse), (full, full); and the first layer of all, which never runs sparse
    assert graphs() == 4 + 1 + 4
    for _ in chipmunk.steps(model, range(21)):  # another image, another number of steps, another slot, other layers
        model(**given, timesteps=torch.ones(1))
        chipmunk.slot(model, "negative")(**given, timesteps=torch.ones(1))
    assert graphs() == 9
    assert chipmunk.statistics(model).layers[1].attention["negative"].sparse == 21 - 4


def test_blocks_compiled_while_off_notice_that_chipmunk_comes_and_goes() -> None:
    model, plain, given = single(), single(), inputs()
    compile_blocks(model, "eager")
    off = denoise(model, 9, **given)
    for one in (model, plain):
        chipmunk.enable(one, alone())
    assert error(denoise(model, 9, **given), denoise(plain, 9, **given)) < 1e-5
    assert chipmunk.statistics(model).layers[0].mlp["main"].sparse == 8
    chipmunk.disable(model)
    assert same(denoise(model, 9, **given), off)


def test_the_session_compiles_where_the_configuration_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    model = tiny()
    chipmunk.enable(model, small(compile=True))
    assert error(denoise(model, 12, **inputs()), eager(inputs())) < 1e-5
    # Step 0 shares the graph of a full step: at most four graphs of a class, the dense layers included.
    assert graphs() == 4 + 3
    assert not counters["graph_break"]
    layer = chipmunk.statistics(model).layers[1]
    assert (layer.attention["main"].full, layer.attention["main"].sparse) == (3, 9)
    other = pickle.loads(pickle.dumps(model))
    for copied in (other, copy.deepcopy(model)):
        assert all(block._compiled_call_impl is None for block in blocks_of(copied))
    chipmunk.disable(model)
    assert all(block._compiled_call_impl is None for block in blocks_of(model))
    assert same(denoise(model, 9, **inputs()), denoise(tiny(), 9, **inputs()))


class MethodDouble(DoubleBlock):
    """As in FLUX.2 with a cache of reference tokens: no `forward`, and a method for each way to run the block."""

    forward = nn.Module.forward

    def forward_plain(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_kept(**given)[:2]

    def forward_kept(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *DoubleBlock.forward(self, **given), None

    def forward_never_called(self) -> None:
        raise AssertionError


class MethodSingle(SingleBlock):
    forward = nn.Module.forward
    forward_kept = SingleBlock.forward


class MethodFlux(Flux):
    def __init__(self) -> None:
        super().__init__(double=2, single=1)
        for block in self.double_blocks:
            block.__class__ = MethodDouble
        for block in self.single_blocks:
            block.__class__ = MethodSingle

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Any, img_ids: Any, txt: Any, txt_ids: Any, timesteps: Any, **options: Any) -> torch.Tensor:
        vec = self.vec_in(timesteps[:, None].to(img.dtype)).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.size // self.count)
        for block in chipmunk.blocks(self.double_blocks, self, img):
            img, txt = block.forward_plain(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), dim=1)
        for block in chipmunk.blocks(self.single_blocks, self):
            img = block.forward_kept(img, vec=vec, pe=pe)
        return self.out(chipmunk.hidden(self, img[:, txt.shape[1] :]))


def method_model() -> MethodFlux:
    torch.manual_seed(0)
    model = MethodFlux().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def test_blocks_that_a_method_runs_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    model = method_model()
    chipmunk.enable(model, small(compile=True))
    assert error(denoise(model, 12, **inputs()), eager(inputs())) < 1e-5
    assert graphs() == 4 + 3
    assert not counters["graph_break"]
    layer = chipmunk.statistics(model).layers[1]
    assert (layer.attention["main"].full, layer.attention["main"].sparse) == (3, 9)
    assert not any(name.startswith("forward") for block in blocks_of(model) for name in block.__dict__)
    copy.deepcopy(model)
    chipmunk.disable(model)
    counters.clear()
    assert same(denoise(model, 9, **inputs()), denoise(tiny(), 9, **inputs()))
    assert graphs() == 0


def test_a_method_that_the_user_compiled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "must not be used")
    model = method_model()
    block = model.single_blocks[0]
    block.forward_kept = mine = torch.compile(block.forward_kept, backend="eager")
    chipmunk.enable(model, small(compile=True))
    assert error(denoise(model, 9, **inputs()), eager(inputs(), 9)) < 1e-5
    assert block.forward_kept is mine


def test_keeping_the_first_selection_survives_the_shared_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    changes = {"attn__recompute_mask": False, "attn__full_step_schedule": [0, 1, 4, 8, 9]}
    results = []
    for compile_ in (False, True):
        model = single()
        chipmunk.enable(model, alone(compile=compile_, mlp__is_enabled=False, **changes))
        results.append(denoise(model, 12, **inputs()))
    assert error(results[1], results[0]) < 1e-5


def test_the_session_leaves_alone_what_the_user_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "must not be used")
    model = tiny()
    model.single_blocks[0].compile(backend="eager")
    mine = model.single_blocks[0]._compiled_call_impl
    chipmunk.enable(model, small(compile=True))
    assert error(denoise(model, 9, **inputs()), eager(inputs(), 9)) < 1e-5
    assert all(block._compiled_call_impl is None for block in model.double_blocks)
    chipmunk.disable(model)
    assert model.single_blocks[0]._compiled_call_impl is mine


@pytest.mark.parametrize("setting", ["auto", False])
def test_nothing_is_compiled_on_a_cpu_unless_asked(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "must not be used")
    model = tiny()
    chipmunk.enable(model, small(compile=setting))
    denoise(model, 9, **inputs())
    assert chipmunk.statistics(model).layers[1].mlp["main"].sparse == 8


def test_five_sizes_in_a_row_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model = single()
    chipmunk.enable(model, alone(compile=True, mlp__is_enabled=False))  # two graphs a size
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for number, (height, width) in enumerate([(8, 6), (7, 8), (7, 7), (9, 7), (10, 5)], start=1):
            denoise(model, 8, **inputs(height, width))
            assert chipmunk.statistics(model).layers[0].attention["main"].sparse == 6 * number
    assert graphs() == 10
    assert torch._dynamo.config.recompile_limit == 8


def test_hooks_added_to_blocks_that_the_session_compiled_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user compiled nothing, so nothing may be lost that works in plain PyTorch."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model, plain = single(), single()
    chipmunk.enable(model, alone(compile=True, mlp__top_keys=1.0, attn__is_enabled=False))
    denoise(model, 8, **inputs())
    for one in (model, plain):
        one.single_blocks[0].linear2.register_forward_hook(lambda module, args, out: out * 2)
    assert error(denoise(model, 8, **inputs()), denoise(plain, 8, **inputs())) < 1e-5
    given = {**inputs(), "timesteps": torch.ones(1)}
    assert error([model(**given)], [plain(**given)]) < 1e-5


def _broken(graph: Any, examples: Any) -> Any:
    raise OSError("no C compiler")


def test_a_compiler_that_does_not_work_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", _broken)
    model, plain = single(), single()
    chipmunk.enable(plain, alone(compile=False))
    chipmunk.enable(model, alone())
    session = model.__dict__["_chipmunk_session"]
    monkeypatch.setattr(compiling, "_is_worth_it", lambda device: True)
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here .*no C compiler"):
        assert same(denoise(model, 9, **inputs()), denoise(plain, 9, **inputs()))
    assert not session.compiler.has_compiled
    chipmunk.enable(model, alone(compile=True))  # a choice made explicitly is not given up
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no C compiler"):
        denoise(model, 9, **inputs())


def test_a_whole_model_compiles_in_one_graph_while_off() -> None:
    model, given = tiny(), {**inputs(), "timesteps": torch.ones(1)}
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(**given), model(**given))
    assert graphs() == 1


class Handed(Flux):
    """Its work is done in a function that is given the model, as in DiffSynth-Studio."""

    def forward(self, **given: Any) -> torch.Tensor:
        return run(model=self, **given)


@chipmunk.model_forward(model="model", double="double_blocks", single="single_blocks", image="img", ids="img_ids")
def run(model: Handed, img: Any, img_ids: Any, txt: Any, txt_ids: Any, timesteps: Any) -> torch.Tensor:
    return Flux.forward.__wrapped__(model, img, img_ids, txt, txt_ids, timesteps)  # type: ignore[attr-defined, no-any-return]


def test_a_function_that_is_given_the_model_compiles_as_a_method_does() -> None:
    model, given = build(kind=Handed, double=1, single=1), {**inputs(), "timesteps": torch.ones(1)}
    whole = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(whole(**given), model(**given))
    assert graphs() == 1
    torch._dynamo.reset()
    whole, plain = torch.compile(model, backend="eager"), build(double=1, single=1)
    for one in (whole, plain):
        chipmunk.enable(one, alone())
    assert error(denoise(whole, 9, **inputs()), denoise(plain, 9, **inputs())) < 1e-5
    assert chipmunk.statistics(whole).layers[1].mlp["main"].sparse == 8


def test_one_graph_of_the_whole_model_is_refused_while_on() -> None:
    model, given = tiny(), {**inputs(), "timesteps": torch.ones(1)}
    chipmunk.enable(model, small())
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True out"):
        whole(**given)
    chipmunk.disable(model)
    assert torch.equal(whole(**given), model(**given))


def test_a_model_compiled_as_a_whole_runs_sparse_with_a_graph_break() -> None:
    model = tiny()
    whole = torch.compile(model, backend="eager")
    off = denoise(whole, 9, **inputs())
    chipmunk.enable(whole, small())
    assert error(denoise(whole, 9, **inputs()), eager(inputs(), 9)) < 1e-5
    assert chipmunk.statistics(whole).layers[1].mlp["main"].sparse == 8
    chipmunk.disable(whole)
    assert error(denoise(whole, 9, **inputs()), off) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_the_session_compiles_the_blocks_of_a_model_that_is_compiled_as_a_whole(
    how: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph of the whole model ends where the sparse forward begins, so the blocks would run uncompiled."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    model, plain = single(), single()
    whole: Any = model
    if when == "after":
        chipmunk.enable(model, alone(compile=True))
    if how == "wrapped":
        whole = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    chipmunk.enable(plain, alone())
    mine = model._compiled_call_impl
    if when == "before":
        chipmunk.enable(whole, alone(compile=True))
    assert error(denoise(whole, 9, **inputs()), denoise(plain, 9, **inputs())) < 1e-5
    assert chipmunk.statistics(whole).layers[0].mlp["main"].sparse == 8
    assert all(block._compiled_call_impl is not None for block in blocks_of(model))
    compiled = graphs()
    denoise(whole, 9, **inputs(seed=2))
    assert graphs() == compiled
    chipmunk.disable(whole)
    assert model._compiled_call_impl is mine
    assert all(block._compiled_call_impl is None for block in blocks_of(model))
    assert error(denoise(whole, 9, **inputs()), denoise(single(), 9, **inputs())) < 1e-6


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_configuration_is_looked_up_by_a_model_that_is_compiled_as_a_whole(how: str, tmp_path: Path) -> None:
    """Where nothing else asks for it, neither `enable` nor a marked loop: the timestep counts the steps."""

    class Clocked(Flux):
        forward = chipmunk.model_forward(
            double="double_blocks", single="single_blocks", image="img", ids="img_ids", timesteps="timesteps"
        )(Flux.forward.__wrapped__)  # type: ignore[attr-defined]

    (tmp_path / "chipmunk-config.yml").write_text(json.dumps(small()))  # in the working directory
    model = build(kind=Clocked, double=1, single=1)
    whole: Any = model
    if how == "wrapped":
        whole = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    given = inputs()
    for time in torch.linspace(1, 0.1, 10):
        whole(**given, timesteps=time[None])
    assert chipmunk.statistics(whole).layers[1].mlp["main"].sparse == 9


def test_linears_that_are_not_understood_compile_too() -> None:
    class Lora(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    models = tiny(), tiny()
    for model in models:
        for name in ("linear1", "linear2"):
            old = getattr(model.single_blocks[0], name)
            new = Lora(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            setattr(model.single_blocks[0], name, new)
        chipmunk.enable(model, small())
    compile_blocks(models[0], "eager")
    assert error(denoise(models[0], 9, **inputs()), denoise(models[1], 9, **inputs())) < 1e-5
    assert not counters["graph_break"]
    (reason,) = chipmunk.statistics(models[0]).layers[2].mlp["main"].dense
    assert reason == "the linear layer is a Lora"
