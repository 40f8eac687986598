"""Where the attention of FLUX models stands in real repositories, and whether the tool finds it there.

Read in their code, one by one. Only a FLUX model's own files are listed: a repository may hold
other models of the same kind, which are found as well. To compare, with repositories at hand:

    python docs/expected_sites.py black-forest-labs/flux2=~/flux2 XLabs-AI/x-flux=~/x-flux
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from chipmunk.apply import read
from chipmunk.registry import load
from chipmunk.rewrite import plan_repository

PATCHES = ["attention", "model-forward"]


class Sites(NamedTuple):
    """Of one file, or of all files of a name: how many sites of each kind it holds."""

    patched: int
    """Calls on the way from a block to its joint attention, and that call itself."""
    dense: int = 0
    """Attention that stays as it is: adapters' cross-attention, pieces, functions that are not handled."""
    models: int = 0
    """Forwards that are marked."""


EXPECTED: dict[str, dict[str, Sites]] = {
    "XLabs-AI/x-flux": {  # processors that are given the block: plain, LoRA and IP-adapter, of both kinds of block
        "src/flux/model.py": Sites(0, models=1),
        "src/flux/modules/layers.py": Sites(6, dense=2),
        "src/flux/math.py": Sites(1),
        "src/flux/controlnet.py": Sites(0),
    },
    "bytedance/UNO": {
        "uno/flux/model.py": Sites(0, models=1),
        "uno/flux/modules/layers.py": Sites(4),
        "uno/flux/math.py": Sites(1),
    },
    "aredden/flux-fp8-api": {"modules/flux_model.py": Sites(3, models=1)},
    "black-forest-labs/flux2": {"src/flux2/model.py": Sites(3, models=1)},
    "Comfy-Org/ComfyUI": {  # two arms in the double block; video models borrow the blocks
        "comfy/ldm/flux/model.py": Sites(0, models=1),
        "comfy/ldm/flux/layers.py": Sites(3),
        "comfy/ldm/flux/math.py": Sites(1),
        "comfy/ldm/hunyuan_video/model.py": Sites(0),
        "comfy/ldm/hunyuan3d/model.py": Sites(0),
    },
    "modelscope/DiffSynth-Studio": {  # FLUX.1: the model's work in a function; FLUX.2: one function over many libraries
        "diffsynth/pipelines/flux_image.py": Sites(0, models=1),
        "diffsynth/models/flux_dit.py": Sites(3, dense=2),
        "diffsynth/models/flux2_dit.py": Sites(2, models=1),
        "diffsynth/core/attention/attention.py": Sites(6, dense=3),
    },
    "kohya-ss/sd-scripts": {
        "library/flux_models.py": Sites(3, models=1),
        "library/chroma_models.py": Sites(0),
    },
    "Shenyi-Z/TaylorSeer": {  # several branches, of which one runs
        "TaylorSeer-FLUX/src/flux/model.py": Sites(0, models=1),
        "TaylorSeer-FLUX/src/flux/modules/layers.py": Sites(4),
        "TaylorSeer-FLUX/src/flux/math.py": Sites(1),
    },
    "huggingface/diffusers": {  # processors below a module of the block; FLUX.2's may keep keys of reference images,
        # and attend twice in one call to get them: reference images to themselves (dense), all others to everything
        "src/diffusers/models/transformers/transformer_flux.py": Sites(2, dense=1, models=1),
        "src/diffusers/models/transformers/transformer_flux2.py": Sites(11, dense=1, models=1),
        "src/diffusers/models/controlnets/controlnet_flux.py": Sites(0),
    },
}


def main() -> None:
    wrong = 0
    registry = load()
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("=")
        plan = plan_repository(read(Path(path).expanduser()).files, registry, only=PATCHES)
        found = Counter((site.file, site.patch, site.status.value) for site in plan.sites)
        for file, expected in EXPECTED[name].items():
            got = Sites(
                found[file, "attention", "patched"],
                found[file, "attention", "left dense"],
                found[file, "model-forward", "patched"],
            )
            wrong += got != expected
            print(f"{name} {file}: " + ("as expected" if got == expected else f"{got}, expected {expected}"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
