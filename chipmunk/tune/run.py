"""`chipmunk tune`: the cheapest configuration above a floor, for the model at hand."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from chipmunk import config as configuration
from chipmunk.config import FILE_NAME, Config
from chipmunk.fidelity.run import FidelityOptions, Prepared, prepare, work_on
from chipmunk.registry import data_path
from chipmunk.tune.write import rendered
from chipmunk.verify.process import Progress


@dataclass(frozen=True)
class TuneOptions:
    """What the user can choose beside what `chipmunk fidelity` can."""

    fidelity: FidelityOptions
    """Its seeds are those that are tuned on."""
    floor: float = 30.0
    """dB: the mean PSNR that has to be kept."""
    confirm_seeds: tuple[int, ...] = (100,)
    """Of the pictures that the choice is confirmed on."""
    start: Path | None = None
    """The configuration to begin with; the defaults without one."""
    trials: int = 60
    cost: str | None = None
    """What is to be small: `seconds` or `FLOPs`; None: seconds on a GPU, FLOPs on a CPU."""

    @property
    def measure(self) -> str:
        """`seconds` or `FLOPs`."""
        return self.cost or ("FLOPs" if self.fidelity.device == "cpu" else "seconds")


@dataclass(frozen=True)
class TuneReport:
    """The outcome of one search."""

    root: Path
    target: str | None
    floor: float
    trail: tuple[dict[str, Any], ...]
    """Configurations that held the floor while tuning, each cheaper than the one before."""
    tried: tuple[dict[str, Any], ...]
    tuned: dict[str, Any] | None
    """The one that was chosen: `config`, `fidelity` (dB), `cost` (dense = 1), `pictures`; None if none holds."""
    confirmed: dict[str, Any] | None
    """The same on other seeds; None if the search was interrupted."""
    interrupted: bool
    cost: str
    """`seconds` or `FLOPs`."""
    about: dict[str, str]
    """Model, weights, device and versions."""
    text: str
    """The commented configuration; empty if there is none."""
    command: str
    seconds: float

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else 0 if self.tuned is not None else 1

    def to_json(self) -> dict[str, Any]:
        found = "interrupted" if self.interrupted else "tuned" if self.tuned is not None else "below"
        return {
            "status": found,
            "target": self.target,
            "root": str(self.root),
            "files": [],
            "sites": [],
            "floor": self.floor,
            "cost": self.cost,
            "tuned": self.tuned,
            "confirmed": self.confirmed,
            "trail": list(self.trail),
            "tried": list(self.tried),
            "environment": self.about,
            "command": self.command,
            "seconds": round(self.seconds, 2),
        }


def run(root: Path, options: TuneOptions, progress: Progress | None = None) -> TuneReport:
    """Search on the patched repository at `root`.

    An interruption (Ctrl-C) while the search runs is no error: the best so far is returned, marked as such. Raises
    FidelityError, VerifyError or ConfigError where nothing can be tried.
    """
    started = time.perf_counter()
    fidelity = options.fidelity
    start, base = _start(options.start)
    with tempfile.TemporaryDirectory(prefix="chipmunk-tune-") as folder:
        work = Path(folder).resolve()
        asked = replace(fidelity, seeds=(*fidelity.seeds, *options.confirm_seeds), floor=0)
        prepared = prepare(root, asked, work)
        order = {"floor": options.floor, "start": start, "trials": options.trials, "cost": options.measure}
        theirs = work_on(replace(prepared.original, tune=order), prepared, asked, progress)
        count = len(theirs["dense"]["pictures"]) // len(asked.seeds)  # prompts
        spec = replace(prepared.patched, tune={**order, "tuning": count * len(fidelity.seeds)})
        interrupted = False
        try:
            result = work_on(spec, prepared, asked, progress)
        except KeyboardInterrupt:
            best = spec.out / "best.json"
            if not best.exists() or not json.loads(best.read_text())["trail"]:
                raise
            result, interrupted = {**theirs, **json.loads(best.read_text())}, True
    return _report(prepared, options, result, base, interrupted, time.perf_counter() - started)


def _start(path: Path | None) -> tuple[dict[str, Any], str]:
    """The configuration to begin with, and the commented text to write the result into."""
    if path is None:
        return {}, data_path(FILE_NAME).read_text(encoding="utf-8")
    content: dict[str, Any] = configuration.load(path).model_dump(mode="json", by_alias=True, exclude_unset=True)
    return content, path.read_text(encoding="utf-8")


def _report(
    prepared: Prepared,
    options: TuneOptions,
    result: Mapping[str, Any],
    base: str,
    interrupted: bool,
    seconds: float,
) -> TuneReport:
    both = result["confirmed"]
    tuned = both["tuned"] if both else result["trail"][-1] if interrupted else None
    confirmed = both["confirmed"] if both else None
    found = TuneReport(
        root=prepared.root,
        target=prepared.plan.target,
        floor=options.floor,
        trail=tuple(result["trail"]),
        tried=tuple(result["tried"]),
        tuned=tuned,
        confirmed=confirmed,
        interrupted=interrupted,
        cost=options.measure,
        about=result["environment"],
        text="",
        command=options.fidelity.command,
        seconds=seconds,
    )
    if tuned is None:
        return found
    about = _about(found, result, options)
    text = rendered(base, tuned["config"], about)
    if not _says(text, tuned["config"]):  # sections in braces, say: the start's comments cannot be kept
        text = rendered("", tuned["config"], about)
        assert _says(text, tuned["config"])
    return replace(found, text=text)


def _about(found: TuneReport, result: Mapping[str, Any], options: TuneOptions) -> list[str]:
    """The figures, as the first lines of the file."""
    assert found.tuned is not None
    about, width_height = found.about, "x".join(map(str, result["size"]))
    what = "PSNR of the pictures" if result["decodes"] else "PSNR of the latents"
    lines = [
        f"Found by: {found.command}",
        f"On {date.today().isoformat()}: {about['model']}, weights: {about['weights']}, {about['dtype']},",
        f"{about['device']}; {width_height}, {options.fidelity.steps} steps.",
        f"Tuned on {_pictures(found.tuned['pictures'])}: {found.tuned['cost']:.1%} of the dense {found.cost}, "
        f"{what} {found.tuned['fidelity']:.1f} dB (floor {found.floor:g} dB).",
    ]
    if found.confirmed is None:
        return [*lines, "Interrupted: the best so far, not confirmed on other seeds."]
    return [
        *lines,
        f"Confirmed on {_pictures(found.confirmed['pictures'])} of other seeds: {found.confirmed['cost']:.1%}, "
        f"{found.confirmed['fidelity']:.1f} dB.",
    ]


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _says(text: str, config: Mapping[str, Any]) -> bool:
    """Whether the text that is to be written says what was found."""
    with tempfile.TemporaryDirectory(prefix="chipmunk-tune-") as folder:
        path = Path(folder) / FILE_NAME
        path.write_text(text, encoding="utf-8")
        try:
            read = configuration.load(path)
        except configuration.ConfigError:
            return False
    wanted = Config.model_validate_json(json.dumps(config))
    parts = ("mlp", "attn", "patchify", "step_caching", "min_steps")
    return all(getattr(read, part) == getattr(wanted, part) for part in parts)
