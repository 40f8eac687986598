"""`chipmunk bench`: the patched repository beside its original, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from chipmunk import config as configuration
from chipmunk import registry
from chipmunk.apply.errors import quoted
from chipmunk.bench.measurement import Comparison, Run, compare, steady
from chipmunk.bench.process import BenchError, Progress, run_worker
from chipmunk.bench.record import Record
from chipmunk.bench.spec import Event, Spec
from chipmunk.rewrite.plan import ModelFacts, Site
from chipmunk.verify.configurations import configurations
from chipmunk.verify.original import rebuild
from chipmunk.verify.process import environment
from chipmunk.verify.run import original_plan, patched_repository, target_of


@dataclass(frozen=True)
class BenchOptions:
    """What the user can choose."""

    sizes: tuple[tuple[int, int], ...] = ((1280, 768),)
    """Width and height in pixels, multiples of 16."""
    steps: int = 50
    batch: int = 1
    images: int = 4
    """Pictures of each size; what the third and later ones take counts."""
    configs: tuple[Path, ...] = ()
    """Configurations to compare; by default the one that applies to the repository, or else the defaults."""
    weights: Path | None = None
    model: str | None = None
    """One of the target's models by name, instead of its full size."""
    dtype: str = "bfloat16"
    python: str = sys.executable
    target: str | None = None
    plugins: tuple[Path, ...] = ()
    device: str = "cuda"
    """On a CPU the target's small model is run: that tries out the command, its times mean nothing."""
    text_tokens: int = 512
    compile: bool = True
    keep_caches: bool = False
    """Use the compile caches of the user's own, instead of empty ones."""
    operators: bool = False
    """Time the operators too."""
    require: float | None = None
    """The speed-up that every size has to reach with every configuration."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments in place of the target's."""
    command: str = ""
    """What the user typed, for the report."""


@dataclass(frozen=True)
class BenchReport:
    """The outcome of one run."""

    root: Path
    target: str | None
    comparisons: tuple[Comparison, ...]
    """By configuration, then by size."""
    runs: tuple[Run, ...]
    environment: dict[str, str]
    command: str
    require: float | None = None
    notes: tuple[str, ...] = ()
    operators: tuple[dict[str, Any], ...] = ()
    sites: tuple[Site, ...] = ()
    seconds: float = 0.0
    interrupted: bool = False
    """Not everything was measured: the runs hold what there is, the comparisons the sizes that both sides finished."""

    @property
    def below(self) -> tuple[Comparison, ...]:
        """What does not reach the speed-up that was required."""
        return tuple(row for row in self.comparisons if self.require is not None and row.speedup < self.require)

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else 1 if self.below else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "status": "interrupted" if self.interrupted else "below" if self.below else "measured",
            "target": self.target,
            "root": str(self.root),
            "files": sorted({site.file for site in self.sites}),
            "sites": [{**asdict(site), "status": site.status.value} for site in self.sites],
            "command": self.command,
            "environment": self.environment,
            "require": self.require,
            "comparisons": [row.to_json() for row in self.comparisons],
            "runs": [run.to_json() for run in self.runs],
            "operators": list(self.operators),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


def run(
    root: Path,
    options: BenchOptions,
    progress: Progress = lambda event: None,
    keep: Callable[[BenchReport], None] = lambda report: None,
) -> BenchReport:
    """Time the patched repository at `root` and its original.

    The patched side runs first: the original's process can then also draw with as many dense steps as fit into
    Chipmunk's time. keep: is given what there is, marked as interrupted, after each picture. An interruption (Ctrl-C)
    once there is one is no error: what there is is returned. Raises BenchError or VerifyError (exit code 2) where
    nothing can be measured, ConfigError for a wrong configuration.
    """
    started = time.perf_counter()
    state = patched_repository(root)
    configs = _configs(options, state.root)
    if options.weights is not None and not options.weights.is_file():
        raise BenchError(f"there is no file {options.weights}")
    originals = {file.path: file.unpatched for file in state.files if file.unpatched is not None}
    plan = original_plan(state, originals, target=options.target, plugins=options.plugins)
    facts = _model(plan.models, root, options.device)
    assert state.journal is not None
    empty = BenchReport(
        root=state.root,
        target=plan.target,
        comparisons=(),
        runs=(),
        environment={},
        command=options.command,
        require=options.require,
        sites=state.journal.sites,
    )
    record = Record(options.images)

    def so_far() -> BenchReport:
        return replace(
            empty,
            comparisons=record.comparisons,
            runs=record.runs,
            environment=record.environment,
            notes=tuple(_notes(options, ())),
            seconds=time.perf_counter() - started,
            interrupted=True,
        )

    def follow(event: Event) -> None:
        record(event)
        progress(event)
        if event["event"] == "image":
            keep(so_far())

    operators: tuple[dict[str, Any], ...] = ()
    try:
        with tempfile.TemporaryDirectory(prefix="chipmunk-bench-") as folder:
            work = Path(folder).resolve()
            target = target_of(facts, plan.target, registry.load(options.plugins).targets, state.root)
            base = _spec(options, state.root, facts, target, work)
            original = rebuild(state.root, originals, work / "original-repository")
            theirs, ours = _both_sides(base, original, configs, options, follow)
            if options.operators:
                progress({"event": "operators", "side": "patched", "config": ""})
                operators = time_operators(options.python, work)
    except KeyboardInterrupt:
        if not record.runs:
            raise
        return so_far()
    return replace(
        empty,
        comparisons=tuple(row for run in ours for row in compare(theirs["dense"], run, theirs.get("fewer steps"))),
        runs=(*theirs.values(), *ours),
        environment=theirs["dense"].environment,
        notes=tuple(dict.fromkeys(_notes(options, ours))),
        operators=operators,
        seconds=time.perf_counter() - started,
    )


