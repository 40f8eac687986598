"""Calls that are no plain inference: each runs exactly as before, with its reason counted."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, denoise, error, inputs, same, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


def build(kind: type[Flux] = Flux, **changes: Any) -> Flux:
    model = flux_model.build(0, kind, double=2, single=2)
    chipmunk.enable(model, small(**changes))
    return model


def dense() -> Flux:
    return flux_model.build(0, Flux, double=2, single=2)


def two_blocks() -> tuple[Flux, Flux]:
    """A model of one block of each kind, both sparse, and the same without Chipmunk: for what takes a compiler long."""
    model, plain = (flux_model.build(0, Flux, double=1, single=1) for _ in range(2))
    chipmunk.enable(model, small(attn__first_n_dense_layers=0, mlp__first_n_dense_layers=0))
    return model, plain


def arguments() -> dict[str, Tensor]:
    return {**inputs(), "timesteps": torch.ones(1)}


def model_reasons(model: Flux) -> dict[str, int]:
    return chipmunk.statistics(model).dense_model_calls


def mlp(model: Flux, layer: int = 1) -> Any:
    return chipmunk.statistics(model).layers[layer].mlp["main"]


def attention(model: Flux, layer: int = 1) -> Any:
    return chipmunk.statistics(model).layers[layer].attention["main"]


def in_a_loop(model: Flux, work: Callable[[], None]) -> None:
    """Do something at the fifth of nine steps, when sparse steps are under way; the rest goes on sparse."""
    for step in chipmunk.steps(model, range(9)):
        if step == 4:
            work()
        else:
            model(**arguments())
    assert mlp(model).sparse >= 6


# Programs that are made from a call


def test_torch_export_gives_the_dense_program() -> None:
    (model, plain), given = two_blocks(), arguments()

    def export() -> None:
        program = torch.export.export(model, (), given)
        assert "chipmunk" not in str(program.graph)
        assert torch.equal(program.module()(**given), plain(**given))

    in_a_loop(model, export)


def test_jit_trace_gives_the_dense_program() -> None:
    (model, plain), given = two_blocks(), arguments()

    def trace() -> None:
        traced = torch.jit.trace(model, example_kwarg_inputs=given, check_trace=False)
        assert "chipmunk" not in str(traced.graph)
        assert torch.equal(traced(**given), plain(**given))

    in_a_loop(model, trace)
    assert "torch.jit.trace records the program" in model_reasons(model)


def test_fx_gives_the_dense_program() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    (model, plain), given = two_blocks(), arguments()

    def trace() -> None:
        graph = make_fx(lambda *values: model(**dict(zip(given, values, strict=True))))(*given.values())
        assert "chipmunk" not in graph.code
        assert torch.equal(graph(*given.values()), plain(**given))

    in_a_loop(model, trace)
    assert model_reasons(model) == {"torch.fx records the program": 1}


def test_a_user_compiles_the_whole_model() -> None:
    (model, plain), given = two_blocks(), arguments()
    chipmunk.disable(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**given), plain(**given))
    torch._dynamo.reset()


# Transformed calls


def test_vmap() -> None:
    model, given = build(), arguments()
    images = torch.stack([given.pop("img"), inputs(seed=2)["img"]])
    call = functools.partial(lambda model, img: model(img=img, **given), model)
    expected = torch.stack([dense()(img=img, **given) for img in images])

    def transform() -> None:
        assert error([torch.func.vmap(call)(images)], [expected]) < 1e-5

    in_a_loop(model, transform)
    assert model_reasons(model) == {"torch.func transforms the call": 1}


def test_deterministic_algorithms_are_enough() -> None:
    expected = denoise(build(), 9, **inputs())
    torch.use_deterministic_algorithms(True)
    try:
        assert same(denoise(build(), 9, **inputs()), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_subclass_of_tensor_is_left_alone() -> None:
    class Watched(Tensor):
        pass

    model, given = build(), arguments()
    given["img"] = given["img"].as_subclass(Watched)  # type: ignore[no-untyped-call]
    in_a_loop(model, lambda: model(**given))
    assert model_reasons(model) == {"the image is a Watched": 1}


# Training


def test_gradient_checkpointing_inside_a_loop() -> None:
    model, plain = build(), dense()

    def train() -> None:
        with torch.enable_grad():
            for one in (model, plain):
                checkpoint(lambda one=one: one(**arguments()).sum(), use_reentrant=False).backward()  # type: ignore[no-untyped-call]

    in_a_loop(model, train)
    assert torch.equal(model.img_in.weight.grad, plain.img_in.weight.grad)  # type: ignore[arg-type]
    assert model_reasons(model) == {"autograd is on": 2}  # forward, and once more on the way back


class GradInside(Flux):
    """Turns autograd on around its blocks, whoever calls it."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, **given: Any) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            return Flux.forward.__wrapped__(self, img=img, img_ids=img_ids, **given)  # type: ignore[attr-defined, no-any-return]


