"""The MLPs of both kinds of block: calls that stand where the code had its linear layers.

`mlp` is a whole MLP. In single blocks an MLP comes in pieces, with the attention between them: a first linear
(`split_linear`, `mlp_linear`, or `held_linear` and `split_held`), perhaps `activate` or `gated`, and `cat_linear` or
`out_linear` at the end. On a sparse step, what passes between the pieces is how the chosen activations changed,
(B, N, K), which only they can use; up to a SwiGLU's activation it is a tensor of the dense shape that holds nothing.

Everywhere, `block` is the block, or what `chipmunk.layer` handed down from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chipmunk.runtime import linears
from chipmunk.runtime.layer_state import DONE, LayerState, state_of
from chipmunk.runtime.linears import (
    GATED,
    activation_name,
    gate_name,
    mlp_form,
    why_not_linear,
    why_not_pair,
)
from chipmunk.runtime.mlp_caches import (
    Rows,
    by_neuron,
    changed_activations,
    means_through,
    updated_output,
    why_dense,
    why_everything,
)

Block = nn.Module | LayerState | None
Activation = Callable[[Tensor], Tensor] | str | None


def mlp(block: Block, module: Any, x: Tensor, *, parts: str = "", of: str = "") -> Tensor:
    """`module(x)` for the image MLP of a double block, or its sparse form. x: (B, N, C). Never a cache's storage.

    parts, of: where the two linears and the activation are in an MLP of the repository's own class, and the names of
    the classes in which the patch has read that (see `linears.mlp_form`).
    """
    state = state_of(block)
    if state is None:
        out: Tensor = module(x)
        return out
    if state.mlp_done is not None:  # another MLP of the block has been here: its caches are not this one's
        out = module(x)
        return out
    form = mlp_form(module, x, parts, of)
    reason = form if isinstance(form, str) else why_dense(state, x) or why_everything(state, form.neurons)
    if isinstance(form, str) or reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        out = module(x)
        return out

    state.mlp_done = DONE
    rows, second = Rows.of(*form.first), form.second
    if state.mlp == "full":
        state.means = means_through(state, x, rows)
        activations = form.activated(x)
        out = second(activations)
        state.activations, state.output = by_neuron(activations), out.clone()
        return out
    delta = changed_activations(state, x, rows, form.activation)
    return updated_output(state, delta, second.weight).clone()


def split_linear(
    block: Block, linear: Any, x: Tensor, sizes: Sequence[int], *, mlp_first: bool = False, gated: bool = False
) -> Sequence[Tensor]:
    """`torch.split(linear(x), sizes, dim=-1)`, or its sparse form, for the first linear of a single block.

    x: (B, N, C). sizes: columns of the parts, of which the last is the MLP's, the first with `mlp_first`; −1 is the
    rest, or an equal part of it, as `torch.chunk` makes them. gated: the last two are, or the first two, and the
    product of the one's activation and the other comes next.
    """
    state = state_of(block)
    if state is None or _begun(state, linear, x) == "dense":
        return _split(linear(x), sizes)
    return _split_sparsely(state, linear, x, sizes, mlp_first, gated, None)


def held_linear(block: Block, linear: Any, x: Tensor) -> Tensor:
    """`linear(x)` where the result is held in a variable until `split_held` cuts it. x: (B, N, C).

    On a sparse step a tensor of the result's shape that takes no memory and holds nothing: it can be asked its shape.
    """
    state = state_of(block)
    if state is None or _begun(state, linear, x) == "dense":
        out: Tensor = linear(x)
        return out
    state.held = (linear, x)
    if state.single_mlp == "full":
        out = linear(x)
        return out
    return _nothing(x, linear.weight.shape[0])


def split_held(
    block: Block, held: Tensor, sizes: Sequence[int], *, mlp_first: bool = False, gated: bool = False
) -> Sequence[Tensor]:
    """`torch.split(held, sizes, dim=-1)` of what `held_linear` gave, or its sparse form. Arguments: see there."""
    state = state_of(block)
    if state is None or state.held is None or state.single_mlp == "dense":
        return _split(held, sizes)
    (linear, x), state.held = state.held, None
    return _split_sparsely(state, linear, x, sizes, mlp_first, gated, held)


def mlp_linear(block: Block, linear: Any, x: Tensor, *, half: str = "") -> Tensor:
    """`linear(x)`, or its sparse form, for a first linear that makes nothing but the MLP's input.

    x: (B, N, C). half: `gate` or `value`, where each has a linear of its own; `gated` brings them together.
    """
    state = state_of(block)
    if state is not None and half:
        begun = state.gate is not None or state.value is not None
        kind = state.single_mlp if begun else _begun(state, linear, x)
        if half == "gate":
            state.gate = (linear, x)
        else:
            state.value = (linear, x)
        out: Tensor = _nothing(x, 1) if kind == "sparse" else linear(x)
        return out
    if state is None or _begun(state, linear, x) == "dense":
        out = linear(x)
        return out
    rows = Rows.of(linear)
    if state.single_mlp == "full":
        state.means = means_through(state, x, rows)
        out = linear(x)
        return out
    return _passed_on(state, x, rows)


def activate(block: Block, activation: Activation, hidden: Tensor, *, kind: str = "", of: str = "") -> Tensor:
    """`activation(hidden)` between the linears of a single block; nothing on a sparse step, which has done it already.

    activation: the module, or the name of a function (`gelu_tanh`, `gelu`). kind, of: what the patch has read in an
    activation of the repository's own classes (see `linears.activation_name`).
    """
    state = state_of(block)
    if state is None or state.single_mlp == "dense":
        return _applied(activation, hidden)
    if state.single_mlp == "sparse":
        return _taken(state, hidden)
    name = activation_name(activation, kind, of)
    if name is None:
        state.mlp_done, state.single_mlp = _not_understood(activation), "dense"
    else:
        state.activation = name
    return _applied(activation, hidden)


def gated(
    block: Block, activation: Callable[[Tensor], Tensor], gate: Tensor, value: Tensor, *, value_first: bool = False
) -> Tensor:
    """`activation(gate) * value`, or its sparse form, between the linears of a SwiGLU MLP. Returns (B, N, F).

    gate, value: (B, N, F), the halves of what the first linear gave, cut off as views, or the outputs of two linears.
    value_first: the value's half comes first.
    """
    state = state_of(block)
    if state is None:
        return activation(gate) * value
    pair, state.gate, state.value = (state.gate, state.value), None, None
    kind = state.single_mlp
    if kind == "dense":
        return activation(gate) * value
    is_pair = pair[0] is not None or pair[1] is not None
    name = gate_name(activation, value_first and not is_pair) if kind == "full" else state.activation
    if name is None:
        state.mlp_done, state.single_mlp = _not_understood(activation), "dense"
        return activation(gate) * value
    state.activation = name
    if not is_pair:
        return activation(gate) * value if kind == "full" else _taken(state, gate)
    rows = _rows_of_pair(*pair)
    if isinstance(rows, str):
        state.mlp_done, state.single_mlp = rows, "dense"
        if kind == "sparse":  # what was not computed yet
            gate = gate if pair[0] is None else pair[0][0](pair[0][1])
            value = value if pair[1] is None else pair[1][0](pair[1][1])
        return activation(gate) * value
    assert pair[0] is not None
    x = pair[0][1]
    if kind == "sparse":
        return changed_activations(state, x, rows, name)
    state.means = means_through(state, x, rows)
    return activation(gate) * value


def cat_linear(
    block: Block,
    linear: Any,
    attended: Tensor,
    activation: Activation,
    mlp: Tensor,
    *,
    kind: str = "",
    of: str = "",
    mlp_first: bool = False,
) -> Tensor:
    """`linear(torch.cat((attended, activation(mlp)), dim=-1))`, or its sparse form, for the second linear.

    attended: (B, N, C), the attention's output. mlp: what the first linear gave. activation: None after `activate`;
    else it, `kind` and `of` are as there. mlp_first: the two are concatenated the other way round. Returns (B, N, C),
    never a cache.
    """
    state = state_of(block)
    if state is None or state.single_mlp == "dense":
        out: Tensor = linear(_joined(attended, _applied(activation, mlp), mlp_first))
        return out
    step, state.single_mlp = state.single_mlp, "dense"
    width = attended.shape[-1]
    if step == "full":
        activations = _applied(activation, mlp)
        name = state.activation if activation is None else activation_name(activation, kind, of)
        reason = _not_understood(activation) if name is None else _why_not_second(state, linear, attended, activations)
        if reason is not None or name is None:
            state.mlp_done = reason
            out = linear(_joined(attended, activations, mlp_first))
            return out
        state.activation = name
        weight, rest = _columns(linear.weight, width, mlp_first)
        state.output = functional.linear(activations, weight)
        state.activations = by_neuron(activations)
    else:
        assert state.activations is not None
        reason = why_not_linear(linear, attended, width + state.activations.shape[-1])
        if reason is not None:
            # The layer was changed since the full step; what it would be given is known all the same.
            state.mlp_done = reason
            out = linear(_joined(attended, state.activations, mlp_first))
            return out
        weight, rest = _columns(linear.weight, width, mlp_first)
        updated_output(state, _taken(state, mlp), weight)
    assert state.output is not None
    state.mlp_done = DONE
    return functional.linear(attended, rest, linear.bias) + state.output


def out_linear(block: Block, linear: Any, mlp: Tensor) -> Tensor:
    """`linear(mlp)`, or its sparse form, for a second linear that takes nothing but the activated part.

    mlp: (B, N, F), what `activate` or `gated` gave. Returns (B, N, C), never a cache.
    """
    state = state_of(block)
    if state is None or state.single_mlp == "dense":
        out: Tensor = linear(mlp)
        return out
    step, state.single_mlp = state.single_mlp, "dense"
    activations = mlp if step == "full" else state.activations
    assert activations is not None
    neurons = activations.shape[-1]
    reason = why_not_linear(linear, activations, neurons)
    if step == "full":
        reason = reason or why_everything(state, neurons)
    state.mlp_done = DONE if reason is None else reason
    if reason is not None or step == "full":
        out = linear(activations)
        if reason is None:
            state.activations, state.output = by_neuron(activations), out.clone()
        return out
    return updated_output(state, mlp, linear.weight).clone()


# The pieces of a single block's MLP


def _begun(state: LayerState, linear: Any, x: Tensor) -> str:
    """What a single block's MLP is to do in this call, `dense`, `full` or `sparse`, noted for the pieces after it."""
    if state.mlp_done is not None:  # another MLP of the block has been here: its caches are not this one's
        state.single_mlp = "dense"
        return "dense"
    reason = why_not_linear(linear, x, x.shape[-1])
    if reason is None:
        reason = "the input of the first linear is not (B, N, C)" if x.dim() != 3 else why_dense(state, x)
    if reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        state.single_mlp = "dense"
    else:
        state.single_mlp = state.mlp
    return state.single_mlp


