"""The MLPs of both kinds of block: calls that stand where the code had its linear layers.

`mlp` is a whole MLP. In single blocks an MLP comes in pieces, with the attention between them: a first linear
(`split_linear`, `mlp_linear`, or `held_linear` and `split_held`), perhaps `activate`, and `cat_linear` at the end. On a
sparse step, what passes between the pieces is how the chosen activations changed, (B, N, K), which only they can use.

Everywhere, `block` is the block, or what `chipmunk.layer` handed down from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from chipmunk import ops
from chipmunk.ops.dispatch import groups_of
from chipmunk.runtime import linears
from chipmunk.runtime.layer_state import DONE, LayerState, state_of
from chipmunk.runtime.linears import GATED, activation_name, mlp_form, rows_per_neuron, why_not_linear

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
    form = mlp_form(module, x, parts, of)
    reason = form if isinstance(form, str) else _why_dense(state, x) or _why_everything(state, form.neurons)
    if isinstance(form, str) or reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        out = module(x)
        return out

    first, activation, second = form
    state.mlp_done = DONE
    if state.mlp == "full":
        state.means = _means_through(state, x, first.weight, first.bias)
        activations = linears.activate(activation, first(x))
        out = second(activations)
        state.activations, state.output = _by_neuron(activations), out.clone()
        return out
    delta = _changed_activations(state, x, first.weight, first.bias, activation)
    return _updated_output(state, delta, second.weight).clone()


def split_linear(
    block: Block, linear: Any, x: Tensor, sizes: Sequence[int], *, mlp_first: bool = False
) -> Sequence[Tensor]:
    """`torch.split(linear(x), sizes, dim=-1)`, or its sparse form, for the first linear of a single block.

    x: (B, N, C). sizes: columns of [attention, MLP], the other way round with `mlp_first`; −1 is the rest.
    """
    state = state_of(block)
    if state is None or _begun(state, linear, x) == "dense":
        return _split(linear(x), sizes)
    return _split_sparsely(state, linear, x, sizes, mlp_first, None)


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
    return x.new_empty(1).expand(*x.shape[:-1], linear.weight.shape[0])


def split_held(block: Block, held: Tensor, sizes: Sequence[int], *, mlp_first: bool = False) -> Sequence[Tensor]:
    """`torch.split(held, sizes, dim=-1)` of what `held_linear` gave, or its sparse form. Arguments: see there."""
    state = state_of(block)
    if state is None or state.held is None or state.single_mlp == "dense":
        return _split(held, sizes)
    (linear, x), state.held = state.held, None
    return _split_sparsely(state, linear, x, sizes, mlp_first, held)


def mlp_linear(block: Block, linear: Any, x: Tensor) -> Tensor:
    """`linear(x)`, or its sparse form, for a first linear of a single block that makes nothing but the MLP's input."""
    state = state_of(block)
    if state is None or _begun(state, linear, x) == "dense":
        out: Tensor = linear(x)
        return out
    if state.single_mlp == "full":
        state.means = _means_through(state, x, linear.weight, linear.bias)
        out = linear(x)
        return out
    return _changed_activations(state, x, linear.weight, linear.bias, state.activation)


def activate(block: Block, activation: Activation, hidden: Tensor, *, kind: str = "", of: str = "") -> Tensor:
    """`activation(hidden)` between the linears of a single block; nothing on a sparse step, which has done it already.

    activation: the module, or the name of a function (`gelu_tanh`, `gelu`). kind, of: what the patch has read in an
    activation of the repository's own classes (see `linears.activation_name`).
    """
    state = state_of(block)
    if state is None or state.single_mlp == "dense":
        return _applied(activation, hidden)
    if state.single_mlp == "sparse":
        return hidden
    name = activation_name(activation, kind, of)
    if name is None:
        state.mlp_done, state.single_mlp = _not_understood(activation), "dense"
    else:
        state.activation = name
    return _applied(activation, hidden)


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
        state.activations = _by_neuron(activations)
    else:
        assert state.activations is not None
        reason = why_not_linear(linear, attended, width + state.activations.shape[-1])
        if reason is not None:
            # The layer was changed since the full step; what it would be given is known all the same.
            state.mlp_done = reason
            out = linear(_joined(attended, state.activations, mlp_first))
            return out
        weight, rest = _columns(linear.weight, width, mlp_first)
        _updated_output(state, mlp, weight)
    assert state.output is not None
    state.mlp_done = DONE
    return functional.linear(attended, rest, linear.bias) + state.output


def part_means(x: Tensor, group: int, part: int) -> Tensor:
    """Means of x (B, N, C) over parts of `part` rows of groups of `group` rows: (B, groups, parts, C), dtype of x.

    Summed in float32 (float64 for float64). A part without rows, at the end of the last group, gives zero.
    """
    batch, rows, width = x.shape
    groups, parts = groups_of(rows, group), groups_of(group, part)
    missing = groups * group - rows
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
    padded = padded.reshape(batch, groups, group, width)
    if parts * part != group:
        padded = functional.pad(padded, (0, 0, 0, parts * part - group))
    sums = padded.reshape(batch, groups, parts, part, width).sum(dim=3, dtype=wide)
    ends = torch.arange(1, groups * parts + 1, device=x.device).reshape(groups, parts)
    index, number = (ends - 1) // parts, (ends - 1) % parts
    left = torch.clamp(rows - index * group, max=group) - number * part
    counts = torch.clamp(left, min=1, max=part)
    return (sums / counts[None, :, :, None]).to(x.dtype)


