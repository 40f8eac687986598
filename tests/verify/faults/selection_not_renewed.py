"""Neurons are chosen once after each full step, and never anew."""

from typing import Any

from chipmunk.runtime import layer_plan


def mlp_step(config: Any, count: int, selected_since_full: bool, *overdue: bool) -> tuple[str, bool]:
    kind, select = original(config, count, selected_since_full, *overdue)
    return kind, select and not selected_since_full


original = layer_plan.mlp_step
layer_plan.mlp_step = mlp_step
