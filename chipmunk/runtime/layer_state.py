"""What the code of one block sees of Chipmunk during one model call, and what the layer remembers between calls.

A block may be compiled, so everything here is plain: compiled code reads the kind of this step, the rules and the
caches, and writes caches and what it did. It never reads a count, a step or a layer number: that would recompile it at
every step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chipmunk import config

ATTRIBUTE = "_chipmunk"
"""Where a block finds its state during a model call: in its `__dict__`, so never in the state_dict."""

DONE = "done"
"""Written by a part that did what was planned; anything else that it writes is the reason for which it ran dense."""


@dataclass(frozen=True)
class AttentionRules:
    """The numbers of `attn` that the computation needs."""

    group: int
    top_keys: float
    random_keys: float
    multiple: int

    @classmethod
    def of(cls, attn: config.Attention) -> AttentionRules:
        return cls(attn.mbm, attn.top_keys, attn.random_keys, attn.counts_multiple_of)

    def kept(self, tokens: int) -> tuple[int, int]:
        """How many of `tokens` keys are kept for their column sum, and how many more at random."""
        if self.top_keys >= 1:
            return tokens, 0
        keep = math.floor(self.top_keys * tokens / self.multiple + 0.5) * self.multiple
        keep = min(max(keep, min(self.multiple, tokens)), tokens)
        return keep, min(math.floor(self.random_keys * tokens + 0.5), tokens - keep)


@dataclass(frozen=True)
class MlpRules:
    """The numbers of `mlp` that the computation needs."""

    group: int
    part: int
    top_keys: float
    random_keys: float
    multiple: int

    @classmethod
    def of(cls, mlp: config.Mlp) -> MlpRules:
        return cls(mlp.bm, mlp.mbm, mlp.top_keys, mlp.random_keys, mlp.counts_multiple_of)

    def kept(self, neurons: int) -> tuple[int, int]:
        """How many of `neurons` are kept for their score, and how many more at random."""
        if self.top_keys >= 1:
            return neurons, 0
        total = math.ceil((self.top_keys + self.random_keys) * neurons / self.multiple) * self.multiple
        total = min(max(total, 1), neurons)
        random = min(math.floor(self.random_keys * neurons), total - 1)
        return total - random, random


class LayerState:
    """One layer in one call slot of one generation."""

    def __init__(self, attention_rules: AttentionRules, mlp_rules: MlpRules, implementation: str) -> None:
        self.attention_rules = attention_rules
        self.mlp_rules = mlp_rules
        self.implementation = implementation
        self.thread = 0
        """Which thread's call of the model is running."""

        # The plan for this call, written by the session.
        self.attention = "dense"
        """`dense`, `full` (dense, and the caches are made anew) or `sparse`."""
        self.mlp = "dense"
        self.select_keys = False
        self.select_neurons = False
        self.attention_seed: Tensor | None = None
        """3 × int64 on the model's device: own count, layer, 0."""
        self.mlp_seed: Tensor | None = None

        # What came of it, written by the block's code.
        self.attention_done: str | None = None
        self.mlp_done: str | None = None
        self.single_mlp = "dense"
        """What the first piece of a single block's MLP did, for the other pieces in the same call."""
        self.held: tuple[nn.Module, Tensor] | None = None
        """The linear and its input, between `held_linear` and `split_held`."""
        self.gate: tuple[nn.Module, Tensor] | None = None
        """A linear that makes the gate alone, and its input, up to `gated`; `value` likewise."""
        self.value: tuple[nn.Module, Tensor] | None = None
        self.delta: Tensor | None = None
        """How the chosen activations changed, where what is passed on stands for the halves of a SwiGLU."""

        # Caches.
        self.keys: Tensor | None = None
        """(B, H, G, K) int32"""
        self.difference: Tensor | None = None
        """dense − sparse of the last full step, (B, H, N, D)."""
        self.neurons: Tensor | None = None
        """(B, G, K) int32"""
        self.activations: Tensor | None = None
        """(B, N, F), stored by neuron: the sparse steps gather neurons."""
        self.output: Tensor | None = None
        """(B, N, C); in a single block the MLP's part of linear2, without bias."""
        self.means: Tensor | None = None
        """fc1 of the mean input of each part of each group of rows, (B, G, parts, F), 2F with two rows a neuron."""
        self.activation = ""
        """Of a single block: its name (see `linears`), found on the full step."""

        # Own counts: calls that reached this layer, and calls on which the whole model was skipped. Only the session
        # reads them.
        self.attention_count = 0
        self.mlp_count = 0
        self.attention_overdue = False
        """Whether a full step was among the skipped ones since the last that ran."""
        self.mlp_overdue = False
        self.neurons_are_fresh = False
        """Whether neurons were selected since the last full step."""

    def forget_attention(self) -> None:
        """Start the attention over: the next call is the first one."""
        self.attention_count = 0
        self.attention_overdue = False
        self.keys = self.difference = None

    def forget_mlp(self) -> None:
        """Start the MLP over: the next call is the first one."""
        self.mlp_count = 0
        self.mlp_overdue = False
        self.neurons = self.activations = self.output = self.means = None
        self.held = self.gate = self.value = self.delta = None
        self.neurons_are_fresh = False

    def forget(self) -> None:
        """Free all caches, even where an exception's traceback still holds this object."""
        self.forget_attention()
        self.forget_mlp()
        self.attention_seed = self.mlp_seed = None

    def caches(self) -> Iterator[Tensor]:
        """All cache tensors that are held now."""
        for cache in (self.keys, self.difference, self.neurons, self.activations, self.output, self.means):
            if cache is not None:
                yield cache

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a block carries no state."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def state_of(block: nn.Module | LayerState | None) -> LayerState | None:
    """The state that the session gave to `block` for the call that is running; None while Chipmunk is off.

    What was handed down from the block as its state is returned as it is.
    """
    if block is None or isinstance(block, LayerState):
        return block
    # getattr, not __dict__: Dynamo guards on the absence of an attribute, but not on that of a key.
    state: LayerState | None = getattr(block, ATTRIBUTE, None)
    if state is not None and not torch.compiler.is_compiling() and state.thread != threading.get_ident():
        return None  # the block is run by another thread too, by itself or as another model's
    if state is not None and torch.is_grad_enabled() and state.single_mlp == "dense":
        # Turned on inside the model. What has begun sparse must end so: the second half of a single block's MLP.
        state.attention_done = state.mlp_done = "autograd is on"
        return None
    return state
