"""Attention functions of other libraries: each in its layout, each as sparse as SDPA; and what keeps them dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flux_model
import pytest
import torch
from flux_model import build, denoise, error, inputs, rotate, same, small
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chipmunk
from chipmunk.runtime.attention_calls import AttentionCall, read_call
from chipmunk.runtime.counts import Calls

pytestmark = pytest.mark.usefixtures("no_gradients")


# Functions with the names, signatures and layouts of the libraries', in PyTorch.


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    assert not causal
    return tokens_first(q, k, v, scale=softmax_scale)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Tensor:
    return tokens_first(query, key, value, mask=attn_bias, scale=scale)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Tensor:
    return sdpa(q, k, v, scale=sm_scale) if tensor_layout == "HND" else tokens_first(q, k, v, scale=sm_scale)


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: str | None = None,
    parallel_config: Any = None,
) -> Tensor:
    return tokens_first(query, key, value, mask=attn_mask, scale=scale)


def attention_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = sdpa(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _swapped(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Attention of tensors (B, N, H, D), its result merged."""

    def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return chipmunk.attention(layer, function, q, k, v, **options).flatten(2)

    return attend


def _merged(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = q.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    return chipmunk.attention(layer, attention_of_heads, q, k, v, heads)


WAYS: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda layer, q, k, v: chipmunk.attention(layer, sdpa, q, k, v).transpose(1, 2).flatten(2),
    "flash_attn": _swapped(flash_attn_func, dropout_p=0.0, causal=False, window_size=(-1, -1)),
    "xformers": _swapped(memory_efficient_attention, attn_bias=None),
    "dispatch": _swapped(dispatch_attention_fn, attn_mask=None, backend="native", parallel_config=None),
    "sage, tokens first": _swapped(sageattn, tensor_layout="NHD"),
    "sage": lambda layer, q, k, v: chipmunk.attention(layer, sageattn, q, k, v).transpose(1, 2).flatten(2),
    "heads, merged": _merged,
    "heads": lambda layer, q, k, v: chipmunk.attention(
        layer, attention_of_heads, q, k, v, q.shape[1], skip_reshape=True, mask=None, transformer_options={}
    ),
    "heads, result apart": lambda layer, q, k, v: (
        chipmunk.attention(layer, attention_of_heads, q, k, v, 4, skip_reshape=True, skip_output_reshape=True)
        .transpose(1, 2)
        .flatten(2)
    ),
}


def put(monkeypatch: pytest.MonkeyPatch, way: Callable[..., Tensor]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, chipmunk_layer: Any = None) -> Tensor:
        return way(chipmunk_layer, rotate(q, pe), rotate(k, pe), v)

    monkeypatch.setattr(flux_model, "attention", attention)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("renewed", [True, False])
