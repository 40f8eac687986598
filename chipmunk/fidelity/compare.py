"""The rivals of a comparison, each with several settings: fewer dense steps, step caching, and cache-dit."""

from __future__ import annotations

import subprocess
from typing import Any

from chipmunk.fidelity.spec import Variant

FEWER = (0.8, 0.65, 0.5, 0.35, 0.25)
"""Fractions of the steps that the dense model is given."""

_FINE_KEYS, _FINE_NEURONS = {"counts_multiple_of": 16}, {"counts_multiple_of": 64}
SPARSE: dict[str, dict[str, Any]] = {
    "sparse, keep more": {"attn": {"top_keys": 0.35}, "mlp": {"top_keys": 0.5}},
    "sparse": {},
    "sparse, keep less": {"attn": {"top_keys": 0.1, **_FINE_KEYS}, "mlp": {"top_keys": 0.2, **_FINE_NEURONS}},
    "sparse, keep least": {
        "attn": {"top_keys": 0.05, "full_step_every": 20, **_FINE_KEYS},
        "mlp": {"top_keys": 0.1, "full_step_every": 20, **_FINE_NEURONS},
    },
}
"""Small models need counts that are multiples of less: rounding to whole tiles would undo the difference."""

ADAPTIVE = (0.75, 0.6, 0.5, 0.4, 0.3)
"""Fractions of the steps that are computed."""


THRESHOLDS = (0.08, 0.16, 0.3, 0.6, 1.2)
"""Of cache-dit: relative change of the first block's residual up to which a step is not computed."""


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


ABLATION: dict[str, dict[str, Any]] = {
    "defaults": {},
    "recompute_mask: false": {"attn": {"recompute_mask": False}},
    "block_mask_cache: 2": {"mlp": {"block_mask_cache": 2}},
    "attn.top_keys: 0.08": {"attn": {"top_keys": 0.08}},
    "attn.top_keys: 0.3": {"attn": {"top_keys": 0.3}},
    "mlp.top_keys: 0.15": {"mlp": {"top_keys": 0.15}},
    "mlp.top_keys: 0.5": {"mlp": {"top_keys": 0.5}},
    "mlp.random_keys: 0": {"mlp": {"random_keys": 0.0}},
    "attn.random_keys: 0.03": {"attn": {"random_keys": 0.03}},
    "token order off": {"patchify": {"is_enabled": False}},
    "full_step_every: 10": {"attn": {"full_step_every": 10}, "mlp": {"full_step_every": 10}},
    "full_step_every: 5": {"attn": {"full_step_every": 5}, "mlp": {"full_step_every": 5}},
    "full_step_every: 20": {"attn": {"full_step_every": 20}, "mlp": {"full_step_every": 20}},
    "groups of 64": {"attn": {"mbm": 64}, "mlp": {"bm": 64, "mbm": 64}},
    "groups of 192 and 256": {"attn": {"mbm": 192}, "mlp": {"bm": 256, "mbm": 256}},
    "counts in multiples of 16": {"attn": {"counts_multiple_of": 16}, "mlp": {"counts_multiple_of": 16}},
    "attention alone": {"mlp": {"is_enabled": False}},
    "MLPs alone": {"attn": {"is_enabled": False}},
}
"""One setting changed at a time."""


def ablation() -> tuple[Variant, ...]:
    """What each setting costs and brings, beside the defaults."""
    return tuple(Variant(name, config, family="one setting changed") for name, config in ABLATION.items())


def cache_dit() -> list[Variant]:
    """cache-dit's DBCache with thresholds around its own default of 0.08, without and with TaylorSeer.

    One block decides and is always computed (F1B0, the fastest of its presets); four steps warm up, as in Chipmunk's
    adaptive mode.
    """
    base = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}
    return [
        Variant(
            f"{family}, {threshold:g}",
            method="cache-dit",
            settings={**base, **more, "residual_diff_threshold": threshold},
            family=family,
        )
        for family, more in (("cache-dit", {}), ("cache-dit TaylorSeer", {"taylorseer_order": 1}))
        for threshold in THRESHOLDS
    ]


def _has_cache_dit(python: str) -> bool:
    names = "('cache_dit', 'diffusers', 'transformers')"
    probe = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in {names}))"
    return subprocess.run([python, "-c", probe], check=False).returncode == 0
