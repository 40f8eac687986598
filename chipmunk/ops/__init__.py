"""The eight operators that sparse FLUX is made of, each with `reference.py` (PyTorch, the oracle) and `triton.py`.

Every operator is registered with `torch.library` under `chipmunk::` and takes `implementation`: `auto` (Triton where
it supports the input on a CUDA device, otherwise the reference, with the reason handed to `record_fallbacks`),
`reference`, or `triton` (an error where it cannot run: a choice that was made explicitly never falls back).
"""

from chipmunk.ops.attention_with_column_sums import attention_with_column_sums
from chipmunk.ops.column_sparse_attention import column_sparse_attention
from chipmunk.ops.dispatch import IMPLEMENTATIONS, dense_results_only, record_fallbacks
from chipmunk.ops.reorder_tokens import reorder_tokens
from chipmunk.ops.select_columns import select_columns
from chipmunk.ops.select_neurons import select_neurons
from chipmunk.ops.sparse_mlp_in import sparse_mlp_in
from chipmunk.ops.sparse_mlp_out import sparse_mlp_out
from chipmunk.ops.sparse_swiglu_in import sparse_swiglu_in

__all__ = [
    "IMPLEMENTATIONS",
    "attention_with_column_sums",
    "column_sparse_attention",
    "dense_results_only",
    "record_fallbacks",
    "reorder_tokens",
    "select_columns",
    "select_neurons",
    "sparse_mlp_in",
    "sparse_mlp_out",
    "sparse_swiglu_in",
]
