"""The Chipmunk algorithm, stated plainly, hooked at run time onto an unpatched model.

This is what `chipmunk verify` holds the runtime against. It shares no code with it, nor with the operators: everything
below is written from the rules in docs/architecture.md, one batch element, one head and one group of rows at a time,
and nothing in it cares for speed. It lets the model compute every layer densely and then corrects the layer's result
to what the sparse layer would have given, so it needs no change in the model's code:

- attention: the block's call of `scaled_dot_product_attention` is intercepted, wherever the repository makes it;
- MLP: the two linear layers are hooked. The input of the second one holds the activation of *every* neuron; the oracle
  takes the chosen ones from there and the others from its cache.

Notation: B batch, H heads, N tokens, D head dimension, C hidden size, F MLP hidden size, G groups.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from chipmunk.config import Config, Mlp
from chipmunk.rewrite.plan import BlockFacts, ModelFacts
from chipmunk.verify.step_oracle import Steps

RENEW_ALWAYS_BEFORE = 10
"""A sparse MLP step with a lower count of its own selects its neurons anew, whatever `block_mask_cache` says."""
_EVER_FURTHER = tuple(2**power - 1 for power in range(31))
"""Full steps where `full_step_every` is null; the MLP's leave 1 out."""


@dataclass
class AttentionCache:
    """What one layer's attention remembers in one call slot of one generation."""

    count: int = 0
    overdue: bool = False
    """Whether a full step was skipped since the last call."""
    keys: list[list[list[list[int]]]] | None = None
    """Chosen keys by batch element, head and query group, ascending."""
    difference: Tensor | None = None
    """dense − sparse of the last full step, (B, H, N, D)."""


@dataclass
class MlpCache:
    """What one layer's MLP remembers in one call slot of one generation."""

    count: int = 0
    overdue: bool = False
    """Whether a full step was skipped since the last call."""
    neurons: list[list[list[int]]] | None = None
    """Chosen neurons by batch element and row group, ascending; None if none were chosen since the last full step."""
    activation: Tensor | None = None
    """(B, N, F)"""
    output: Tensor | None = None
    """(B, N, C)"""
    means: list[list[list[Tensor]]] = field(default_factory=list)
    """fc1 of the mean input, float64 (F,), with a gate (2F,), by batch element, row group and part of the group."""


@dataclass
class Slot:
    """The caches of one place that calls the model, by layer index."""

    attention: dict[int, AttentionCache] = field(default_factory=dict)
    mlp: dict[int, MlpCache] = field(default_factory=dict)
    steps: Steps | None = None
    model_calls: int = 0


