"""Where the oracle takes hold of a model: its forward, its blocks, their joint attention and their MLPs.

What happens in these places is the `Listener`'s business; how a model is built is this file's, from its facts.

- attention: the block's call of `scaled_dot_product_attention` is intercepted, wherever the repository makes it;
- MLP: the linear layers are hooked. The input of the last one holds the activation of *every* neuron.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from operator import attrgetter
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.oracle.attention import DenseAttention
from chipmunk.verify.oracle.mlp import DenseMlp


class Listener(Protocol):
    """What is told of each model call, and may put another result into a place."""

    @property
    def corrects(self) -> bool:
        """Whether the layers of this call are handed to `attention` and `mlp`."""

    def before_model(self, arguments: inspect.BoundArguments) -> None:
        """May change the arguments."""

    def after_model(self, arguments: inspect.BoundArguments, output: Any) -> Any:
        """The output to return."""

    def before_block(self, layer: int, streams: Sequence[Tensor]) -> None:
        """`streams`: the sequences (B, N, C) that enter the block."""

    def after_block(self, layer: int, output: Any) -> Any:
        """Another output of the block, or None."""

    def attention(self, layer: int, dense: DenseAttention) -> Tensor:
        """The output of a block's joint attention, (B, H, N, D)."""

    def masked(self, layer: int) -> None:
        """A block's joint attention was asked for with a mask: it is left as it is."""

    def mlp(self, layer: int, dense: DenseMlp) -> Tensor | None:
        """Another output of a block's MLP, or None."""