def _split_sparsely(
    state: LayerState,
    linear: Any,
    x: Tensor,
    sizes: Sequence[int],
    mlp_first: bool,
    gated: bool,
    held: Tensor | None,
) -> Sequence[Tensor]:
    """The parts of a first linear's output on a full or sparse step. held: the output, where it is computed."""
    rows = linear.weight.shape[0]
    sizes = _resolved(sizes, rows)
    parts = 2 if gated else 1
    theirs = sizes[:parts] if mlp_first else sizes[-parts:]
    if len(sizes) <= parts or sum(sizes) != rows or len(set(theirs)) > 1:
        state.mlp_done, state.single_mlp = "the split of the linear layer is not understood", "dense"
        return torch.split(linear(x), sizes, dim=-1)
    cut = sum(theirs) if mlp_first else rows - sum(theirs)
    neurons, attention = (slice(cut), slice(cut, None)) if mlp_first else (slice(cut, None), slice(cut))
    mlp = Rows((linear.weight[neurons],), (None if linear.bias is None else linear.bias[neurons],))
    if state.single_mlp == "full":
        state.means = means_through(state, x, mlp)
        return torch.split(linear(x) if held is None else held, sizes, dim=-1)
    passed: Sequence[Tensor] = (_passed_on(state, x, mlp),)
    bias = None if linear.bias is None else linear.bias[attention]
    attended = functional.linear(x, linear.weight[attention], bias)
    others = torch.split(attended, sizes[parts:] if mlp_first else sizes[:-parts], dim=-1)
    passed = torch.split(passed[0], list(theirs), dim=-1) if gated else passed
    return (*passed, *others) if mlp_first else (*others, *passed)


