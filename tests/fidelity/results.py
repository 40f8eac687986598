"""Hand-made results of a fidelity run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chipmunk.fidelity.report import FidelityReport

STEPS = 4
KINDS = ("dense/full", "full/sparse", "sparse/sparse", "skipped")
COSTS = {"dense/full": 100, "full/sparse": 90, "sparse/sparse": 50, "skipped": 2, "dense/dense": 100}


def picture(
    psnr: float | None = 32.0, kinds: tuple[str, ...] = KINDS, seconds: float = 2.0, seed: int = 0
) -> dict[str, Any]:
    costs = [COSTS[kind] for kind in kinds]
    return {
        "prompt": "a cat <b>",
        "seed": seed,
        "psnr": psnr,
        "ssim": None if psnr is None else 0.95,
        "latent_psnr": 28.0,
        "l2": 0.1,
        "cosine": 0.99,
        "steps": [{"l2": 0.01 * step, "cosine": 1.0} for step in range(STEPS)] if len(kinds) == STEPS else [],
        "seconds": seconds,
        "step_seconds": [seconds / len(kinds)] * len(kinds),
        "kinds": list(kinds),
        "call_flops": costs,
        "flops": sum(costs),
        "sparsifiable_flops": sum(costs) // 2,
    }


def variant(
    name: str,
    family: str = "sparse",
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """settings: every value that ran, as results had none of at first."""
    return {
        **({} if settings is None else {"settings": settings}),
        "name": name,
        "family": family,
        "config": config,
        "steps": STEPS,
        "notes": [],
        "pictures": [picture(seed=0, **given), picture(seed=1, **given)],
        "coverage": {"attention": {"2": [[2, 0.5]], "3": [[2, 0.7]]}, "mlp": {"2": [[1, 0.25], [2, 0.75]]}},
    }


def results(*variants: dict[str, Any], decodes: bool = True) -> dict[str, Any]:
    dense = [{"prompt": "a cat <b>", "seed": s, "seconds": 3.0, "step_seconds": [0.75] * STEPS} for s in (0, 1)]
    again = {"psnr": 100.0, "ssim": 1.0, "latent_psnr": 100.0, "l2": 0.0, "cosine": 1.0}
    return {
        "environment": {
            "device": "CPU", "model": "Flux of model.py", "weights": "random", "dtype": "float32", "torch": "2.9"
        },
        "size": [64, 32],
        "steps": STEPS,
        "decodes": decodes,
        "pictures": [{"prompt": "a cat <b>", "seed": 0}, {"prompt": "a cat <b>", "seed": 1}],
        "layers": [f"double_blocks.{index}" for index in range(4)],
        "cost": {"dense_call": 100, "dense_sparsifiable_call": 80, "outside": 2, "layers": []},
        "dense": {"pictures": dense, "flops": 400, "sparsifiable_flops": 320},
        "floor": {"again": {"pictures": [], "summary": again}},
        "variants": list(variants) or [variant("defaults", config={})],
        "notes": ["a note"],
    }  # fmt: skip


def report(*variants: dict[str, Any], decodes: bool = True, require: float | None = None) -> FidelityReport:
    return FidelityReport(
        root=Path("/home/me/flux"),
        target="flux",
        results=results(*variants, decodes=decodes),
        command="chipmunk fidelity flux",
        require_psnr=require,
    )
