"""Floating-point operations of dense and sparse model calls, counted from shapes and from what each layer kept.

A multiply-add counts as two operations; only matrix products are counted, as is usual. Pure functions: nothing here
runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the two parts of one layer that can run sparse; zeros where a part cannot."""

    batch: int = 0
    tokens: int = 0
    """Rows of the joint sequence, text and image."""
    width: int = 0
    """Heads times head dimension."""
    rows: int = 0
    """Rows that pass through the MLP: image tokens in a double block, all tokens in a single one."""
    channels: int = 0
    neurons: int = 0
    rows_per_neuron: int = 1
    """Rows of the first linear's weight that belong to one neuron: 2 where the activation is gated."""


@dataclass(frozen=True)
class LayerCall:
    """What one layer did in one model call."""

    attention: str = "dense"
    """`dense`, `full` (dense, and the caches are made anew) or `sparse`."""
    keys: int = 0
    """Keys kept by each query group, where attention is full or sparse."""
    selects_keys: bool = False
    mlp: str = "dense"
    neurons: int = 0
    """Neurons kept by each group of rows, where the MLP is sparse."""
    selects_neurons: bool = False
    means: int = 0
    """Rows of the block means: groups times parts."""


DENSE = LayerCall()


def attention(shape: LayerShape, call: LayerCall = DENSE) -> int:
    """Operations of the two products of attention.

    A full step adds the sparse attention that its cached difference needs, and, where it selects, the second product of
    queries and keys that the column sums need.
    """
    pair = 2 * shape.batch * shape.tokens * shape.width  # one of the two products, for each key
    sparse = 2 * pair * call.keys
    if call.attention == "sparse":
        return sparse
    dense = 2 * pair * shape.tokens
    if call.attention == "full":
        return dense + sparse + (pair * shape.tokens if call.selects_keys else 0)
    return dense


def mlp(shape: LayerShape, call: LayerCall = DENSE) -> int:
    """Operations of the two linear layers of an MLP; block means are pushed through the first on a full step, and where
    neurons are selected."""
    row = 2 * shape.batch * shape.channels  # a row of the input and one of a weight
    means = row * call.means * shape.neurons * shape.rows_per_neuron
    neuron = row * shape.rows * (shape.rows_per_neuron + 1)  # in through the first linear, out through the second
    if call.mlp == "sparse":
        return neuron * call.neurons + (means if call.selects_neurons else 0)
    return neuron * shape.neurons + (means if call.mlp == "full" else 0)


@dataclass(frozen=True)
class ModelCost:
    """Operations of one dense model call, apart for what can run sparse, the rest of each block, and all else."""

    layers: tuple[LayerShape, ...]
    """Double blocks, then single blocks."""
    blocks: tuple[int, ...]
    """Operations of each whole block, dense."""
    outside: int
    """Operations outside of the blocks: they are spent on skipped steps too."""

    @property
    def dense(self) -> int:
        """One dense model call."""
        return self.outside + sum(self.blocks)

    @property
    def dense_sparsifiable(self) -> int:
        """What of it can run sparse."""
        return sum(attention(shape) + mlp(shape) for shape in self.layers)

    def sparsifiable(self, calls: Mapping[int, LayerCall]) -> int:
        """What the parts that can run sparse cost in a model call in which the layers `calls` ran, by index."""
        return sum(attention(self.layers[index], call) + mlp(self.layers[index], call) for index, call in calls.items())

    def whole(self, calls: Mapping[int, LayerCall]) -> int:
        """What a model call costs in which the layers `calls` ran; on a skipped step there are none."""
        rest = sum(self.blocks[i] - attention(self.layers[i]) - mlp(self.layers[i]) for i in calls)
        return self.outside + rest + self.sparsifiable(calls)


def kind(calls: Mapping[int, LayerCall]) -> str:
    """What a model call was, in words: of attention and MLP of its most sparse layers."""
    if not calls:
        return "skipped"
    attention_kind, mlp_kind = (
        min((getattr(call, part) for call in calls.values()), key=_ORDER.index) for part in ("attention", "mlp")
    )
    return f"{attention_kind}/{mlp_kind}"


_ORDER: Sequence[str] = ("sparse", "full", "dense")
