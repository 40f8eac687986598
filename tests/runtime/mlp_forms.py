"""MLPs of every form that the patches know: each pair of functions is the code as it was, and as it is patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from flux_model import DoubleBlock, Flux, SingleBlock, attention, build, heads
from torch import Tensor, nn
from torch.nn import functional

import chipmunk
from chipmunk.rewrite.plan import BlockFacts, ModelFacts

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
