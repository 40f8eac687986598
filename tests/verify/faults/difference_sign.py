"""The cached difference is sparse − dense."""

from typing import Any

from chipmunk import ops


def column_sparse_attention(q: Any, k: Any, v: Any, indices: Any, addend: Any, group: int, scale: float, subtract: bool, *rest: Any) -> Any:  # fmt: skip  # noqa: E501
    result = original(q, k, v, indices, addend, group, scale, subtract, *rest)
    return -result if subtract else result


original = ops.column_sparse_attention
ops.column_sparse_attention = column_sparse_attention