def _spec(options: BenchOptions, root: Path, facts: ModelFacts, target: Path, work: Path) -> Spec:
    """What all workers are told; `out` is a file of the folder `work`."""
    return Spec(
        side="patched",
        root=root,
        facts=facts,
        target=target,
        out=work / "runs.jsonl",
        sizes=options.sizes,
        steps=options.steps,
        batch=options.batch,
        images=options.images,
        text_tokens=options.text_tokens,
        dtype=options.dtype,
        device=options.device,
        compile=options.compile,
        weights=None if options.weights is None else options.weights.resolve(),
        model=options.model,
        overrides=options.overrides,
    )


def _both_sides(
    base: Spec, original: Path, configs: Mapping[str, Path | None], options: BenchOptions, progress: Progress
) -> tuple[dict[str, Run], list[Run]]:
    """Run the patched code with each configuration, then the original, in processes of their own.

    The original's runs by variant, and the patched code's.
    """
    work = base.out.parent
    worker = partial(
        run_worker, root=base.root, python=options.python, progress=progress, keep_caches=options.keep_caches
    )
    ours: list[Run] = []
    for number, (name, config) in enumerate(configs.items()):
        spec = replace(base, config=config, out=work / f"patched-{number}" / "runs.jsonl")
        ours += [replace(run, config=name) for run in worker(spec, label=name)]
    to_match = {size: [steady(run.of_size(size)).seconds for run in ours] for size in ours[0].sizes}
    spec = replace(base, side="original", root=original, match_seconds=to_match, out=work / "original" / "runs.jsonl")
    return {run.variant: run for run in worker(spec)}, ours


def _notes(options: BenchOptions, ours: Sequence[Run]) -> Iterator[str]:
    """What a reader of the report should know."""
    for run in ours:
        for note in run.notes:
            yield f"{run.config}: {note}" if len(ours) > 1 else note
    if options.images < 3:
        yield f"the last of {options.images} pictures stands for the steady ones; --images 4 is better"
    if options.device == "cpu":
        yield "a small model on a CPU, which shows that the command runs: its times say nothing about FLUX"


def time_operators(python: str, work: Path) -> tuple[dict[str, Any], ...]:
    """Run `python -m chipmunk.bench.ops` in a process of its own; one object a line of its table."""
    out = work / "operators.json"
    done = subprocess.run(
        [python, "-m", "chipmunk.bench.ops", "--only", "time", "--json", str(out)],
        cwd=work,
        env=environment(python),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not out.exists():
        last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise BenchError(
            f"the operators could not be timed (exit code {done.returncode})\n\n{last}",
            next_command=f"{python} -m chipmunk.bench.ops",
        )
    return tuple(json.loads(out.read_text())["times"])


def _configs(options: BenchOptions, root: Path) -> dict[str, Path | None]:
    """The configurations by name; each is read, so that a wrong one is found before anything is timed."""
    found = configurations(options.configs, root)
    for path in found.values():
        if path is not None:
            configuration.load(path)
    return {name: None if path is None else path.resolve() for name, path in found.items()}


def _model(models: tuple[ModelFacts, ...], root: Path, device: str) -> ModelFacts:
    """The model to time: the first that a loop takes as a parameter, or that is an installed package's."""
    for facts in models:
        if facts.installed or any(loop.model_parameter is not None for loop in facts.loops):
            return facts
    places = ", ".join(f"{loop.file}:{loop.line}" for facts in models for loop in facts.loops) or "none was found"
    raise BenchError(
        f"no sampling loop of this repository takes the model as a parameter ({places}): nothing to time. fidelity "
        "says what steps cost, in plain Euler steps of its own",
        next_command=f"chipmunk fidelity {quoted(root)}" + (" --device cuda" if device.startswith("cuda") else ""),
    )