class Oracle:
    """Runs `model` sparsely while the `with` block lasts.

    `model` is an instance of the class that `facts` describe, unpatched. Gradients must be off. `steps` is the number
    of steps of the sampling loop where the loop knows it, for the rule about `min_steps`.

    The caller says which call is which: either `auto_step()`, where each model call is a step of a single slot, or
    `begin_step(index)` and `slot(name)` before each call, or `follow([(index, name), …])` for all calls of a generation
    in advance. A step before the last one begins a new generation, and so does the call after `end_generation()`.
    """

    def __init__(self, model: nn.Module, facts: ModelFacts, config: Config, steps: int | None = None) -> None:
        self.model = model
        self.facts = facts
        self.config = config
        self.steps = steps
        self.calls: Counter[tuple[int, str, str]] = Counter()
        """How often each layer's "attention" and "mlp" ran "dense", "full" and "sparse"."""
        self.smallest_margin = math.inf
        """The closest decision of all selections: the gap between the last score chosen and the first left out,
        relative to the largest. Where it is near the rounding error, another correct implementation may choose
        otherwise."""
        self.skipped: list[tuple[int, str]] = []
        """Step and slot of the model calls that step caching skipped."""
        self._slots: dict[str, Slot] = {}
        self._current: Slot | None = None
        self._name = ""
        self._upcoming: Iterator[tuple[int, str]] | None = None
        self._last_step = -1
        self._layer: int | None = None
        self._joint_tokens: set[int] = set()
        """How many tokens the joint attention of this block may have, and below: of the last double block."""
        self._pair_tokens: set[int] = set()
        self._steps: Steps | None = None
        """Those of this call's slot, and below: the call's step, whether it is skipped, its tokens on the way."""
        self._step = 0
        self._skip = False
        self._image_tokens = 0
        self._entering: Tensor | None = None
        self._leaving_double: Tensor | None = None
        self._text_first = True
        self._order: list[int] | None = None
        self._own_features: dict[int, Tensor] = {}
        self._mlp_input: Tensor | None = None
        self._hooks = ExitStack()

    # What the caller tells.

    def auto_step(self) -> None:
        """From now on each model call is a step of its own, in one slot, until `end_generation`."""
        self._name = ""
        self._upcoming = None

    def begin_step(self, index: int) -> None:
        """The next model calls belong to step `index`, 0-based; a step before the last one begins a new generation."""
        if index < self._last_step:
            self.end_generation()
        self._last_step = index
        self._name = ""

    def slot(self, name: str) -> None:
        """The next model calls come from the place `name` of the loop."""
        self._name = name

    def follow(self, calls: Iterable[tuple[int, str]]) -> None:
        """Step and slot of each of the next model calls."""
        self._upcoming = iter(calls)

    def end_generation(self) -> None:
        """Forget all caches and counts."""
        self._slots.clear()
        self._last_step = -1

    # Hooking onto the model.

    def __enter__(self) -> Oracle:
        self._wrap_forward()
        double: Iterable[nn.Module] = attrgetter(self.facts.double)(self.model)
        single: Iterable[nn.Module] = attrgetter(self.facts.single)(self.model)
        layer = 0
        for block in double:
            self._hook_block(block, layer)
            self._hook_named_mlp(block, layer, self.facts.double_block)
            self._hook_whole_mlp(block, layer, self.facts.double_block)
            layer += 1
        for block in single:
            self._hook_block(block, layer)
            self._hook_named_mlp(block, layer, self.facts.single_block)
            self._hook_whole_mlp(block, layer, self.facts.single_block)
            layer += 1
        self._hooks.enter_context(_InterceptAttention(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self.end_generation()

    def _wrap_forward(self) -> None:
        """Stand around the method that does the model's work: `forward`, or one that it calls."""
        name = self.facts.forward if self.facts.receiver is None else "forward"
        forward = getattr(self.model, name)
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            self._before_model(arguments)
            output = forward(*arguments.args, **arguments.kwargs)
            if self._order is not None:  # what the model keeps in its arguments is in this order, and may stay
                own = self._others_by_token(arguments, arguments.arguments[self.facts.image].shape[1])
                self._own_features |= {id(tensor): tensor for tensor in own}
            return self._after_model(output)

        if name in vars(self.model):
            self._hooks.callback(vars(self.model).__setitem__, name, forward)
        else:
            self._hooks.callback(vars(self.model).pop, name)
        vars(self.model)[name] = wrapped

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._hooks.callback(handle.remove)

    def _doubles(self) -> int:
        return len(attrgetter(self.facts.double)(self.model))

    def _hook_block(self, block: nn.Module, layer: int) -> None:
        """Know, inside the block's forward, which layer it is and how many tokens take part in its joint attention."""

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sequences = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3]
            streams = [x for x in sequences if x.shape[-1] == sequences[0].shape[-1]]  # ids are narrower
            self._layer = layer
            self._joint_tokens = {sum(stream.shape[1] for stream in streams)}
            if layer < self._doubles():
                self._pair_tokens = self._joint_tokens
            else:  # a single block may be given the text beside the joint stream
                self._joint_tokens |= self._pair_tokens
            self._note_entering(layer, streams)

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self._layer = None
            return self._hidden_state(layer, output)

        self._hook(block.register_forward_pre_hook(before, with_kwargs=True))
        self._hook(block.register_forward_hook(after, always_call=True))

    def _hook_whole_mlp(self, block: nn.Module, layer: int, facts: BlockFacts) -> None:
        """The image MLP of a double block; in FLUX.3 also that of a joint block, which is beside the attention."""
        if facts.mlp is None or facts.linear_in is not None:
            return
        mlp = attrgetter(facts.mlp)(block)
        linears = [part for part in mlp.modules() if isinstance(part, nn.Linear)]
        if len(linears) != 2 or not all(map(_is_plain, linears)):
            return  # a LoRA or quantised layer: the MLP stays as it is
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
            if self._layer is None or self._current is None or x is None:
                return None
            weight_in = torch.cat(tuple(linear.weight for linear in linears_in))[of_mlp_in]
            biases = [linear.bias for linear in linears_in if linear.bias is not None]
            bias_in = torch.cat(tuple(biases))[of_mlp_in] if biases else None
            weight_out = linear_out.weight[:, of_mlp_out]
            attended, activation = args[0][..., of_attention], args[0][..., of_mlp_out]
            if attention_width == 0:
                return self._mlp(layer, x, activation, weight_in, bias_in, weight_out, dense)
            output = self._mlp(layer, x, activation, weight_in, bias_in, weight_out, activation @ weight_out.T)
            if output is None:
                return None
            projected = attended @ linear_out.weight[:, of_attention].T
            return output + (projected if linear_out.bias is None else projected + linear_out.bias)

        self._hook(linears_in[0].register_forward_pre_hook(before_in))
        self._hook(linear_out.register_forward_hook(after_out))

    # One model call.

    def _before_model(self, arguments: inspect.BoundArguments) -> None:
        """Find the call's slot, and bring the image tokens among `arguments` into order."""
        self._current = self._order = self._steps = None
        config = self.config
        if not config.attn.is_enabled and not config.mlp.is_enabled and not config.step_caching.is_enabled:
            return
        if torch.is_grad_enabled():
            raise RuntimeError("the oracle runs under torch.no_grad() or torch.inference_mode()")
        if self._upcoming is not None:
            step, name = next(self._upcoming)
            if step != self._last_step:
                self.begin_step(step)
            self.slot(name)
        self._current = self._slots.setdefault(self._name, Slot())
        given, facts = arguments.arguments, self.facts
        image = given[facts.image]
        self._begin_call(self._current, image.shape[1])

        if facts.ids is None or not self.config.patchify.is_enabled:
            return
        ids = given[facts.ids]
        first_ids = ids if ids.ndim == 2 else ids[0]
        others = [x for x in self._others_by_token(arguments, image.shape[1]) if id(x) not in self._own_features]
        if torch.equal(ids, first_ids.expand_as(ids)) and not others:
            self._order = self._token_order(first_ids)
        if self._order is not None:
            given[facts.image] = image[:, self._order]
            given[facts.ids] = ids[self._order] if ids.ndim == 2 else ids[:, self._order]

    def _after_model(self, output: Any) -> Any:
        order, self._current, self._order = self._order, None, None
        if order is None:
            return output
        first = output[0] if isinstance(output, tuple) else output
        restored = torch.empty_like(first)
        for new, old in enumerate(order):
            restored[:, old] = first[:, new]
        return (restored, *output[1:]) if isinstance(output, tuple) else restored

    def _others_by_token(self, arguments: inspect.BoundArguments, tokens: int) -> list[Tensor]:
        """What else than image and ids has a row for each image token, or masks them."""
        given = dict(arguments.arguments)
        for parameter in arguments.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        given.pop(self.facts.image)
        given.pop(self.facts.ids or "", None)
        found = []
        for tensor in _tensors_in(list(given.values()), 6):
            if tensor.ndim >= 2 and tokens > 1:
                *rows, width = tensor.shape[1:]
                is_mask = tensor.dtype == torch.bool or tensor.shape[-2] == width
                if tokens in rows or (not rows and width == tokens) or (is_mask and width >= tokens):
                    found.append(tensor)
        return found

    def _token_order(self, ids: Tensor) -> list[int] | None:
        """Old index of each new image token, or None where the ids (L, axes) are no grid. Reference images stay."""
        positions: list[list[float]] = ids.tolist()
        first = positions[0]
        tokens = 1
        while tokens < len(positions) and positions[tokens] != first and positions[tokens][0] == first[0]:
            tokens += 1
        width = 1
        while width < tokens and positions[width][1] == first[1]:
            width += 1
        down = positions[width][1] - first[1] if width < tokens else 1.0
        right = positions[1][2] - first[2] if width > 1 else 1.0
        for index in range(tokens):
            row, column = divmod(index, width)
            off = positions[index][1] - first[1] - row * down, positions[index][2] - first[2] - column * right
            if min(down, right) <= 0 or abs(off[0]) > 1e-3 * down or abs(off[1]) > 1e-3 * right:
                return None
        if tokens % width:
            return None
        outer, inner = self.config.patchify.chunk_size_1, self.config.patchify.chunk_size_2

        def key(index: int) -> tuple[int, ...]:
            row, column = divmod(index, width)
            return row // outer, column // outer, row % outer // inner, column % outer // inner, row, column

        return [*sorted(range(tokens), key=key), *range(tokens, len(positions))]

    # Step caching.

    def _begin_call(self, slot: Slot, image_tokens: int) -> None:
        """Decide whether this call of the model is skipped; its blocks are then computed without being counted."""
        self._step = self._last_step if self._last_step >= 0 else slot.model_calls
        slot.model_calls += 1
        self._skip, self._image_tokens = False, image_tokens
        few = self.steps is not None and self.steps < self.config.min_steps
        if not self.config.step_caching.is_enabled or not self.facts.step_caching or few:
            return
        if slot.steps is None:
            slot.steps = Steps(self.config, self.steps)
        self._steps = slot.steps
        self._skip = slot.steps.skips(self._step)
        self.smallest_margin = min(self.smallest_margin, slot.steps.smallest_margin)
        if not self._skip:
            return
        self.skipped.append((self._step, self._name))
        self._current = None
        mlp = self.config.mlp
        for attention in slot.attention.values():
            attention.overdue |= self._attention_step_is_full(attention.count)
            attention.count += 1
        for cache in slot.mlp.values():
            cache.overdue |= _mlp_step_is_full(mlp, cache.count)
            if cache.count < RENEW_ALWAYS_BEFORE or cache.count % mlp.block_mask_cache == 0:
                cache.neurons = None  # chosen anew at the next call
            cache.count += 1

    def _note_entering(self, layer: int, streams: Sequence[Tensor]) -> None:
        """Know what enters the blocks, and on which side of the joint stream the image is."""
        if self._steps is None:
            return
        images = [stream for stream in streams if stream.shape[1] == self._image_tokens]
        if layer == 0:
            self._entering = images[0].clone()
        elif layer == self._doubles() and self._leaving_double is not None and not images:
            head = streams[0][:, : self._image_tokens]
            self._text_first = not torch.equal(head, self._leaving_double)

    def _hidden_state(self, layer: int, output: Any) -> Any:
        """The output of a block; of the last one, with the image tokens that step caching puts into their place."""
        if self._steps is None:
            return None
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        double = self._doubles()
        index = next((i for i, part in enumerate(parts) if part.shape[1] == self._image_tokens), 0)
        if layer == double - 1:
            self._leaving_double = parts[index].clone()
        if layer != double + len(attrgetter(self.facts.single)(self.model)) - 1:
            return None
        assert self._entering is not None
        tokens = parts[index].shape[1]
        rows = slice(tokens - self._image_tokens, None) if self._text_first else slice(self._image_tokens)
        if not self._skip:
            self._steps.compute(self._step, self._entering, parts[index][:, rows])
            return None
        parts[index] = parts[index].clone()
        parts[index][:, rows] = self._steps.skip(self._step, self._entering)
        return type(output)(parts) if isinstance(output, (tuple, list)) else parts[0]

    # Attention.

    def _attention(self, dense: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Output (B, H, N, D) of the joint attention of this layer in this call, given the dense one."""
        assert self._layer is not None
        assert self._current is not None
        config, layer = self.config.attn, self._layer
        is_double = layer < self._doubles()
        if not (self.facts.double_block if is_double else self.facts.single_block).attention:
            return dense
        batch, heads, tokens, _ = query.shape
        groups = _groups(tokens, config.mbm)
        keep, random = self._keys_kept(tokens)
        cache = self._current.attention.setdefault(layer, AttentionCache())
        count = cache.count
        cache.count += 1
        everything = keep + random == tokens and config.top_keys < 1
        if self._stays_dense(layer, config.is_enabled, config.first_n_dense_layers, everything, groups):
            self.calls[layer, "attention", "dense"] += 1
            return dense

        def sparse(b: int, h: int, rows: range, chosen: list[int]) -> Tensor:
            scores = query[b, h, rows.start : rows.stop] @ key[b, h, chosen].T * scale
            return torch.softmax(scores, dim=-1) @ value[b, h, chosen]

        is_full, cache.overdue = self._attention_step_is_full(count) or cache.overdue, False
        if not is_full:
            assert cache.keys is not None
            assert cache.difference is not None
            self.calls[layer, "attention", "sparse"] += 1
            output = cache.difference.clone()
            for b in range(batch):
                for h in range(heads):
                    for g, rows in enumerate(groups):
                        output[b, h, rows.start : rows.stop] += sparse(b, h, rows, cache.keys[b][h][g])
            return output

        self.calls[layer, "attention", "full"] += 1
        if self._attention_step_is_full(count + 1):
            return dense
        if cache.keys is None or config.recompute_mask:
            cache.keys = [[[] for _ in range(heads)] for _ in range(batch)]
            for b in range(batch):
                for h in range(heads):
                    for g, rows in enumerate(groups):
                        scores = query[b, h, rows.start : rows.stop].double() @ key[b, h].double().T * scale
                        column_sums = torch.softmax(scores, dim=-1).sum(dim=0)
                        group = h * len(groups) + g
                        cache.keys[b][h].append(self._choose(column_sums.tolist(), keep, random, count, layer, group))
        cache.difference = dense.clone()
        for b in range(batch):
            for h in range(heads):
                for g, rows in enumerate(groups):
                    cache.difference[b, h, rows.start : rows.stop] -= sparse(b, h, rows, cache.keys[b][h][g])
        return dense

    def _attention_step_is_full(self, count: int) -> bool:
        config = self.config.attn
        if config.full_step_schedule is not None:
            return count == 0 or count in config.full_step_schedule
        if config.full_step_every is None:
            return count in _EVER_FURTHER
        return count in (0, 1) or count % config.full_step_every == 0

    def _keys_kept(self, tokens: int) -> tuple[int, int]:
        """How many of `tokens` keys are kept for their column sum, and how many at random."""
        config = self.config.attn
        if config.top_keys >= 1:
            return tokens, 0
        multiple = config.counts_multiple_of
        keep = math.floor(config.top_keys * tokens / multiple + 0.5) * multiple
        keep = min(max(keep, min(multiple, tokens)), tokens)
        random = math.floor(config.random_keys * tokens + 0.5)
        return keep, min(random, tokens - keep)

    # MLP.

    def _mlp(
        self,
        layer: int,
        x: Tensor,
        activation: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        dense: Tensor,
    ) -> Tensor | None:
        """Output (B, N, C) of a sparse step of an MLP; None for any other step, whose output is the dense one.

        `activation` (B, N, F) is that of all neurons; `weight_in` (F, C), with a gate (2F, C), and `weight_out` (C, F)
        are fc1 and fc2;
        `dense` (B, N, C) is the layer's dense output, in a single block the MLP's part of it without bias.
        """
        assert self._current is not None
        config = self.config.mlp
        batch, tokens, _ = x.shape
        neurons = activation.shape[-1]
        groups = _groups(tokens, config.bm)
        keep, random = self._neurons_kept(neurons)
        cache = self._current.mlp.setdefault(layer, MlpCache())
        count = cache.count
        cache.count += 1
        everything = keep + random == neurons and config.top_keys < 1
        if self._stays_dense(layer, config.is_enabled, config.first_n_dense_layers, everything, groups):
            self.calls[layer, "mlp", "dense"] += 1
            return None

        def means(b: int, rows: range) -> list[Tensor]:
            parts = [x[b, rows.start + part.start : rows.start + part.stop] for part in _groups(len(rows), config.mbm)]
            bias = 0.0 if bias_in is None else bias_in.double()
            return [part.double().mean(dim=0) @ weight_in.double().T + bias for part in parts]

        is_full, cache.overdue = _mlp_step_is_full(config, count) or cache.overdue, False
        if is_full:
            self.calls[layer, "mlp", "full"] += 1
            cache.neurons = None
            cache.activation = activation.clone()
            cache.output = dense.clone()
            cache.means = [[means(b, rows) for rows in groups] for b in range(batch)]
            return None

        assert cache.activation is not None
        assert cache.output is not None
        self.calls[layer, "mlp", "sparse"] += 1
        if count < RENEW_ALWAYS_BEFORE or count % config.block_mask_cache == 0 or cache.neurons is None:
            cache.neurons = [[] for _ in range(batch)]
            for b in range(batch):
                for g, rows in enumerate(groups):
                    now, before = means(b, rows), cache.means[b][g]
                    score = torch.stack([abs(n - o) for n, o in zip(now, before, strict=True)]).sum(dim=0)
                    # A neuron with a gate has two rows, `neurons` apart.
                    score = score.reshape(-1, neurons).sum(dim=0)
                    chosen = self._choose(score.tolist(), keep, random, count, layer, g)
                    for n, o in zip(now, before, strict=True):
                        for first in range(0, len(n), neurons):
                            refreshed = [first + neuron for neuron in chosen]
                            o[refreshed] = n[refreshed]
                    cache.neurons[b].append(chosen)
        for b in range(batch):
            for g, rows in enumerate(groups):
                chosen = cache.neurons[b][g]
                span = slice(rows.start, rows.stop)
                new, old = activation[b, span][:, chosen], cache.activation[b, span][:, chosen]
                cache.output[b, span] += (new - old) @ weight_out[:, chosen].T
                cache.activation[b, span, chosen] = new
        return cache.output.clone()

    def _neurons_kept(self, neurons: int) -> tuple[int, int]:
        """How many of `neurons` are kept for their score, and how many at random."""
        config = self.config.mlp
        if config.top_keys >= 1:
            return neurons, 0
        multiple = config.counts_multiple_of
        total = math.ceil((config.top_keys + config.random_keys) * neurons / multiple) * multiple
        total = min(max(total, 1), neurons)
        random = min(math.floor(config.random_keys * neurons), total - 1)
        return total - random, random

    # What both share.

    def _stays_dense(
        self, layer: int, enabled: bool, first_dense_layers: int, everything_kept: bool, groups: Sequence[range]
    ) -> bool:
        too_few_steps = self.steps is not None and self.steps < self.config.min_steps
        return not enabled or layer < first_dense_layers or everything_kept or len(groups) < 2 or too_few_steps

    def _choose(self, scores: list[float], keep: int, random: int, step: int, layer: int, group: int) -> list[int]:
        """The `keep` best indices and `random` more by hash, ascending."""
        ranking = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        chosen, others = ranking[:keep], ranking[keep:]
        if chosen and others:
            largest = max(abs(scores[chosen[0]]), 1e-300)
            self.smallest_margin = min(self.smallest_margin, (scores[chosen[-1]] - scores[others[0]]) / largest)
        if random:
            others.sort(key=lambda index: (_hash(step, layer, group, index), index))
        return sorted(chosen + others[:random])


class _InterceptAttention(TorchFunctionMode):
    """Hands a block's joint attention to the oracle, under whatever name the repository calls it."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.scaled_dot_product_attention or self.oracle._layer is None:
            return result
        oracle = self.oracle
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, key = call["query"], call["key"]
        joint = query.ndim == 4 and query.shape == key.shape and query.shape[2] in oracle._joint_tokens
        plain = call.get("attn_mask") is None and not call.get("dropout_p") and not call.get("is_causal")
        if oracle._current is None or not joint or not plain:
            return result
        scale = call.get("scale")
        if scale is None:
            scale = query.shape[-1] ** -0.5
        return oracle._attention(result, query, key, call["value"], scale)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer does what its weight and bias say and no more, to the bit. A LoRA layer does more."""
    if not isinstance(linear, nn.Linear) or linear.weight.shape != (linear.out_features, linear.in_features):
        return False
    x = torch.linspace(-1.0, 1.0, 3 * linear.in_features).reshape(1, 3, -1).to(linear.weight)
    return type(linear) is nn.Linear or torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def _mlp_step_is_full(config: Mlp, count: int) -> bool:
    if config.full_step_every is None:
        return count in _EVER_FURTHER and count != 1
    return count % config.full_step_every == 0


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in lists and dictionaries, so many deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and depth:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(entry, depth - 1)


def _groups(tokens: int, size: int) -> list[range]:
    """Consecutive groups of `size` rows, the last one partial."""
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _hash(step: int, layer: int, group: int, index: int) -> int:
    """A number of 32 bits that only looks random."""
    golden, bits = 0x9E3779B9, 0xFFFFFFFF
    mixed = _mix(step)
    for number in (layer, group):
        mixed = _mix((number + golden * mixed) & bits)
    return _mix((index + golden * mixed) & bits)


def _mix(h: int) -> int:
    bits = 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x7FEB352D & bits
    h ^= h >> 15
    h = h * 0x846CA68B & bits
    return h ^ (h >> 16)