class Hooks:
    """What is put onto a model while the `with` block lasts."""

    def __init__(self, model: nn.Module, facts: ModelFacts, listener: Listener) -> None:
        self.model = model
        self.facts = facts
        self.listener = listener
        self.layer: int | None = None
        """The block that is running."""
        self.joint_tokens: set[int] = set()
        """How many tokens the joint attention of this block may have, and below: of the last double block."""
        self._pair_tokens: set[int] = set()
        self._mlp_input: Tensor | None = None
        self._double = list(attrgetter(facts.double)(model))
        self._single = list(attrgetter(facts.single)(model))
        self._placed = ExitStack()

    def __enter__(self) -> Hooks:
        self._wrap_forward()
        for layer, block in enumerate([*self._double, *self._single]):
            facts = self.facts.double_block if layer < len(self._double) else self.facts.single_block
            self._hook_block(block, layer, facts.run)
            self._hook_named_mlp(block, layer, facts)
            self._hook_whole_mlp(block, layer, facts)
        self._placed.enter_context(_InterceptAttention(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._placed.close()

    def _wrap_forward(self) -> None:
        """Stand around the method that does the model's work: `forward`, or one that it calls."""
        name = self.facts.forward if self.facts.receiver is None else "forward"
        forward = getattr(self.model, name)
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            self.listener.before_model(arguments)
            return self.listener.after_model(arguments, forward(*arguments.args, **arguments.kwargs))

        if name in vars(self.model):
            self._placed.callback(vars(self.model).__setitem__, name, forward)
        else:
            self._placed.callback(vars(self.model).pop, name)
        vars(self.model)[name] = wrapped

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._placed.callback(handle.remove)

    def _hook_block(self, block: nn.Module, layer: int, run: str) -> None:
        """Know, inside the block's forward, which layer it is and how many tokens take part in its joint attention.

        run: the method that the model calls, if it does not call the block itself: no hook would be asked then.
        """

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sequences = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3]
            streams = [x for x in sequences if x.shape[-1] == sequences[0].shape[-1]]  # ids are narrower
            self.layer = layer
            counts = [stream.shape[1] for stream in streams]
            # of two streams: a modulation may be a sequence too (Chroma)
            self.joint_tokens = {sum(counts), *map(sum, itertools.combinations(counts, 2))}
            if layer < len(self._double):
                self._pair_tokens = self.joint_tokens
            else:  # a single block may be given the text beside the joint stream
                self.joint_tokens |= self._pair_tokens
            self.listener.before_block(layer, streams)

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self.layer = None
            return self.listener.after_block(layer, output)

        if not run:
            self._hook(block.register_forward_pre_hook(before, with_kwargs=True))
            self._hook(block.register_forward_hook(after, always_call=True))
            return
        method = getattr(block, run)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(block, args, kwargs)
            output = method(*args, **kwargs)
            other = after(block, args, output)
            return output if other is None else other

        self._placed.callback(vars(block).pop, run)
        vars(block)[run] = wrapped

    def _hook_whole_mlp(self, block: nn.Module, layer: int, facts: BlockFacts) -> None:
        """The image MLP of a double block; in FLUX.3 also that of a joint block, which is beside the attention."""
        if facts.mlp is None or facts.linear_in is not None:
            return
        mlp = attrgetter(facts.mlp)(block)
        linears = [part for part in mlp.modules() if isinstance(part, nn.Linear)]
        theirs = {id(parameter) for linear in linears for parameter in linear.parameters()}
        if len(linears) != 2 or not all(map(_is_plain, linears)) or {id(x) for x in mlp.parameters()} != theirs:
            return  # a LoRA or quantised layer, or one around a linear layer: the MLP stays as it is
        self._hook_linears(layer, [linears[0]], linears[1], facts)

    def _hook_named_mlp(self, block: nn.Module, layer: int, facts: BlockFacts) -> None:
        if facts.linear_in is None or facts.linear_out is None:
            return
        linears_in = [attrgetter(name)(block) for name in facts.linear_in.split(", ")]
        linear_out = attrgetter(facts.linear_out)(block)
        if all(map(_is_plain, [*linears_in, linear_out])):
            self._hook_linears(layer, linears_in, linear_out, facts)

    def _hook_linears(
        self, layer: int, linears_in: Sequence[nn.Linear], linear_out: nn.Linear, facts: BlockFacts
    ) -> None:
        """fc1 is the last rows of `linears_in`, of which there may be one for the gate and one for the value, and fc2
        the last F columns of `linear_out`: all of them in a double block, those after [q k v], if it makes these too,
        and after the attention's output in a single block. Where the facts say so, they are the first ones. fc1 has F
        rows, with a gate 2F."""
        attention_width = 0 if facts.linear_out is None or facts.mlp_alone else linear_out.out_features
        neurons = linear_out.in_features - attention_width
        rows = 2 * neurons if facts.gated else neurons
        all_rows = sum(linear.out_features for linear in linears_in)
        of_mlp_in = slice(rows) if facts.mlp_first_in else slice(all_rows - rows, None)
        of_mlp_out = slice(neurons) if facts.mlp_first_out else slice(attention_width, None)
        of_attention = slice(neurons, None) if facts.mlp_first_out else slice(attention_width)

        def before_in(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._mlp_input = args[0]

        def after_out(module: nn.Module, args: tuple[Tensor, ...], dense: Tensor) -> Tensor | None:
            x, self._mlp_input = self._mlp_input, None
            if self.layer is None or not self.listener.corrects or x is None:
                return None
            weight_in = torch.cat(tuple(linear.weight for linear in linears_in))[of_mlp_in]
            biases = [linear.bias for linear in linears_in if linear.bias is not None]
            bias_in = torch.cat(tuple(biases))[of_mlp_in] if biases else None
            weight_out = linear_out.weight[:, of_mlp_out]
            attended, activation = args[0][..., of_attention], args[0][..., of_mlp_out]
            if attention_width == 0:
                return self.listener.mlp(layer, DenseMlp(x, activation, weight_in, bias_in, weight_out, dense))
            part = DenseMlp(x, activation, weight_in, bias_in, weight_out, activation @ weight_out.T)
            output = self.listener.mlp(layer, part)
            if output is None:
                return None
            projected = attended @ linear_out.weight[:, of_attention].T
            return output + (projected if linear_out.bias is None else projected + linear_out.bias)

        self._hook(linears_in[0].register_forward_pre_hook(before_in))
        self._hook(linear_out.register_forward_hook(after_out))


class _InterceptAttention(TorchFunctionMode):
    """Hands a block's joint attention to the listener, under whatever name the repository calls it."""

    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self.hooks = hooks

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        layer = self.hooks.layer
        if func is not torch.nn.functional.scaled_dot_product_attention or layer is None:
            return result
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, key = call["query"], call["key"]
        joint = query.ndim == 4 and query.shape == key.shape and query.shape[2] in self.hooks.joint_tokens
        plain = call.get("attn_mask") is None and not call.get("dropout_p") and not call.get("is_causal")
        if not self.hooks.listener.corrects or not joint or not plain:
            if joint and call.get("attn_mask") is not None:
                self.hooks.listener.masked(layer)
            return result
        scale = call.get("scale")
        if scale is None:
            scale = query.shape[-1] ** -0.5
        return self.hooks.listener.attention(layer, DenseAttention(query, key, call["value"], scale, result))


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer does what its weight and bias say and no more, to the bit. A LoRA layer does more."""
    if not isinstance(linear, nn.Linear) or linear.weight.shape != (linear.out_features, linear.in_features):
        return False
    x = torch.linspace(-1.0, 1.0, 3 * linear.in_features).reshape(1, 3, -1).to(linear.weight)
    return type(linear) is nn.Linear or torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
