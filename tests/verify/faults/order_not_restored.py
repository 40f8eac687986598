"""The model's output stays in the order of patches."""

from chipmunk.runtime.token_order import TokenOrder

TokenOrder.undo = lambda self, x, implementation: x  # type: ignore[method-assign]
