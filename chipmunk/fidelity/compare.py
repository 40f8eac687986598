"""The rivals of a comparison, each with several settings: fewer dense steps, step caching, and cache-dit."""

from __future__ import annotations

import subprocess
from typing import Any

from chipmunk.fidelity.spec import Variant

FEWER = (0.8, 0.65, 0.5, 0.35, 0.25)
"""Fractions of the steps that the dense model is given."""

SPARSE: dict[str, dict[str, Any]] = {
    "sparse, keep more": {"attn": {"top_keys": 0.35}, "mlp": {"top_keys": 0.5}},
    "sparse": {},
    "sparse, keep less": {"attn": {"top_keys": 0.08}, "mlp": {"top_keys": 0.15}},
    "sparse, keep less, full every 20": {
        "attn": {"top_keys": 0.08, "full_step_every": 20},
        "mlp": {"top_keys": 0.15, "full_step_every": 20},
    },
}

ADAPTIVE = (0.75, 0.6, 0.5, 0.4, 0.3)
"""Fractions of the steps that are computed."""


def comparison(steps: int, python: str) -> tuple[Variant, ...]:
    """All variants for a run of `steps` steps; those of cache-dit only where `python` has it."""
    found = [
        Variant(f"{count} dense steps", steps=count, method="dense", family="fewer dense steps")
        for count in dict.fromkeys(max(round(fraction * steps), 1) for fraction in FEWER)
    ]
    found += [Variant(name, config, family="sparse") for name, config in SPARSE.items()]
    static = {"is_enabled": True, "mode": "static"}
    found.append(Variant("sparse + static", {"step_caching": static}, family="sparse + static step caching"))
    found += [
        Variant(
            f"sparse + adaptive, {keep:.0%} of steps",
            {"step_caching": {"is_enabled": True, "mode": "adaptive", "keep": keep}},
            family="sparse + adaptive step caching",
        )
        for keep in ADAPTIVE
    ]
    off = {"attn": {"is_enabled": False}, "mlp": {"is_enabled": False}}
    found += [
        Variant(
            f"adaptive alone, {keep:.0%} of steps",
            {**off, "step_caching": {"is_enabled": True, "mode": "adaptive", "keep": keep}},
            family="adaptive step caching alone",
        )
        for keep in ADAPTIVE
    ]
    if _has_cache_dit(python):
        found += cache_dit()
    return tuple(found)


def cache_dit() -> list[Variant]:
    """cache-dit's DBCache with thresholds around its own default, without and with TaylorSeer."""
    return []


def _has_cache_dit(python: str) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cache_dit') is None)"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0
