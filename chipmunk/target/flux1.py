"""FLUX.1 under the names of its official repository: its sizes, and what the shapes of its tensors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chipmunk.target.signature import CannotRun
from chipmunk.target.tensors import depth

SMALL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 5,
    "depth_single_blocks": 3,
    "axes_dim": [8, 28, 28],
    "theta": 10_000,
    "qkv_bias": True,
    "guidance_embed": True,
}
"""A model that a CPU runs in milliseconds: three blocks of each kind after two dense ones."""

FULL: dict[str, Any] = {
    **SMALL,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
}
"""FLUX.1-dev."""


def values_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The same names, read from the shapes of a checkpoint's tensors; channels are those of a token.

    `vec_in_dim` is left out where there is no pooled prompt (Chroma). Raises CannotRun where the names are not those of
    FLUX.
    """
    try:
        hidden, channels = shapes["img_in.weight"]
        head = shapes["single_blocks.0.norm.query_norm.scale"][0]
        found: dict[str, Any] = {
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0],
            "context_in_dim": shapes["txt_in.weight"][1],
            "hidden_size": hidden,
            "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
            "num_heads": hidden // head,
            "depth": depth(shapes, "double_blocks"),
            "depth_single_blocks": depth(shapes, "single_blocks"),
            "axes_dim": axes_of(head),
            "theta": 10_000,
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in shapes,
            "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        }
    except KeyError as missing:
        raise CannotRun(f"the checkpoint has no tensor {missing}: it is not one of FLUX") from missing
    pooled = shapes.get("vector_in.in_layer.weight")
    return found if pooled is None else {**found, "vec_in_dim": pooled[1]}


def axes_of(head: int) -> list[int]:
    """How the rotary embedding's axes share a head's channels: one eighth belongs to the first."""
    side = head * 7 // 16
    return [head - 2 * side, side, side]