def test_autograd_that_is_turned_on_inside() -> None:
    model, plain = build(GradInside), dense()
    for _ in chipmunk.steps(model, range(9)):
        got = model(**arguments())
    with torch.enable_grad():
        expected = plain(**arguments())
        expected.sum().backward()
        got.sum().backward()
    assert torch.equal(got, expected)
    assert torch.equal(model.double_blocks[1].img_mlp[0].weight.grad, plain.double_blocks[1].img_mlp[0].weight.grad)  # type: ignore[union-attr, index, arg-type]
    assert attention(model).dense == {"autograd is on": 9}
    assert mlp(model).dense == {"autograd is on": 9}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_to_the_dtype_of_the_image_is_no_obstacle(dtype: torch.dtype) -> None:
    """The layers that autocast would cast are told apart one by one."""
    model, plain, given = build(attn__top_keys=1.0, mlp__top_keys=1.0), dense(), inputs()
    given = {name: value.to(dtype) if name in ("img", "txt") else value for name, value in given.items()}
    with torch.autocast("cpu", dtype):
        expected = denoise(plain, 9, **given)
        got = denoise(model, 9, **given)
    assert error([x.float() for x in got], [x.float() for x in expected]) < 0.05
    assert model_reasons(model) == {}


# Linear layers that are something else


class LoraLinear(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return adapted


class Float8Linear(nn.Module):
    """A linear layer whose `weight` is no matrix any more once it is quantised."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("quantised", base.weight.detach().to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantised.to(x.dtype), self.bias)


def replace_linears(module: nn.Module, kind: type[nn.Module]) -> None:
    torch.manual_seed(7)
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            replace_linears(child, kind)


@pytest.mark.parametrize("kind", [LoraLinear, Float8Linear])
def test_attention_stays_sparse_where_the_linear_layers_are_others(kind: type[nn.Module]) -> None:
    model, plain = build(attn__top_keys=1.0), dense()
    for one in (model, plain):
        replace_linears(one.double_blocks, kind)
        replace_linears(one.single_blocks, kind)
    assert error(denoise(model, 12, **inputs()), denoise(plain, 12, **inputs())) < 1e-5
    for layer in (1, 3):
        assert attention(model, layer).sparse > 0
        assert mlp(model, layer).sparse == 0
        assert [kind.__name__ in reason for reason in mlp(model, layer).dense] == [True]


# Weights that are elsewhere


def test_accelerate_offload_of_each_layer() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = build(attn__top_keys=1.0), dense()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.double_blocks[1].img_mlp[0].weight.device.type == "meta"  # type: ignore[union-attr, index]
    assert error(denoise(model, 12, **inputs()), denoise(plain, 12, **inputs())) < 1e-5
    assert attention(model).sparse > 0
    assert mlp(model).dense == {"a hook watches or changes the MLP": 12} or "hook" in next(iter(mlp(model).dense))


def test_accelerate_offload_of_the_whole_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build()
    hooked, _ = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert same(denoise(hooked, 12, **inputs()), denoise(build(), 12, **inputs()))
    assert mlp(model).sparse > 0


def test_weights_on_another_device_than_the_activations() -> None:
    from chipmunk.runtime.linears import why_not_linear

    with torch.device("meta"):
        linear = nn.Linear(4, 4)
    assert why_not_linear(linear, torch.ones(1, 2, 4), 4) == "the weight is on another device"


# Blocks behind wrappers


class Wrapper(nn.Module):
    """FSDP and activation checkpointing put every block into one of these."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, block)
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.name)(*args, **kwargs)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_blocks_in_wrappers_are_found(name: str) -> None:
    model = build()
    for blocks in (model.double_blocks, model.single_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = Wrapper(block, name)
    assert same(denoise(model, 12, **inputs()), denoise(build(), 12, **inputs()))
    assert mlp(model).sparse > 0


def test_blocks_that_the_user_compiled_one_by_one() -> None:
    model, other = two_blocks()[0], two_blocks()[0]
    model.double_blocks[0] = torch.compile(model.double_blocks[0], backend="eager")  # type: ignore[assignment]
    assert error(denoise(model, 8, **inputs()), denoise(other, 8, **inputs())) < 1e-5
    assert mlp(model, 0).sparse > 0
    torch._dynamo.reset()


def test_saving_while_a_loop_runs() -> None:
    model = build()
    file = io.BytesIO()
    in_a_loop(model, lambda: torch.save(model.state_dict(), file))
    assert len(file.getvalue()) > 0
