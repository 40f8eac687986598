"""What patched code imports: the session of a model, the step clock, sparse attention and sparse MLPs."""

from chipmunk.runtime.control import disable, enable, slot, statistics, steps
from chipmunk.runtime.session import model_forward
from chipmunk.runtime.sparse_attention import attention, layer
from chipmunk.runtime.sparse_mlp import (
    activate,
    cat_linear,
    gated,
    held_linear,
    mlp,
    mlp_linear,
    out_linear,
    split_held,
    split_linear,
)
from chipmunk.runtime.step_caching import blocks, hidden

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
