"""The first linear of a SwiGLU MLP and its gate, at the neurons that each group of rows keeps."""

from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.sparse_swiglu_in import reference

_NAME = "sparse_swiglu_in"


def sparse_swiglu_in(
    x: Tensor,
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
    implementation: str = "auto",
) -> Tensor:
    """How the gated activations at the kept neurons changed; `act_cache` takes the new ones.

    x: (B, N, C). gate, value: (F, C), the two rows of each neuron, often the halves of one parameter, in either order;
    gate_bias, value_bias: (F), or None both. indices: (B, ceil(N / group), K) int32, ascending: the neurons of each
    group of rows of a batch element. act_cache: (B, N, F), mutated. Returns delta (B, N, K), dtype of x, contiguous:
    `silu(x gateᵀ + gate_bias) · (x valueᵀ + value_bias) − act_cache` at the kept neurons.
    """
    result: Tensor = _operator(x, gate, value, gate_bias, value_bias, indices, act_cache, group, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor x, Tensor gate, Tensor value, Tensor? gate_bias, Tensor? value_bias, Tensor indices, "
    "Tensor(a!) act_cache, SymInt group, str implementation) -> Tensor",
)
def _operator(x, gate, value, gate_bias, value_bias, indices, act_cache, group, implementation):  # type: ignore[no-untyped-def]
    args = (x, gate, value, gate_bias, value_bias, indices, act_cache, group)
    return dispatch.call(_NAME, implementation, reference.sparse_swiglu_in, _expect, *args)


def _expect(x, gate, value, gate_bias, value_bias, indices, act_cache, group):  # type: ignore[no-untyped-def]
    dispatch.check(x.dim() == 3, _NAME, "x must be (B, N, C)")
    batch, rows, width = x.shape
    dispatch.check(gate.dim() == 2 and gate.shape[1] == width, _NAME, f"the gate's weight must be (F, {width})")
    dispatch.check(value.shape == gate.shape, _NAME, "gate and value must have one shape")
    neurons, groups = gate.shape[0], dispatch.groups_of(rows, group)
    dispatch.check((gate_bias is None) == (value_bias is None), _NAME, "gate and value must both have a bias, or none")
    for bias in (gate_bias, value_bias):
        dispatch.check(bias is None or bias.shape == (neurons,), _NAME, f"a bias must be ({neurons})")
    dispatch.check(act_cache.shape == (batch, rows, neurons), _NAME, f"the cache must be {(batch, rows, neurons)}")
    dispatch.check(indices.shape[:-1] == (batch, groups), _NAME, f"indices must be ({batch}, {groups}, K)")


@register.fake(_NAME)
def _(x, gate, value, gate_bias, value_bias, indices, act_cache, group, implementation):  # type: ignore[no-untyped-def]
    args = (x, gate, value, gate_bias, value_bias, indices, act_cache, group)
    dispatch.prepare(_NAME, implementation, *args)
    return x.new_empty(x.shape[0], x.shape[1], indices.shape[-1])
