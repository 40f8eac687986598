"""MLPs of every form that the patches know: each pair of functions is the code as it was, and as it is patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flux_model import DoubleBlock, Flux, SingleBlock, attention, build, denoise, error, heads, inputs, same, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

import chipmunk
from chipmunk.config import Config
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.oracle import Oracle

WIDTH, HIDDEN = 32, 48


class Gate(nn.Module):
    def __init__(self, value_first: bool = False) -> None:
        super().__init__()
        self.value_first = value_first
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return first * self.act(second) if self.value_first else self.act(first) * second


class Mlp(nn.Module):
    def __init__(self, approximate: str = "tanh", drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop = nn.Linear(WIDTH, HIDDEN), nn.GELU(approximate=approximate), nn.Dropout(drop)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class ProjectedGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([ProjectedGelu(), nn.Dropout(0.0), nn.Linear(HIDDEN, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Pair(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.w3, self.w1 = nn.Linear(WIDTH, HIDDEN, bias=bias), nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.w2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * functional.silu(self.w1(x)))


def gated(value_first: bool = False, bias: bool = False) -> nn.Sequential:
    gate = Gate(value_first)
    return nn.Sequential(nn.Linear(WIDTH, 2 * HIDDEN, bias=bias), gate, nn.Linear(HIDDEN, WIDTH, bias=bias))


def sequential(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), *between, nn.Linear(HIDDEN, WIDTH), nn.Identity())


MLPS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], bool]] = {
    "exact GELU and dropout": (lambda: sequential(nn.GELU(), nn.Dropout(0.3)), {}, False),
    "its own class": (Mlp, {"parts": "fc1, act, fc2", "of": "Mlp"}, False),
    "in a list": (FeedForward, {"parts": "net.0.proj, gelu_tanh, net.2", "of": "FeedForward, ProjectedGelu"}, False),
    "SwiGLU": (gated, {"parts": "0, swiglu, 2", "of": "Gate"}, True),
    "SwiGLU, value first": (lambda: gated(True, True), {"parts": "0, swiglu_value_first, 2", "of": "Gate"}, True),
    "SwiGLU of two linears": (Pair, {"parts": "w1 + w3, swiglu, w2", "of": "Pair"}, True),
}  # fmt: skip


class OtherDouble(DoubleBlock):
    patched, options = True, dict[str, str]()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        scale, shift, gate, gate_mlp = self.mod(vec)[:, None].chunk(4, dim=-1)
        x = self.norm(img) * (1 + scale) + shift
        txt = txt + gate * self.txt_mlp(self.norm(txt))
        if self.patched:
            return img + gate_mlp * chipmunk.mlp(self, self.img_mlp, x, **self.options), txt
        return img + gate_mlp * self.img_mlp(x), txt


Attend = Callable[[Tensor], Tensor]
Form = Callable[[Any, Tensor, Attend], Tensor]


def slices(b: Any, x: Tensor, attend: Attend) -> Tensor:
    held = b.linear1(x)
    qkv, mlp = held[:, :, : 3 * b.size], held[:, :, 3 * b.size :]
    mlp = functional.gelu(mlp, approximate="tanh")
    return b.linear2(torch.cat([attend(qkv), mlp], dim=2))


def slices_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    held = chipmunk.held_linear(b, b.linear1, x)
    qkv, mlp = chipmunk.split_held(b, held, [3 * b.size, -1])
    mlp = chipmunk.activate(b, "gelu_tanh", mlp)
    return chipmunk.cat_linear(b, b.linear2, attend(qkv), None, mlp)


def shape_asked(b: Any, x: Tensor, attend: Attend) -> Tensor:
    x = b.linear1(x)
    width = x.shape[-1] // 2
    qkv, mlp = torch.split(x, [width, x.shape[-1] - width], dim=-1)
    mlp = b.gate(mlp)
    return b.linear2(torch.cat([attend(qkv), mlp], dim=-1))


def shape_asked_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    layer = chipmunk.layer(b).get("chipmunk_layer")  # handed down, to a processor say
    x = chipmunk.held_linear(layer, b.linear1, x)
    width = x.shape[-1] // 2
    qkv, mlp = chipmunk.split_held(layer, x, [width, x.shape[-1] - width])
    mlp = chipmunk.activate(layer, b.gate, mlp, kind="swiglu", of="Gate")
    return chipmunk.cat_linear(layer, b.linear2, attend(qkv), None, mlp)


def separate(b: Any, x: Tensor, attend: Attend) -> Tensor:
    mlp = b.mlp_act(b.proj_mlp(x))
    return b.linear2(torch.cat([mlp, attend(b.qkv(x))], dim=-1))


def separate_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    mlp = chipmunk.activate(b, b.mlp_act, chipmunk.mlp_linear(b, b.proj_mlp, x))
    return chipmunk.cat_linear(b, b.linear2, attend(b.qkv(x)), None, mlp, mlp_first=True)


def reversed_split(b: Any, x: Tensor, attend: Attend) -> Tensor:
    mlp, qkv = b.linear1(x).split([b.hidden, 3 * b.size], dim=-1)
    return b.linear2(torch.cat((attend(qkv), b.gate(mlp)), 2))


def reversed_split_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    mlp, qkv = chipmunk.split_linear(b, b.linear1, x, [b.hidden, 3 * b.size], mlp_first=True)
    return chipmunk.cat_linear(b, b.linear2, attend(qkv), b.gate, mlp, kind="swiglu_value_first", of="Gate")


def halves(b: Any, x: Tensor, attend: Attend) -> Tensor:
    qkv, mlp = torch.split(b.linear1(x), [3 * b.size, b.hidden], dim=-1)
    value, gate = torch.split(mlp, [HIDDEN, HIDDEN], dim=-1)
    return b.linear2(torch.cat((attend(qkv), value * functional.silu(gate)), 2))


def halves_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    qkv, mlp = chipmunk.split_linear(b, b.linear1, x, [3 * b.size, b.hidden])
    value, gate = torch.split(mlp, [HIDDEN, HIDDEN], dim=-1)
    mlp = chipmunk.gated(b, functional.silu, gate, value, value_first=True)
    return chipmunk.cat_linear(b, b.linear2, attend(qkv), None, mlp)


def four_parts(b: Any, x: Tensor, attend: Attend) -> Tensor:
    q, k, v, mlp = b.linear1(x).split([b.size, b.size, b.size, b.hidden], dim=-1)
    return b.linear2(torch.cat((attend(torch.cat((q, k, v), -1)), functional.gelu(mlp)), 2))


def four_parts_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    q, k, v, mlp = chipmunk.split_linear(b, b.linear1, x, [b.size, b.size, b.size, b.hidden])
    return chipmunk.cat_linear(b, b.linear2, attend(torch.cat((q, k, v), -1)), "gelu", mlp)


def chunks(b: Any, x: Tensor, attend: Attend) -> Tensor:
    qkv, mlp = b.linear1(x).chunk(2, dim=-1)
    gate, value = mlp.unflatten(-1, (2, -1)).unbind(-2)
    return b.linear2(torch.cat((attend(qkv), b.silu(gate) * value), 2))


def chunks_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    qkv, mlp = chipmunk.split_linear(b, b.linear1, x, [-1, -1])
    gate, value = mlp.unflatten(-1, (2, -1)).unbind(-2)
    mlp = chipmunk.gated(b, b.silu, gate, value)
    return chipmunk.cat_linear(b, b.linear2, attend(qkv), None, mlp)


def two_linears(b: Any, x: Tensor, attend: Attend) -> Tensor:
    mlp = b.silu(b.proj_gate(x)) * b.proj_mlp(x)
    return b.leave(attend(b.qkv(x))) + b.linear2(mlp)


def two_linears_patched(b: Any, x: Tensor, attend: Attend) -> Tensor:
    gate = chipmunk.mlp_linear(b, b.proj_gate, x, half="gate")
    mlp = chipmunk.gated(b, b.silu, gate, chipmunk.mlp_linear(b, b.proj_mlp, x, half="value"))
    return b.leave(attend(b.qkv(x))) + chipmunk.out_linear(b, b.linear2, mlp)


_FUSED = BlockFacts("", "", True, linear_in="linear1", linear_out="linear2")
SINGLES: dict[str, tuple[Form, Form, BlockFacts]] = {
    "slices of a variable, functional GELU": (slices, slices_patched, _FUSED),
    "a variable whose shape is asked, SwiGLU": (shape_asked, shape_asked_patched, replace(_FUSED, gated=True)),
    "separate projections, MLP first": (
        separate,
        separate_patched,
        replace(_FUSED, linear_in="proj_mlp", mlp_first_out=True),
    ),
    "MLP split off first, value first": (
        reversed_split,
        reversed_split_patched,
        replace(_FUSED, gated=True, mlp_first_in=True),
    ),
    "halves of the MLP's part": (halves, halves_patched, replace(_FUSED, gated=True)),
    "four parts": (four_parts, four_parts_patched, _FUSED),
    "chunks": (chunks, chunks_patched, replace(_FUSED, gated=True)),
    "two linears, and a third for the MLP alone": (
        two_linears,
        two_linears_patched,
        replace(_FUSED, linear_in="proj_gate, proj_mlp", gated=True, mlp_alone=True),
    ),
}


class OtherSingle(SingleBlock):
    form: Form

    def __init__(self, size: int, count: int, form: Form) -> None:
        hidden = HIDDEN * (2 if form in (shape_asked, reversed_split, halves, chunks) else 1)
        super().__init__(size, count, hidden)
        self.silu, self.leave, self.proj_gate = nn.SiLU(), nn.Linear(size, size), nn.Linear(size, hidden)
        self.linear2 = nn.Linear(HIDDEN if form is two_linears else size + HIDDEN, size)
        self.qkv, self.proj_mlp = nn.Linear(size, 3 * size), nn.Linear(size, hidden)
        self.gate = Gate(form is reversed_split)
        self.do = form

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, **options: Any) -> Tensor:
        scale, shift, gate = self.mod(vec)[:, None].chunk(3, dim=-1)

        def attend(qkv: Tensor) -> Tensor:
            return attention(*heads(qkv, self.count), pe=pe, **chipmunk.layer(self))

        return x + gate * self.do(self, self.norm(x) * (1 + scale) + shift, attend)


def model_of(mlp: str, single: str, seed: int = 0) -> Flux:
    make, options, _ = MLPS[mlp]
    form = SINGLES[single][0]
    model = build(seed, double=2, single=2)
    torch.manual_seed(seed + 1)
    for block in model.double_blocks:
        block.img_mlp = make()
        block.__class__, block.options = OtherDouble, options
    model.single_blocks = nn.ModuleList(OtherSingle(model.size, model.count, form) for _ in range(2))
    return model.eval()


def patch(model: Flux, patched: bool = True) -> None:
    for block in model.double_blocks:
        block.patched = patched
    for block in model.single_blocks:
        pair = next(pair for pair in SINGLES.values() if block.do in pair[:2])
        block.do = pair[patched]


def facts_of(mlp: str, single: str) -> ModelFacts:
    double = BlockFacts("", "", False, mlp="img_mlp", gated=MLPS[mlp][2])
    if MLPS[mlp][0] is Pair:
        double = replace(double, linear_in="img_mlp.w1, img_mlp.w3", linear_out="img_mlp.w2", mlp_alone=True)
    return ModelFacts("", "Flux", "double_blocks", "single_blocks", "img", "img_ids", double, SINGLES[single][2])


CASES = [(list(MLPS)[index % len(MLPS)], single) for index, single in enumerate(SINGLES)]


@pytest.mark.parametrize(("mlp", "single"), CASES)
@torch.no_grad()
def test_off_everything_kept_and_sparse(mlp: str, single: str) -> None:
    model, given = model_of(mlp, single), inputs(6, 7, batch=2)
    patch(model, False)
    dense = denoise(model, 9, **given)
    config = small(mlp__random_keys=0.1, mlp__mbm=8, mlp__top_keys=0.4)
    oracle = Oracle(model, facts_of(mlp, single), Config.model_validate(config), steps=9)
    with oracle:
        oracle.auto_step()
        expected = denoise(model, 9, **given)
    patch(model)
    assert same(denoise(model, 9, **given), dense)
    chipmunk.enable(model, config)
    got = denoise(model, 9, **given)
    assert oracle.smallest_margin > 2e-6, "a tie: choose another seed"
    assert error(got, expected) < 1e-5
    assert error(got, dense) > 1e-3, "nothing was sparse"
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])
    chipmunk.enable(model, small(mlp__top_keys=1.0, attn__top_keys=1.0))
    assert error(denoise(model, 9, **given), dense) < 1e-5
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])


@torch.no_grad()
def test_a_second_mlp_of_a_block_runs_dense() -> None:
    """A block keeps the caches of one MLP: what its code calls after that is left alone."""
    model, given = model_of("its own class", "separate projections, MLP first"), inputs(6, 7)
    patch(model, False)
    for block in model.double_blocks:
        block.more = Mlp().eval()
        block.forward = partial(_with_more, block, block.forward)
    dense = denoise(model, 9, **given)
    patch(model)
    chipmunk.enable(model, small(mlp__top_keys=1.0, attn__top_keys=1.0))
    assert error(denoise(model, 9, **given), dense) < 1e-5
    assert all(layer.mlp["main"].sparse == 8 for layer in chipmunk.statistics(model).layers[1:])


def _with_more(block: Any, forward: Callable[..., Any], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    img, txt = forward(*args, **options)
    hidden = chipmunk.mlp_linear(block, block.more.fc1, img)
    img = img + chipmunk.out_linear(block, block.more.fc2, chipmunk.activate(block, block.more.act, hidden))
    return img + chipmunk.mlp(block, block.more, img, parts="fc1, act, fc2", of="Mlp"), txt


@pytest.mark.parametrize(("mlp", "single"), [CASES[1], CASES[6], CASES[7]])
@torch.no_grad()
def test_compiled_without_graph_breaks(mlp: str, single: str) -> None:
    torch._dynamo.reset()
    model, given = model_of(mlp, single), inputs(6, 7)
    patch(model)
    chipmunk.enable(model, small(min_steps=1, mlp__full_step_every=3))
    expected = denoise(model, 7, **given)
    graphs = CompileCounter()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=64):
        assert error(denoise(model, 7, **given), expected) < 1e-5
        few = graphs.frame_count
        denoise(model, 13, **given)
    assert graphs.frame_count == few, "compiled anew at later steps"
    assert few <= 8


@torch.no_grad()
def test_weights_are_views() -> None:
    model = model_of("SwiGLU", "a variable whose shape is asked, SwiGLU")
    patch(model)
    chipmunk.enable(model, small(min_steps=1))
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: list[tuple[int, ...]] = []
    record = _Weights(seen)
    with record:
        denoise(model, 3, **inputs(6, 7))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert seen
    assert all(pointer in storages for pointers in seen for pointer in pointers)
    assert parameters == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


class _Weights(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes where the weights lie that the gated operator is given."""

    def __init__(self, seen: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.chipmunk.sparse_swiglu_in.default:
            self.seen.append(tuple(weight.untyped_storage().data_ptr() for weight in args[1:3]))
        return func(*args, **(kwargs or {}))


class Linear(nn.Linear):
    """As a LoRA layer: another class, of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


def _subclass(mlp: Any) -> None:
    mlp.fc1.__class__ = Linear


def _hook(mlp: Any) -> None:
    mlp.drop.register_forward_hook(lambda module, args, output: output * 1.1)


def _train(mlp: Any) -> None:
    mlp.drop.train()
    mlp.drop.p = 1.0


def _other_class(mlp: Any) -> None:
    mlp.__class__ = type("Scaled", (Mlp,), {"forward": lambda self, x: 2 * Mlp.forward(self, x)})


def _other_activation(mlp: Any) -> None:
    mlp.act = nn.SiLU()


def _own_forward(mlp: Any) -> None:
    mlp.forward = lambda x: 3 * Mlp.forward(mlp, x)


def _without(mlp: Any) -> None:
    mlp.first, mlp.fc1 = mlp.fc1, None
    mlp.forward = lambda x: mlp.fc2(mlp.first(x).tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_subclass, "the linear layer is a test_runtime_mlp_forms.Linear"),
        (_hook, "a hook watches or changes the MLP"),
        (_train, "dropout is active in the MLP"),
        (_other_class, "the MLP holds a Scaled, which is not understood"),
        (_other_activation, "the activation is a SiLU that is not understood"),
        (_own_forward, "a hook watches or changes the MLP"),
        (_without, "the MLP has lost a part that the patch has seen"),
    ],
)
@torch.no_grad()
def test_an_mlp_that_was_changed_runs_dense(change: Callable[[Any], None], reason: str) -> None:
    model, given = model_of("its own class", "separate projections, MLP first"), inputs(6, 7)
    for block in model.double_blocks:
        change(block.img_mlp)
    dense = denoise(model, 3, **given)
    patch(model)
    chipmunk.enable(model, small(min_steps=1, attn__is_enabled=False, patchify__is_enabled=False))
    for block in model.single_blocks:
        block.proj_mlp.__class__ = Linear
    expected = denoise(model, 3, **given)
    layers = chipmunk.statistics(model).layers
    assert layers[1].mlp["main"].dense == {reason: 3}
    assert layers[3].mlp["main"].dense == {"the linear layer is a test_runtime_mlp_forms.Linear": 3}
    chipmunk.disable(model)
    assert same(expected, denoise(model, 3, **given))
    for block in model.single_blocks:
        block.proj_mlp.__class__ = nn.Linear
    assert same(denoise(model, 3, **given), dense)


@pytest.mark.parametrize("single", list(SINGLES))
@torch.no_grad()
def test_a_second_linear_that_changes_between_steps(single: str) -> None:
    """The sparse step finds it out at its end, when the activations are known to it alone."""
    model, given = model_of("SwiGLU", single), inputs(6, 7)
    patch(model)

    def wrap(step: int) -> None:
        for block in model.single_blocks:
            block.linear2.__class__ = Linear if step == 2 else nn.Linear

    dense = denoise(model, 5, each=wrap, **given)
    chipmunk.enable(model, small(min_steps=1, mlp__top_keys=1.0, attn__is_enabled=False))
    assert error(denoise(model, 5, each=wrap, **given), dense) < 1e-5
    counts = chipmunk.statistics(model).layers[3].mlp["main"]
    assert counts.dense == {"the linear layer is a test_runtime_mlp_forms.Linear": 1}
    assert (counts.full, counts.sparse) == (2, 2)


@torch.no_grad()
def test_an_activation_that_is_not_understood_is_found_between_the_linears() -> None:
    model, given = model_of("SwiGLU", "a variable whose shape is asked, SwiGLU"), inputs(6, 7)
    dense = denoise(model, 3, **given)
    patch(model)
    for block in model.single_blocks:
        block.gate.act = nn.Tanh()
    changed = denoise(model, 3, **given)
    assert not same(changed, dense)
    chipmunk.enable(model, small(min_steps=1, attn__is_enabled=False, mlp__top_keys=1.0))
    assert error(denoise(model, 3, **given), changed) < 1e-5
    reason = "the activation is a Gate that is not understood"
    assert chipmunk.statistics(model).layers[3].mlp["main"].dense == {reason: 3}


@torch.no_grad()
def test_rounding_keeps_every_neuron() -> None:
    model = model_of("SwiGLU", "separate projections, MLP first")
    patch(model)
    chipmunk.enable(model, small(min_steps=1, mlp__counts_multiple_of=2 * HIDDEN))
    denoise(model, 3, **inputs(6, 7))
    for layer in chipmunk.statistics(model).layers[1:]:
        assert layer.mlp["main"].dense == {"rounding keeps every neuron": 3}
