"""The schedule is that of the step before, as if one layer had counted late."""

from typing import Any

from chipmunk.runtime import layer_plan


def late(rule: Any) -> Any:
    return lambda config, count, *known: rule(config, max(count - 1, 0), *known)


layer_plan.attention_step = late(layer_plan.attention_step)
layer_plan.mlp_step = late(layer_plan.mlp_step)