# The pieces of a single block's MLP


def _begun(state: LayerState, linear: Any, x: Tensor) -> str:
    """What a single block's MLP is to do in this call, `dense`, `full` or `sparse`, noted for the pieces after it."""
    reason = why_not_linear(linear, x, x.shape[-1])
    if reason is None:
        reason = "the input of the first linear is not (B, N, C)" if x.dim() != 3 else _why_dense(state, x)
    if reason is not None or state.mlp == "dense":
        state.mlp_done = DONE if reason is None else reason
        state.single_mlp = "dense"
    else:
        state.single_mlp = state.mlp
    return state.single_mlp


def _split_sparsely(
    state: LayerState, linear: Any, x: Tensor, sizes: Sequence[int], mlp_first: bool, held: Tensor | None
) -> Sequence[Tensor]:
    """Both parts of a first linear's output on a full or sparse step. held: the output, where it is computed."""
    rows = linear.weight.shape[0]
    sizes = _resolved(sizes, rows)
    if len(sizes) != 2 or sum(sizes) != rows:
        state.mlp_done, state.single_mlp = "the split of the linear layer is not understood", "dense"
        return torch.split(linear(x), sizes, dim=-1)
    neurons = slice(sizes[0]) if mlp_first else slice(sizes[0], None)
    attention = slice(sizes[0], None) if mlp_first else slice(sizes[0])
    bias = None if linear.bias is None else linear.bias[neurons]
    if state.single_mlp == "full":
        state.means = _means_through(state, x, linear.weight[neurons], bias)
        return torch.split(linear(x) if held is None else held, sizes, dim=-1)
    delta = _changed_activations(state, x, linear.weight[neurons], bias, state.activation)
    bias = None if linear.bias is None else linear.bias[attention]
    attended = functional.linear(x, linear.weight[attention], bias)
    return (delta, attended) if mlp_first else (attended, delta)


def _split(whole: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return torch.split(whole, _resolved(sizes, whole.shape[-1]), dim=-1)


def _resolved(sizes: Sequence[int], width: int) -> list[int]:
    """The sizes with −1, the rest, as a number."""
    return [width - (sum(sizes) + 1) if size == -1 else size for size in sizes]


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
    name = activation if isinstance(activation, str) else type(activation).__name__
    return f"the activation is a {name} that is not understood"


def _why_not_second(state: LayerState, linear: Any, attended: Tensor, activations: Tensor) -> str | None:
    """Why the MLP whose first linear has run cannot be made sparse; asked where its number of neurons is known."""
    neurons = activations.shape[-1]
    return why_not_linear(linear, attended, attended.shape[-1] + neurons) or _why_everything(state, neurons)


# What all MLPs share


def _by_neuron(activations: Tensor) -> Tensor:
    """A copy of (B, N, F) in which the values of one neuron lie together."""
    return activations.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _means_through(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The block means: fc1 of the mean input, (B, groups, parts, rows of fc1)."""
    return functional.linear(part_means(x, state.mlp_rules.group, state.mlp_rules.part), weight, bias)


def _changed_activations(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """How the activations at the chosen neurons changed, (B, N, K); selects neurons first where this step is to."""
    rules, implementation = state.mlp_rules, state.implementation
    assert state.activations is not None
    if state.select_neurons:
        _select(state, x, weight, bias, weight.shape[0] // rows_per_neuron(activation))
    assert state.neurons is not None
    if activation not in GATED:
        cache = state.activations
        return ops.sparse_mlp_in(x, weight, bias, state.neurons, cache, rules.group, activation, implementation)
    halves = weight.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    gate, value = GATED[activation], 1 - GATED[activation]
    rows = (halves[gate], halves[value], biases[gate], biases[value])
    return ops.sparse_swiglu_in(x, *rows, state.neurons, state.activations, rules.group, implementation)


def _select(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None, neurons: int) -> None:
    """Choose the neurons whose block means changed most, and refresh their means."""
    assert state.means is not None
    assert state.mlp_seed is not None
    keep, random = state.mlp_rules.kept(neurons)
    new = _means_through(state, x, weight, bias)
    state.neurons = ops.select_neurons(new, state.means, state.mlp_seed, neurons, keep, random, state.implementation)


def _updated_output(state: LayerState, delta: Tensor, weight: Tensor) -> Tensor:
    """The output cache, with what the changed activations add to it."""
    assert state.neurons is not None
    assert state.output is not None
    ops.sparse_mlp_out(delta, weight, state.neurons, state.output, state.mlp_rules.group, state.implementation)
    return state.output


def _why_dense(state: LayerState, x: Tensor) -> str | None:
    """Why an MLP on these rows is faster, or only possible, dense."""
    if groups_of(x.shape[1], state.mlp_rules.group) < 2:
        return "fewer than two groups of rows"
    if state.mlp == "sparse" and (state.activations is None or state.activations.shape[:2] != x.shape[:2]):
        return "the number of tokens changed"
    return None


def _why_everything(state: LayerState, neurons: int) -> str | None:
    """Why an MLP of so many neurons has nothing to leave out, or is not the one whose caches are held."""
    rules = state.mlp_rules
    if rules.top_keys < 1 and sum(rules.kept(neurons)) >= neurons:
        return "rounding keeps every neuron"
    if state.mlp == "sparse" and state.activations is not None and state.activations.shape[-1] != neurons:
        return "the number of neurons changed"
    return None