def test_each_layout_is_as_sparse_as_sdpa(name: str, renewed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = build(), small(mlp__is_enabled=False, attn__recompute_mask=renewed)
    chipmunk.enable(model, settings)
    wanted = denoise(model, 13, **inputs())
    dense = denoise(build(), 13, **inputs())
    assert error(wanted, dense) > 1e-4
    put(monkeypatch, WAYS[name])
    assert same(denoise(build(), 13, **inputs()), dense)  # off: to the bit
    chipmunk.enable(model, settings)
    assert error(denoise(model, 13, **inputs()), wanted) < 1e-6
    calls = chipmunk.statistics(model).layers[2].attention["main"]
    assert calls.sparse > 0
    assert not calls.dense


Q = torch.randn(1, 2, 5, 4)
MASK = torch.ones(5, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "reason"),
    [
        (sdpa, (Q, Q, Q, MASK), {}, "mask"),
        (flash_attn_func, (Q, Q, Q), {"causal": True}, "causal"),
        (flash_attn_func, (Q, Q, Q, 0.1), {}, "dropout"),
        (flash_attn_func, (Q, Q, Q), {"window_size": (4, 4)}, "window"),
        (flash_attn_func, (Q, Q, Q), {"return_attn_probs": True}, "dropout"),
        (flash_attn_func, (Q, Q, Q), {"block_table": 1}, "block_table"),
        (flash_attn_func, (Q[0], Q[0], Q[0]), {}, "not (B, N, H, D)"),
        (memory_efficient_attention, (Q, Q, Q, MASK), {}, "mask"),
        (memory_efficient_attention, (Q, Q, Q), {"p": 0.5}, "dropout"),
        (sageattn, (Q, Q, Q, "DNH"), {}, "order"),
        (sageattn, (Q, Q, Q), {"return_lse": True}, "dropout"),
        (sageattn, (Q, Q, Q), {"attn_mask": MASK}, "mask"),
        (dispatch_attention_fn, (Q, Q, Q), {"parallel_config": object()}, "several devices"),
        (dispatch_attention_fn, (Q, Q, Q), {"attention_kwargs": {"window": 3}}, "dropout"),
        (attention_of_heads, (Q, Q, Q, 2, MASK), {"skip_reshape": True}, "mask"),
        (attention_of_heads, (Q, Q, Q, 2), {"skip_reshape": True, "attn_precision": torch.float32}, "precision"),
        (attention_of_heads, (Q, Q, Q, 2), {}, "not (B, N, heads"),
        (
            attention_of_heads,
            (Q, Q, Q, 2),
            {"skip_reshape": True, "transformer_options": {"optimized_attention_override": print}},
            "another attention function",
        ),
        (attention_of_heads, (Q, Q, Q, 2), {"skip_reshape": True, "low_precision": False}, "low_precision"),
        (sdpa, (Q, Q), {}, "three tensors"),
        (torch.nn.functional.softmax, (Q,), {}, "not one that Chipmunk knows"),
        (lambda q, k, v: q, (Q, Q, Q), {}, "not one that Chipmunk knows"),
    ],
)
def test_what_is_not_plain_attention(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    got = read_call(function, args, kwargs)
    assert isinstance(got, str)
    assert reason in got


def test_a_function_of_a_known_name_with_another_signature_is_unknown() -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor, Tensor]:
        return q, k

    assert read_call(flash_attn_func, (Q, Q, Q), {}) == "the attention function is not one that Chipmunk knows"


def test_views_not_copies() -> None:
    call = read_call(flash_attn_func, (Q, Q, Q), {"softmax_scale": 0.5})
    assert isinstance(call, AttentionCall)
    assert call.query.shape == (1, 5, 2, 4)
    assert call.query.data_ptr() == Q.data_ptr()
    assert call.scale == 0.5
    out = torch.randn(1, 2, 5, 4).transpose(1, 2)
    assert call.result(out).data_ptr() == out.data_ptr()
    merged = read_call(attention_of_heads, (Q[0], Q[0], Q[0], 2), {})
    assert isinstance(merged, AttentionCall)
    assert merged.query.data_ptr() == Q.data_ptr()
    assert merged.query.shape == (2, 2, 5, 2)
    assert merged.result(torch.randn(2, 5, 2, 2).transpose(1, 2)).shape == (2, 5, 4)


def test_a_mask_in_another_layout_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(1, 1, 68, 68, dtype=torch.bool)
    mask[..., 1:4] = False
    put(monkeypatch, _swapped(dispatch_attention_fn, attn_mask=mask))
    model = build()
    dense = denoise(build(), 9, **inputs())
    chipmunk.enable(model, small(mlp__is_enabled=False, patchify__is_enabled=False))
    assert same(denoise(model, 9, **inputs()), dense)
    assert chipmunk.statistics(model).layers[2].attention["main"] == Calls(dense={"an attention mask is given": 9})


@pytest.mark.parametrize("name", ["sdpa", "dispatch", "heads"])
def test_traced_without_a_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question which function it is is answered while tracing."""
    put(monkeypatch, WAYS[name])
    model, settings = build(), small(mlp__is_enabled=False)
    chipmunk.enable(model, settings)
    wanted = denoise(model, 11, **inputs())
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend="eager", fullgraph=True)
    chipmunk.enable(model, settings)
    assert error(denoise(model, 11, **inputs()), wanted) < 1e-6
    assert chipmunk.statistics(model).layers[2].attention["main"].sparse > 0
