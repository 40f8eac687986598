"""The model card, from the log of a training.

python -m training.card model/log.jsonl templates/flux-starter/MODEL_CARD.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from string import Template
from typing import Any

from flux.util import configs

from training.data import KINDS, VOCABULARY
from training.flow import GUIDANCE
from training.photographs import PHOTOGRAPHS

PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def card(log: list[dict[str, Any]]) -> str:
    """The card as Markdown, card.md filled in. `log`: the lines that a training wrote."""
    settings = log[0]["settings"]
    events = {line["event"]: line for line in reversed(log) if "event" in line}  # the first of each kind
    saved = [line for line in log if line.get("event") == "saved"]
    last = saved[-1]
    spec = configs["flux-mini"]
    values = {
        "parameters": f"{events['model']['parameters'] / 1e6:.1f}",
        "depth": spec.params.depth,
        "depth_single": spec.params.depth_single_blocks,
        "width": spec.params.hidden_size,
        "heads": spec.params.num_heads,
        "axes": ", ".join(map(str, spec.params.axes_dim)),
        "text_tokens": spec.text_tokens,
        "vocabulary": len(VOCABULARY),
        "num_steps": spec.num_steps,
        "guidance": spec.guidance,
        "lowest": GUIDANCE[0],
        "highest": GUIDANCE[1],
        "average": settings["average"],
        "learning_rate": f"{settings['learning_rate']:g}",
        "batch": settings["batch"],
        "drop_text": f"{100 * settings['drop_text']:.0f}",
        "seed": settings["seed"],
        "test_seed": settings["seed"] + 1,
        "teacher": f"{events['teacher']['step']:,}",
        "steps": f"{last['step']:,}",
        "images": f"{last['images']:,}",
        "minutes": f"{log[-1]['seconds'] / 60:.1f}",
        "device": log[0]["device"],
        "torch": log[0]["torch"],
        "loss": [line["loss"] for line in log if "loss" in line][-1],
        "table": "\n".join(
            f"| {line['seconds'] / 60:.1f} | {line['step']:,} | {line['images']:,} | {line['test_loss']:.4f} |"
            for line in saved
        ),
        "scenes": f"{events['painted']['scenes']:,}",
        "kinds": ", ".join(f"{kind} {100 * KINDS.count(kind) / len(KINDS):.0f} %" for kind in dict.fromkeys(KINDS)),
        "photographs": "\n".join(
            f"| {photo.subject} | {photo.file} of {PACKAGES[photo.package]} | {photo.author} | {photo.licence} |"
            for photo in PHOTOGRAPHS
        ),
    }
    return Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8")).substitute(values)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    Path(sys.argv[2]).write_text(card([json.loads(line) for line in lines]), encoding="utf-8")
