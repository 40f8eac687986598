"""The joint attention of a block: the call that stands where the code had `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk import ops
from chipmunk.ops.dispatch import groups_of
from chipmunk.runtime.attention_calls import AttentionCall, read_call
from chipmunk.runtime.guards import is_cast
from chipmunk.runtime.layer_state import DONE, LayerState, state_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer(block: nn.Module) -> dict[str, LayerState]:
    """The keyword that tells `attention` which layer it works for: `attention(q, k, v, pe=pe, **chipmunk.layer(self))`.

    Empty while Chipmunk is off, so that a callee of the user's own, which knows nothing of it, still works.
    """
    state = state_of(block)
    return {} if state is None else {"chipmunk_layer": state}


def attention(layer: LayerState | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`, or its sparse form.

    layer: what `chipmunk.layer` handed down, None while Chipmunk is off. function: the code's own attention function;
    those that `attention_calls` knows have a sparse form, on query, key and value of one shape (B, H, N, D) or
    (B, N, H, D), without a mask, dropout or causality. Returns what the function would, in its layout, never the
    storage of a cache.
    """
    if layer is None or layer.attention_done is not None:  # the block runs again: its caches are not this one's
        return function(*args, **kwargs)
    call = read_call(function, args, kwargs)
    reason = call if isinstance(call, str) else _why_dense(layer, call)
    if isinstance(call, str) or reason is not None or layer.attention == "dense":
        layer.attention_done = DONE if reason is None else reason
        return function(*args, **kwargs)

    q, k, v = call.query, call.key, call.value
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    rules, implementation = layer.attention_rules, layer.implementation
    if layer.attention == "sparse":
        assert layer.keys is not None
        x = ops.column_sparse_attention(
            q, k, v, layer.keys, layer.difference, rules.group, scale, False, implementation
        )
        out = call.result(x)
    else:
        if layer.select_keys:
            assert layer.attention_seed is not None
            x, sums = ops.attention_with_column_sums(q, k, v, rules.group, scale, implementation)
            keep, random = rules.kept(q.shape[2])
            layer.keys = ops.select_columns(sums, layer.attention_seed, keep, random, implementation)
            out = call.result(x)
        else:
            out = function(*args, **kwargs)
            x = call.heads_first(out)
        assert layer.keys is not None
        layer.difference = ops.column_sparse_attention(q, k, v, layer.keys, x, rules.group, scale, True, implementation)
    layer.attention_done = DONE
    return out


def _why_dense(layer: LayerState, call: AttentionCall) -> str | None:
    """Why this call has no sparse form, or is faster without."""
    q, k, v = call.query, call.key, call.value
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        return "query, key and value differ in shape"
    if q.dtype not in _DTYPES or q.dtype != k.dtype or q.dtype != v.dtype:
        return "unsupported dtype"
    if is_cast(q):
        return "autocast to another dtype is on"
    rules, tokens = layer.attention_rules, q.shape[2]
    if groups_of(tokens, rules.group) < 2:
        return "fewer than two query groups"
    if rules.top_keys < 1 and sum(rules.kept(tokens)) >= tokens:
        return "rounding keeps every key"
    if layer.attention == "sparse" and (layer.difference is None or layer.difference.shape != q.shape):
        return "the number of tokens changed"
    return None
