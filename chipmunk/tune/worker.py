"""The search in the patched side's process, where the model is; the best so far is on the disk at every moment."""

from __future__ import annotations

import json
import os
from statistics import fmean, median
from typing import Any

import chipmunk
from chipmunk.config import Config
from chipmunk.fidelity.artist import Artist
from chipmunk.fidelity.spec import Spec
from chipmunk.fidelity.worker import finish
from chipmunk.tune.search import Search, Trial, as_json, confirmed

BEST = "best.json"


def search(spec: Spec) -> dict[str, Any]:
    """Run the order `spec.tune`: `floor` (dB), `tuning` (how many pictures are tuned on; the rest confirm), `start` (a
    configuration), `trials`, and `cost`, which is to be small: `seconds` or `FLOPs`."""
    order = spec.tune
    assert order is not None
    artist = Artist(spec, 0)
    cost = artist.cost()
    chosen, others = range(order["tuning"]), range(order["tuning"], len(artist.pictures))
    artist.total = order["trials"] + len(others) + 1
    timed = order["cost"] == "seconds"
    known: dict[str, dict[int, tuple[float, float]]] = {}

    def measured(config: dict[str, Any], index: int) -> tuple[float, float]:
        """Fidelity and cost of one picture."""
        of_config = known.setdefault(json.dumps(config, sort_keys=True), {})
        if index in of_config:
            return of_config[index]
        # operations can be counted without compiling, which takes longer than a picture
        chipmunk.enable(artist.model, config if timed else {**config, "compile": False})
        if artist.cuda and timed and not of_config:  # the first picture pays for compilation
            artist.studio.draw(artist.pictures[index], spec.steps, decode=False)
        drawing, recorded = artist.draw(artist.pictures[index], spec.steps, said[0])
        result = artist.measure(index, drawing, recorded, cost)
        chipmunk.disable(artist.model)
        fidelity = result["latent_psnr"] if result["psnr"] is None else result["psnr"]
        dense = artist.dense(index)
        spent = result["seconds"] / dense.seconds
        if not timed:
            spent = result["flops"] / (cost.dense * len(dense.step_seconds))
        of_config[index] = (fidelity, spent)
        return of_config[index]

    def measure(config: dict[str, Any], pictures: range) -> Trial:
        found = [measured(config, index) for index in pictures]
        return Trial(config, fmean(f for f, _ in found), median(c for _, c in found), len(found))

    said = ["the start"]

    def watch(what: str, trial: Trial, best: Trial | None, left: int) -> None:
        if best is not None:
            said[0] = f"best {best.cost:.0%} of dense at {best.fidelity:.1f} dB; tried {what}"
        save()

    def save(**more: Any) -> None:
        """Write down what is known, whole or not at all."""
        temporary = spec.out / f".{BEST}"
        trail = [as_json(trial) for trial in found.trail]
        tried = [{"what": what, **(as_json(trial) or {})} for what, trial in found.tried]
        temporary.write_text(json.dumps({"trail": trail, "tried": tried, "confirmed": None, **more}))
        os.replace(temporary, spec.out / BEST)

    defaults = Config().model_dump(mode="json", by_alias=True)
    found = Search(
        lambda config, pictures: measure(config, range(pictures)),
        order["floor"],
        len(chosen),
        defaults,
        watch,
        order["trials"],
    )
    found.run(order["start"])
    said[0] = "confirming on other seeds"
    both = confirmed(found.trail, lambda config: measure(config, others or chosen), order["floor"])
    save(confirmed=None if both is None else {"tuned": as_json(both[0]), "confirmed": as_json(both[1])})
    return finish(artist, json.loads((spec.out / BEST).read_text()))
