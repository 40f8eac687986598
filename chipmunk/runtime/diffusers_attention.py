"""Attention processors for diffusers' FLUX transformers: its own interface for computing attention in another way.

A processor here stands in for the one that it was made from, and calls it for everything but the steps in which a layer
works with its caches. Then it states the same computation with Chipmunk's attention in the middle; `why_unlike` holds
the two against each other before the first such step, so that a release of diffusers that computes something else is
noticed and left alone.

Imported only where diffusers is: a diffusers model is in the process already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from chipmunk.runtime.layer_state import DONE, LayerState, state_of
from chipmunk.runtime.sparse_attention import attention
from chipmunk.runtime.sparse_mlp import cat_linear, split_linear

Rotary = tuple[Tensor, Tensor] | None

LARGEST_ERROR = 1e-2
"""Relative L2 error between the two statements of a processor above which they are not the same computation."""


class _Processor:
    """What all have in common: standing in for `previous`."""

    def __init__(self, previous: Any = None) -> None:
        """previous: None where diffusers makes another one of this class; then the layer's default."""
        self.previous = previous

    def previous_of(self, attn: Any) -> Any:
        return attn._default_processor_cls() if self.previous is None else self.previous

    # `set_attention_backend` and `enable_parallelism` write these.

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.previous, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.previous._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.previous, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.previous._parallel_config = config

    # A copy or a pickle of the model holds the processor that was there before.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        return deepcopy(self.previous, memo)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _itself, (self.previous,)


def _itself(processor: Any) -> Any:
    return processor


