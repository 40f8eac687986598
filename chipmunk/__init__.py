"""Chipmunk for FLUX: sparse attention and MLPs for a FLUX repository of your own.

The names below are what patched code calls. They are loaded on first use, so that the command line, which computes
nothing, never pays for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipmunk.runtime import (
        activate,
        attention,
        blocks,
        cat_linear,
        disable,
        enable,
        gated,
        held_linear,
        hidden,
        layer,
        mlp,
        mlp_linear,
        model_forward,
        out_linear,
        slot,
        split_held,
        split_linear,
        statistics,
        steps,
    )

__version__ = "0.1.0"

__all__ = [
    "activate",
    "attention",
    "blocks",
    "cat_linear",
    "disable",
    "enable",
    "gated",
    "held_linear",
    "hidden",
    "layer",
    "mlp",
    "mlp_linear",
    "model_forward",
    "out_linear",
    "slot",
    "split_held",
    "split_linear",
    "statistics",
    "steps",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chipmunk' has no attribute {name!r}")
    runtime = import_module("chipmunk.runtime")
    globals().update({public: getattr(runtime, public) for public in __all__})
    return globals()[name]
