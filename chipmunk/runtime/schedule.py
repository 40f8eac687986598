"""Which step of a generation is full and which is sparse, from a layer's own count of calls."""

from __future__ import annotations

from chipmunk.config import Attention, Mlp

SELECT_ALWAYS_BEFORE = 10
"""A sparse MLP step with a lower count selects its neurons anew, whatever `block_mask_cache` says."""


def _is_due(count: int, every: int | None) -> bool:
    """Every so many calls, or at 0, 1, 3, 7, 15, …: each gap twice the one before.

    What a sparse step leaves out in the first steps grows all along the loop, so that early full steps are worth more.
    """
    return (count + 1) & count == 0 if every is None else count % every == 0


def attention_is_full(attn: Attention, count: int) -> bool:
    """Whether the call number `count` of a layer, from 0, is a full attention step."""
    if attn.full_step_schedule is not None:
        return count == 0 or count in attn.full_step_schedule
    return count == 1 or _is_due(count, attn.full_step_every)


def attention_step(attn: Attention, count: int, has_selection: bool, overdue: bool = False) -> tuple[str, bool]:
    """Kind of the attention step `count`, and whether it selects keys.

    A full step that another one follows has no use for caches: it is `dense`. overdue: a full step came on a step of
    the loop that was skipped.
    """
    if not attention_is_full(attn, count) and not overdue:
        return "sparse", False
    if attention_is_full(attn, count + 1):
        return "dense", False
    return "full", attn.recompute_mask or not has_selection


def mlp_is_full(mlp: Mlp, count: int) -> bool:
    """Whether the call number `count` of a layer, from 0, is a full MLP step."""
    return _is_due(count, mlp.full_step_every)


def neurons_are_due(mlp: Mlp, count: int) -> bool:
    """Whether a sparse MLP step `count` selects its neurons anew."""
    return count < SELECT_ALWAYS_BEFORE or count % mlp.block_mask_cache == 0


def mlp_step(mlp: Mlp, count: int, selected_since_full: bool, overdue: bool = False) -> tuple[str, bool]:
    """Kind of the MLP step `count`, and whether it selects neurons. overdue: a full step was skipped."""
    if mlp.full_step_every == 1:
        return "dense", False
    if mlp_is_full(mlp, count) or overdue:
        return "full", False
    return "sparse", neurons_are_due(mlp, count) or not selected_since_full