class FluxProcessor(_Processor):
    """FLUX.1, both kinds of block, and the double blocks of FLUX.2."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Any:
        state = state_of(attn)
        if state is None or _is_plain(state, mlp=False):
            previous = self.previous_of(attn)
            return previous(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.compute(state, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def compute(
        self,
        state: LayerState | None,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        mask: Tensor | None,
        rotary: Rotary,
    ) -> Any:
        """What the layer returns. image: (B, N, C), all tokens in a single block; text: (B, T, C), or None there."""
        query, key, value = _projections(attn, image, ("to_q", "to_k", "to_v"), "to_qkv")
        query, key = attn.norm_q(query), attn.norm_k(key)
        if text is not None:
            first, second, third = _projections(attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")
            query = torch.cat((attn.norm_added_q(first), query), dim=1)
            key = torch.cat((attn.norm_added_k(second), key), dim=1)
            value = torch.cat((third, value), dim=1)
        attended = _attend(self, state, query, key, value, mask, rotary)
        if text is None:
            return attended if getattr(attn, "pre_only", False) else _out(attn, attended)
        tokens = text.shape[1]
        return _out(attn, attended[:, tokens:].contiguous()), attn.to_add_out(attended[:, :tokens].contiguous())


class _OneStream(_Processor):
    """What blocks have in common whose tokens all come in one sequence."""

    has_mlp = False
    """Whether the processor computes the block's MLP too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Any:
        state = state_of(attn)
        if state is None or _is_plain(state, mlp=self.has_mlp):
            return self.previous_of(attn)(attn, hidden_states, attention_mask, image_rotary_emb)
        return self.compute(state, attn, hidden_states, attention_mask, image_rotary_emb)

    def compute(self, state: LayerState | None, attn: Any, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        """x: (B, N, C), all tokens of the block; returns (B, N, C)."""
        raise NotImplementedError


class ParallelProcessor(_OneStream):
    """The single blocks of FLUX.2: one linear for query, key, value and MLP, and one for attention and MLP."""

    has_mlp = True

    def compute(self, state: LayerState | None, attn: Any, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        sizes = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
        joint, mlp = split_linear(state, attn.to_qkv_mlp_proj, x, sizes)
        query, key, value = _heads(attn, joint.chunk(3, dim=-1))
        attended = _attend(self, state, attn.norm_q(query), attn.norm_k(key), value, mask, rotary)
        return cat_linear(state, attn.to_out, attended, attn.mlp_act_fn, mlp, kind="swiglu", of="Flux2SwiGLU")


class Flux3Processor(_OneStream):
    """FLUX.3: the blocks of one kind of token, and the joint ones."""

    def compute(self, state: LayerState | None, attn: Any, x: Tensor, mask: Tensor | None, rotary: Rotary) -> Tensor:
        """Norms and rotation are in float32."""
        query, key, value = _projections(attn, x, ("to_q", "to_k", "to_v"), "to_qkv")
        query, key = _rotated(attn.norm_q(query.float()), attn.norm_k(key.float()), rotary)
        query, key = query.to(value.dtype), key.to(value.dtype)
        return _out(attn, _attend(self, state, query, key, value, mask, None))


FORMS: dict[tuple[str, str], type[FluxProcessor] | type[ParallelProcessor] | type[Flux3Processor]] = {
    ("FluxAttention", "FluxAttnProcessor"): FluxProcessor,
    ("Flux2Attention", "Flux2AttnProcessor"): FluxProcessor,
    ("Flux2ParallelSelfAttention", "Flux2ParallelSelfAttnProcessor"): ParallelProcessor,
    ("Flux3Attention", "Flux3AttnProcessor"): Flux3Processor,
}
"""By the classes of an attention layer and of its processor, both diffusers' own, what stands in for it."""


def install(attn: nn.Module) -> str | None:
    """Let a processor of ours stand in for that of an attention layer, if none does yet; or why it cannot."""
    layer: Any = attn
    processor = layer.processor
    if isinstance(processor, _Processor):
        if processor.previous is None:  # made by diffusers, which makes another one of the class that it finds
            processor.previous = processor.previous_of(attn)
        current = processor.previous
    else:
        current = processor
    form = FORMS.get((type(attn).__name__, type(current).__name__))
    reason = None
    if form is None or not type(current).__module__.startswith("diffusers."):
        reason = f"the attention processor is a {type(current).__name__}"
    elif not str(getattr(type(current).__call__, "__globals__", {}).get("__name__", "")).startswith("diffusers."):
        # Its work may be more than the attention: storing maps of it, say.
        reason = f"{type(current).__name__}.__call__ was replaced by code that is not diffusers' own"
    if reason is not None or form is None:
        uninstall(attn)  # what diffusers hands a processor goes by the signature of the one that it finds
        return reason
    if getattr(current, "_parallel_config", None) is not None:
        return "attention is spread over several devices"
    if type(processor) is not form:
        layer.set_processor(form(current))
    return None


def uninstall(attn: nn.Module) -> None:
    """Give the layer its own processor back, unless another one was set since."""
    layer: Any = attn
    if isinstance(getattr(attn, "processor", None), _Processor):
        layer.set_processor(layer.processor.previous_of(attn))


def why_unlike(attn: nn.Module, device: torch.device) -> str | None:
    """Why the processor's own statement and diffusers' are not the same computation on this layer; None if they are.

    Runs both on twelve random tokens, without touching the random state: where the weights are, or on `device` if
    accelerate brings them there.
    """
    layer: Any = attn
    processor = layer.processor
    weight = next((p for p in attn.parameters() if p.is_floating_point() and p.dim() == 2), None)
    if weight is None or weight.dtype.itemsize < 2:  # quantised: what passes through it has another dtype
        weight = next((p for p in attn.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2), None)
    if weight is None:
        return "the attention layer has no weights to be checked with"
    generator = torch.Generator("cpu").manual_seed(0)
    device = device if weight.device.type == "meta" else weight.device

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device, weight.dtype)

    tokens, text = 8, None
    if getattr(layer, "added_kv_proj_dim", None) is not None:
        text = noise(1, 4, layer.added_kv_proj_dim)
    image = noise(1, tokens, layer.query_dim)
    angles = torch.rand(tokens + (0 if text is None else 4), layer.head_dim // 2, generator=generator, device="cpu")
    angles = angles.repeat_interleave(2, dim=1).to(device)
    rotary = (angles.cos(), angles.sin())
    streams = (image, text) if isinstance(processor, FluxProcessor) else (image,)
    try:
        with torch.no_grad():
            theirs = processor.previous(attn, *streams, None, rotary)
            ours = processor.compute(None, attn, *streams, None, rotary)
    except Exception as error:
        return f"the attention processor could not be checked: {type(error).__name__}: {error}"
    pairs = list(zip(ours, theirs, strict=True)) if isinstance(ours, tuple) else [(ours, theirs)]
    if all(a.shape == b.shape and (a - b).float().norm() <= LARGEST_ERROR * b.float().norm() for a, b in pairs):
        return None
    return f"this release's {type(processor.previous).__name__} computes something that Chipmunk does not know"


def _is_plain(state: LayerState, mlp: bool) -> bool:
    """Whether nothing is to be cached or sparse in this call, which is noted. mlp: the MLP is in the processor too."""
    if state.attention != "dense" or (mlp and state.mlp != "dense"):
        return False
    state.attention_done = state.attention_done or DONE
    if mlp:
        state.mlp_done = state.mlp_done or DONE
    return True


def _projections(attn: Any, x: Tensor, names: tuple[str, str, str], fused: str) -> list[Tensor]:
    """Query, key and value of x (B, N, C), (B, N, heads, D) each."""
    if attn.fused_projections:
        return _heads(attn, getattr(attn, fused)(x).chunk(3, dim=-1))
    return _heads(attn, [getattr(attn, name)(x) for name in names])


def _heads(attn: Any, parts: Iterable[Any]) -> list[Tensor]:
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]


def _rotated(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return query, key
    return apply_rotary_emb(query, rotary, sequence_dim=1), apply_rotary_emb(key, rotary, sequence_dim=1)


def _attend(
    processor: _Processor,
    state: LayerState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rotary: Rotary,
) -> Tensor:
    query, key = _rotated(query, key, rotary)
    backend = processor._attention_backend
    attended = attention(state, dispatch_attention_fn, query, key, value, attn_mask=mask, backend=backend)
    return attended.flatten(2, 3).to(query.dtype)


def _out(attn: Any, x: Tensor) -> Tensor:
    result: Tensor = attn.to_out[1](attn.to_out[0](x))
    return result