def _split(whole: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return torch.split(whole, _resolved(sizes, whole.shape[-1]), dim=-1)


def _resolved(sizes: Sequence[int], width: int) -> list[int]:
    """The sizes with −1, the rest or an equal part of it, as a number."""
    shares = sum(size == -1 for size in sizes)
    rest = width - (sum(sizes) + shares)
    share = -(-rest // shares) if shares else 0  # rounded up, and what is left for the last one, as in `torch.chunk`
    resolved: list[int] = []
    for size in sizes:
        resolved.append(min(share, rest) if size == -1 else size)
        rest -= resolved[-1] if size == -1 else 0
    return resolved


def _applied(activation: Activation, hidden: Tensor) -> Tensor:
    if activation is None:
        return hidden
    return linears.activate(activation, hidden) if isinstance(activation, str) else activation(hidden)


def _joined(attended: Tensor, activations: Tensor, mlp_first: bool) -> Tensor:
    return torch.cat((activations, attended) if mlp_first else (attended, activations), dim=-1)


def _columns(weight: Tensor, width: int, mlp_first: bool) -> tuple[Tensor, Tensor]:
    """The columns of a second linear's weight that are the MLP's, and the `width` ones that are the attention's."""
    if mlp_first:
        return weight[:, :-width], weight[:, -width:]
    return weight[:, width:], weight[:, :width]


def _not_understood(activation: object) -> str:
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    return f"the activation is a {name} that is not understood"


def _why_not_second(state: LayerState, linear: Any, attended: Tensor, activations: Tensor) -> str | None:
    """Why the MLP whose first linear has run cannot be made sparse; asked where its number of neurons is known."""
    neurons = activations.shape[-1]
    return why_not_linear(linear, attended, attended.shape[-1] + neurons) or why_everything(state, neurons)


def _passed_on(state: LayerState, x: Tensor, rows: Rows) -> Tensor:
    """What a first linear gives on a sparse step: how the activations changed or, before a SwiGLU, nothing as wide."""
    delta = changed_activations(state, x, rows, state.activation)
    if state.activation not in GATED:
        return delta
    state.delta = delta
    return _nothing(x, rows.weights[0].shape[0])


def _taken(state: LayerState, given: Tensor) -> Tensor:
    """How the activations changed, which is held where `given` is nothing."""
    delta, state.delta = state.delta, None
    return given if delta is None else delta


def _nothing(x: Tensor, width: int) -> Tensor:
    """(B, N, width) that takes no memory and holds no values: it can be asked its shape, and cut."""
    return x.new_empty(1).expand(*x.shape[:-1], width)


def _rows_of_pair(gate: tuple[Any, Tensor] | None, value: tuple[Any, Tensor] | None) -> Rows | str:
    """The rows of a gate's and a value's linear, each with its input; why they are not one MLP's if they are not."""
    if gate is None or value is None or gate[1] is not value[1]:
        return "the gate and the value are not made from one input"
    for linear, x in (gate, value):
        reason = why_not_linear(linear, x, x.shape[-1])
        if reason is not None:
            return reason
    return why_not_pair(gate[0], value[0]) or Rows.of(gate[0], value[0])
