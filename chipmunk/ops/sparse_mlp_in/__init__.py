"""The first linear of an MLP and its activation, at the neurons that each group of rows keeps."""

from torch import Tensor

from chipmunk.ops import dispatch, register
from chipmunk.ops.sparse_mlp_in import reference

_NAME = "sparse_mlp_in"
ACTIVATIONS = ("gelu_tanh", "gelu")


def sparse_mlp_in(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    act_cache: Tensor,
    group: int,
    activation: str,
    implementation: str = "auto",
) -> Tensor:
    """How the activations at the kept neurons changed; `act_cache` takes the new ones.

    x: (B, N, C). weight: (F, C) and bias: (F) or None, often views of a larger parameter. indices:
    (B, ceil(N / group), K) int32, ascending: the neurons of each group of rows of a batch element. act_cache:
    (B, N, F), mutated. activation: `gelu_tanh` or `gelu`. Returns delta (B, N, K), dtype of x, contiguous:
    `act(x weightᵀ + bias) − act_cache` at the kept neurons.
    """
    result: Tensor = _operator(x, weight, bias, indices, act_cache, group, activation, implementation)
    return result


@register.operator(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor indices, Tensor(a!) act_cache, SymInt group, "
    "str activation, str implementation) -> Tensor",
)
def _operator(x, weight, bias, indices, act_cache, group, activation, implementation):  # type: ignore[no-untyped-def]
    args = (x, weight, bias, indices, act_cache, group, activation)
    return dispatch.call(_NAME, implementation, reference.sparse_mlp_in, _expect, *args)


def _expect(x, weight, bias, indices, act_cache, group, activation):  # type: ignore[no-untyped-def]
    dispatch.check(x.dim() == 3, _NAME, "x must be (B, N, C)")
    batch, rows, width = x.shape
    dispatch.check(weight.dim() == 2 and weight.shape[1] == width, _NAME, f"the weight must be (F, {width})")
    neurons, groups = weight.shape[0], dispatch.groups_of(rows, group)
    dispatch.check(bias is None or bias.shape == (neurons,), _NAME, f"the bias must be ({neurons})")
    dispatch.check(act_cache.shape == (batch, rows, neurons), _NAME, f"the cache must be {(batch, rows, neurons)}")
    dispatch.check(indices.shape[:-1] == (batch, groups), _NAME, f"indices must be ({batch}, {groups}, K)")
    dispatch.check(activation in ACTIVATIONS, _NAME, f"activation must be one of {', '.join(ACTIVATIONS)}")


@register.fake(_NAME)
def _(x, weight, bias, indices, act_cache, group, activation, implementation):  # type: ignore[no-untyped-def]
    dispatch.prepare(_NAME, implementation, x, weight, bias, indices, act_cache, group, activation)
    return x.new_empty(x.shape[0], x.shape[1], indices.shape[-1])
