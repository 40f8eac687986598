"""What a call of an attention function means: which tensors it is of, how they lie, and whether it is plain.

Attention functions differ in names, in where the heads stand, and in their options. A function is known by its name
and the beginning of its signature, never by importing the library that it comes from. Options must have their neutral
values; an option that is not known is never neutral.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

_SDPA = nn.functional.scaled_dot_product_attention  # a user may put another function in its place later

MASK = "an attention mask is given"
OPTIONS = "dropout, causal or grouped-query attention is asked for"
UNKNOWN_FUNCTION = "the attention function is not one that Chipmunk knows"


class AttentionCall(NamedTuple):
    """One call, its tensors as views (B, H, N, D) of what was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    """None: one over the root of the head dimension."""
    layout: str
    """Of the result: `heads first` (B, H, N, D), `tokens first` (B, N, H, D) or `merged` (B, N, H · D)."""

    def result(self, x: Tensor) -> Tensor:
        """(B, H, N, D) in the layout that the caller expects; a view if x is that of a contiguous (B, N, H, D)."""
        if self.layout == "heads first":
            return x
        x = x.transpose(1, 2)
        return x if self.layout == "tokens first" else x.flatten(2)

    def heads_first(self, out: Tensor) -> Tensor:
        """What the function itself returned, as (B, H, N, D)."""
        if self.layout == "heads first":
            return out
        if self.layout == "merged":
            out = out.view(*out.shape[:2], self.query.shape[1], -1)
        return out.transpose(1, 2)


class _Form(NamedTuple):
    """A family of attention functions that are called alike."""

    parameters: tuple[str, ...]
    scale: str = "scale"
    masks: tuple[str, ...] = ()
    """Options that must be None: masks and their like."""
    off: tuple[str, ...] = ()
    """Options that must be None, False or 0: dropout, causality and their like."""
    free: tuple[str, ...] = ()
    """Options that choose how the same numbers are computed."""


_FORMS = {
    "sdpa": _Form(
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        masks=("attn_mask",),
        off=("dropout_p", "is_causal", "enable_gqa"),
    ),
    "flash_attn": _Form(
        ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"),
        scale="softmax_scale",
        masks=("alibi_slopes",),
        off=("dropout_p", "causal", "softcap", "return_attn_probs"),
        free=("deterministic",),
    ),
    "xformers": _Form(
        ("query", "key", "value", "attn_bias", "p", "scale"),
        masks=("attn_bias", "output_dtype"),
        off=("p",),
        free=("op",),
    ),
    "sage": _Form(
        ("q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "return_lse"),
        scale="sm_scale",
        masks=("attn_mask",),
        off=("is_causal", "return_lse", "dropout_p"),
    ),
    "dispatch": _Form(
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "attention_kwargs"),
        masks=("attn_mask", "parallel_config"),
        off=("dropout_p", "is_causal", "enable_gqa", "attention_kwargs"),
        free=("backend",),
    ),
    "heads": _Form(
        ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape"),
        masks=("mask", "attn_precision"),
        free=("transformer_options",),
    ),
}
_GIVEN = {
    "attn_precision": "attention in another precision is asked for",
    "output_dtype": "attention in another precision is asked for",
    "parallel_config": "attention is spread over several devices",
}
"""What it means that such an option is given, where it is no mask."""

_NAMES = {
    "flash_attn_func": ("flash_attn", 6),
    "memory_efficient_attention": ("xformers", 6),
    "sageattn": ("sage", 6),
    "dispatch_attention_fn": ("dispatch", 8),
}
"""Name → its form, and how many of the form's parameters its signature must begin with."""


def read_call(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall | str:
    """The call `function(*args, **kwargs)`, or why it is not plain attention of three tensors."""
    kind = "sdpa" if function is _SDPA else _kind_of(function)
    if kind is None:
        return UNKNOWN_FUNCTION
    form = _FORMS[kind]
    if len(args) > len(form.parameters):
        return "the attention function has arguments that Chipmunk does not know"
    given = dict(zip(form.parameters, args, strict=False))
    given.update(kwargs)
    if kind == "heads":
        for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
            if old in given:
                given[new] = given.pop(old)
    names = form.parameters[:3]
    if not all(isinstance(given.get(name), Tensor) for name in names):
        return "query, key and value are not three tensors"
    reason = _why_not_plain(kind, form, given)
    if reason is not None:
        return reason
    q, k, v = (given[name] for name in names)
    scale = given.get(form.scale)
    return _laid_out(kind, q, k, v, scale, given)


def _why_not_plain(kind: str, form: _Form, given: dict[str, Any]) -> str | None:
    """The option that makes the call something else than softmax(q kᵀ · scale) v."""
    for name, value in given.items():
        if name in form.parameters[:3] or name in form.free or name == form.scale:
            continue
        if name in form.masks:
            if value is not None:
                return _GIVEN.get(name, MASK)
        elif name in form.off:
            if value:
                return OPTIONS
        elif name == "window_size" and kind == "flash_attn":
            if value is not None and tuple(value) != (-1, -1):
                return "attention in a window is asked for"
        elif name not in ("tensor_layout", "heads", "skip_reshape", "skip_output_reshape"):
            return f"Chipmunk does not know the option {name} of the attention function"
    options = given.get("transformer_options")
    if kind == "heads" and options and "optimized_attention_override" in options:
        return "another attention function takes this one's place"
    return None


def _laid_out(
    kind: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, given: dict[str, Any]
) -> AttentionCall | str:
    if kind == "heads":
        heads: Any = given.get("heads")
        merged = not given.get("skip_reshape")
        if merged and (not isinstance(heads, int) or any(x.dim() != 3 or x.shape[2] % heads for x in (q, k, v))):
            return "query, key and value are not (B, N, heads · D)"
        if merged:
            q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        return AttentionCall(q, k, v, None, "heads first" if given.get("skip_output_reshape") else "merged")
    heads_first = kind == "sdpa"
    if kind == "sage":
        layout = given.get("tensor_layout", "HND")
        if layout not in ("HND", "NHD"):
            return "query, key and value lie in an unknown order"
        heads_first = layout == "HND"
    if heads_first:
        return AttentionCall(q, k, v, scale, "heads first")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "query, key and value are not (B, N, H, D)"
    return AttentionCall(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, "tokens first")


def _kind_of(function: Callable[..., Tensor]) -> str | None:
    """Which form the calls of a function have; None if that is not known."""
    return _known_kind(function)


# A fact about the function: Dynamo asks once, while tracing. What `torch.compiler.assume_constant_result` does, without
# importing the compiler for those who leave Chipmunk off.
_kind_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _known_kind(function: Callable[..., Tensor]) -> str | None:
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    known = _NAMES.get(getattr(function, "__name__", ""))
    if known is not None:
        kind, count = known
        return kind if names[:count] == _FORMS[kind].parameters[:count] else None
    tensors = names[:3] in (("q", "k", "v"), ("query", "key", "value"))
    return "heads" if tensors and names[3:5] == ("heads", "mask") and "skip_reshape" in names else None
