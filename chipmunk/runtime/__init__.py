"""What patched code imports: the session of a model, the step clock, sparse attention and sparse MLPs."""

from chipmunk.runtime.session import disable, enable, model_forward, slot, statistics, steps
from chipmunk.runtime.sparse_attention import attention, layer
from chipmunk.runtime.sparse_mlp import cat_linear, mlp, split_linear

__all__ = [
    "attention",
    "cat_linear",
    "disable",
    "enable",
    "layer",
    "mlp",
    "model_forward",
    "slot",
    "split_linear",
    "statistics",
    "steps",
]
