"""`chipmunk verify`: the patched repository against its original, each in a process of its own."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chipmunk import registry
from chipmunk.apply import RepositoryStatus, State, read, status
from chipmunk.apply.errors import quoted
from chipmunk.rewrite import ModelFacts, Plan, plan_repository
from chipmunk.rewrite.plan import Site, SiteStatus
from chipmunk.verify.checks import Comparison
from chipmunk.verify.original import rebuild
from chipmunk.verify.process import Progress, run_workers
from chipmunk.verify.report import Check, Unverified, VerifyError, VerifyReport
from chipmunk.verify.spec import Spec

HINT = ". Complete this"

LAST_LINES = 8
"""Of the trace of code that fails, shown to the user."""

ANY = "by-signature"
"""The target for models that no other one recognises."""

ATTEMPTS = 4
"""Runs of a scenario in which rounding may have decided a selection: a fault fails all of them."""


class OtherModel(VerifyError):
    """The factory returned a model of another class than the one in hand."""


@dataclass(frozen=True)
class VerifyOptions:
    """What the user can choose."""

    python: str = sys.executable
    """The Python that runs the repository; Chipmunk has to be importable there."""
    device: str = "cpu"
    target: str | None = None
    """Name of a target, instead of the one that recognises the repository."""
    plugins: tuple[Path, ...] = ()
    weights: Path | None = None
    """A safetensors checkpoint of the user's own, for a second run with the model it was saved from."""
    factory: str | None = None
    """`module:function` that returns the model, where the target cannot build it."""
    model: str | None = None
    """Name of the one model to verify, where the repository holds several."""
    only: tuple[str, ...] = ()
    """Names of the scenarios to run; all of them if empty."""
    seed: int = 0
    timeout: float = 1800.0
    """Seconds after which a run is stopped."""
    preload: Path | None = None
    """A Python file that the patched side's process executes first (tests put faults into the runtime with it)."""


def run(root: Path, options: VerifyOptions | None = None, progress: Progress | None = None) -> VerifyReport:
    """Verify the patched repository at `root`.

    Raises VerifyError (exit code 2) where there is nothing to verify or it cannot be run; what does not hold is in the
    report.
    """
    options = options or VerifyOptions()
    started = time.perf_counter()
    state = patched_repository(root)
    originals = {file.path: file.unpatched for file in state.files if file.unpatched is not None}
    plan = original_plan(state, originals, target=options.target, plugins=options.plugins)
    with tempfile.TemporaryDirectory(prefix="chipmunk-verify-") as folder:
        work = Path(folder).resolve()
        original = rebuild(state.root, originals, work / "original-repository")
        report = verify(original, state.root, plan, options, work, progress)
    assert state.journal is not None
    return replace(report, root=state.root, sites=state.journal.sites, seconds=time.perf_counter() - started)


def patched_repository(root: Path) -> RepositoryStatus:
    """The state of a repository that is patched, whole, and whose original can be had. Raises VerifyError."""
    state = status(root)
    if state.state is State.UNPATCHED:
        raise VerifyError(f"{state.root} is not patched", next_command=f"chipmunk patch {quoted(root)}")
    if state.state not in (State.PATCHED, State.EDITED):
        raise VerifyError(state.message or state.state.value, next_command=state.next_command)
    lost = [file for file in state.files if file.unpatched is None]
    if lost:
        raise VerifyError(
            "the original of these files cannot be told from the edits made since",
            places=[place for file in lost for place in file.places],
            next_command=f"chipmunk diff {quoted(root)}",
        )
    return state


def original_plan(
    state: RepositoryStatus, originals: dict[str, bytes], *, target: str | None, plugins: tuple[Path, ...]
) -> Plan:
    """What the rules find in the original: the models and loops to run, and the target that knows how."""
    assert state.journal is not None
    files = {**read(state.root).files, **originals}
    found = registry.load(plugins)
    only = [name for name in state.journal.patches if name in found.patches] or None
    target = target or (state.journal.target if state.journal.target in found.targets else None)
    plan = plan_repository(files, found, only=only, target=target)
    if not plan.models:
        raise VerifyError(f"no FLUX model was found in {state.root}, although it is patched")
    return plan


def target_of(
    facts: ModelFacts, chosen: str | None, targets: Mapping[str, registry.Target], root: Path | None = None
) -> Path:
    """The file of the target that knows one model: the repository's, that of another family, or the one for all.

    root: the folder that the model's file is in, where there is one.
    """
    file_of_model = None if root is None else root / facts.file
    files = {facts.file: file_of_model.read_bytes()} if file_of_model is not None and file_of_model.is_file() else {}
    known = [name for name, target in targets.items() if target.recognise([facts], files)]
    rest = ANY if ANY in targets else next(iter(targets))
    name = chosen if chosen in known else next(iter(known), rest)
    file = targets[name].module.__file__
    assert file is not None
    return Path(file).resolve()


def verify(
    original: Path, patched: Path, plan: Plan, options: VerifyOptions, work: Path, progress: Progress | None = None
) -> VerifyReport:
    """Verify `patched` against `original`, two folders; `plan` is the original's. Works in the folder `work`.

    A model that cannot be run is reported as such if another one can, and so is one that an interruption (Ctrl-C)
    leaves over. Raises VerifyError where none can.
    """
    targets = registry.load(options.plugins).targets
    checks: list[Check] = []
    notes: list[str] = []
    environment: dict[str, str] = {}
    refusals: list[VerifyError] = []
    unverified: list[Unverified] = []
    counted = Counter(facts.name for facts in plan.models)
    names = [f.name if counted[f.name] == 1 else f"{f.name} of {f.file}" for f in plan.models]
    if options.model is not None and options.model not in names:
        raise VerifyError(
            f"no model that was patched is called {options.model}; there are: {', '.join(names)}",
            next_command=f"chipmunk verify {quoted(patched)} --model {shlex.quote(names[0])}",
        )
    if options.target is not None:
        targets = {options.target: targets[options.target]}
    interrupted = False
    for number, (name, facts) in enumerate(zip(names, plan.models, strict=True)):
        if options.model not in (None, name):
            continue
        alone = f"chipmunk verify {quoted(patched)} --model {shlex.quote(name)}"
        if interrupted:
            unverified.append(Unverified(facts.name, facts.file, "interrupted", alone))
            continue
        base = Spec(
            side="original",
            root=original,
            out=work / f"original-{number}",
            facts=facts,
            target=target_of(facts, plan.target, targets, original),
            device=options.device,
            seed=options.seed,
            only=options.only,
            factory=options.factory,
            factory_folder=Path.cwd(),
        )
        try:
            try:
                found = _checks(base, patched, plan.sites, options, progress)
            except OtherModel:
                if len(names) == 1 or options.model is not None:
                    raise
                found = _checks(replace(base, factory=None), patched, plan.sites, options, progress)
        except KeyboardInterrupt:
            if not checks:
                raise
            interrupted = True
            unverified.append(Unverified(facts.name, facts.file, "interrupted", alone))
            continue
        except VerifyError as error:
            needs_factory = HINT in error.message
            if needs_factory and len(names) > 1:
                error.next_command = f"{alone} --factory verify_factory:build"
            refusals.append(error)
            reason = error.message.partition(HINT)[0].partition("\n")[0]
            unverified.append(
                Unverified(facts.name, facts.file, reason, alone if needs_factory else error.next_command)
            )
            continue
        for suffix, these, result in found:
            where = [*([name] if len(names) > 1 else []), *([f"with {suffix}"] if suffix else [])]
            checks += [replace(check, name=", ".join([check.name, *where])) for check in these]
            notes += [*result.get("notes", []), *_placeholder_notes(result)]
            environment |= result.get("environment", {})
    if not checks:
        raise refusals[0]
    return VerifyReport(
        patched, plan.target, tuple(checks), notes=tuple(dict.fromkeys(notes)), environment=environment,
        unverified=tuple(unverified), interrupted=interrupted,
    )  # fmt: skip


def _checks(
    base: Spec, patched: Path, sites: Sequence[Site], options: VerifyOptions, progress: Progress | None
) -> list[tuple[str, list[Check], dict[str, Any]]]:
    """Of one model: with random weights, then with the user's: their file's name, checks, and what the worker says."""
    found = []
    for weights in [None] if options.weights is None else [None, options.weights.resolve()]:
        suffix = "" if weights is None else "-weights"
        theirs = replace(base, out=Path(f"{base.out}{suffix}"), weights=weights)
        ours = replace(
            theirs,
            side="patched",
            root=patched,
            out=base.out.with_name(f"{base.out.name.replace('original', 'patched')}{suffix}"),
            preload=None if options.preload is None else options.preload.resolve(),
        )
        if weights is not None:
            ours, theirs = replace(ours, only=()), replace(theirs, only=())
        found.append(("" if weights is None else weights.name, *_pair(theirs, ours, sites, options, progress)))
    return found


def _pair(
    theirs: Spec, ours: Spec, sites: Sequence[Site], options: VerifyOptions, progress: Progress | None
) -> tuple[list[Check], dict[str, Any]]:
    """Run the original and the patched side of one model; their checks, and what the patched side reports."""
    results = run_workers([theirs, ours], options.python, progress, options.timeout)
    for spec, result in zip((theirs, ours), results, strict=True):
        error = result.get("error")
        if error is None:
            continue
        # what fails on both sides is no fault of the patch
        if spec.side == "original" or error["kind"] == "memory":
            raise _refusal(error, theirs, ours)
        says = f"the patched code does not run: {error['message']}"
        return [Check("runs", False, says, {"trace": error["trace"]})], {}
    facts, notes = _less_dense_branches(theirs.facts, results[1]["coverage"], sites)
    if facts != theirs.facts:
        again = [replace(spec, facts=facts, out=Path(f"{spec.out}-branch")) for spec in (theirs, ours)]
        checks, result = _pair(again[0], again[1], sites, options, progress)
        return checks, {**result, "notes": [*result.get("notes", []), *notes]}
    comparison = Comparison(theirs.facts, theirs.out, ours.out, results)
    results[1]["notes"] += comparison.notes()
    for attempt in range(1, ATTEMPTS):
        undecided = tuple(comparison.undecided())
        if not undecided:
            break
        results[1]["notes"].append(
            f"{', '.join(undecided)}: two scores were so close that rounding chose between them; run again with other "
            f"weights and inputs"
        )
        again = [
            replace(spec, out=Path(f"{spec.out}-{attempt}"), seed=spec.seed + attempt, only=undecided)
            for spec in (theirs, ours)
        ]
        repeated = run_workers(again, options.python, progress, options.timeout)
        if any("error" in result for result in repeated):
            break
        comparison.decide(Comparison(theirs.facts, again[0].out, again[1].out, repeated))
    return comparison.checks(), results[1]


def _less_dense_branches(
    facts: ModelFacts, coverage: Mapping[str, Any], sites: Sequence[Site]
) -> tuple[ModelFacts, list[str]]:
    """The facts without MLPs that were left dense in the branch of the block that runs, and which ones these are.

    An MLP that no call reached at all is one, if the same patch left another place in the block's file dense.
    """
    notes = []
    layers = [layer for scenario in coverage.values() for layer in scenario["statistics"]["layers"]]
    for patch, prefix, block in (
        ("double-mlp", facts.double, facts.double_block),
        ("single-mlp", facts.single, facts.single_block),
    ):
        dense = [s for s in sites if s.patch == patch and s.file == block.file and s.status is SiteStatus.LEFT_DENSE]
        of_kind = [layer for layer in layers if layer["name"].startswith(f"{prefix}.")]
        reached = any(slot[kind] for layer in of_kind for slot in layer["mlp"].values() for kind in slot)
        if dense and of_kind and not reached and (block.mlp or block.linear_in):
            less = replace(block, mlp=None, linear_in=None, linear_out=None)
            is_double = patch == "double-mlp"
            facts = replace(facts, double_block=less) if is_double else replace(facts, single_block=less)
            notes.append(
                f"the MLP of {block.name} is sparse in other branches than the one that runs here, which was left "
                f"dense ({dense[0].file}:{dense[0].line}: {dense[0].reason})"
            )
    return facts, notes


def _refusal(error: dict[str, Any], theirs: Spec, ours: Spec) -> VerifyError:
    message = error["message"].replace(str(theirs.root), str(ours.root))
    uncalled = theirs.factory is None and bool(error.get("place"))
    if uncalled:  # raised by the repository's own code, called as FLUX.1 is called
        message = f"the original code fails {error['place']}{message}: verify may not know what its forward needs"
    if error["kind"] == "build" or uncalled:
        what = (
            "file, save it here as `verify_factory.py` and name it (a family of models is better served by a target: "
        )
        what += "docs/adding-a-target.md)"
        if theirs.factory is not None:
            what = f"and add it to `{theirs.factory.partition(':')[0]}`, whose build works"
        return VerifyError(
            f"{message}{HINT} {what}:\n\n{error['skeleton']}",
            next_command=f"chipmunk verify {quoted(ours.root)} --factory {theirs.factory or 'verify_factory:build'}",
        )
    if error["kind"] == "factory":
        return OtherModel(message)
    if error["kind"] == "crash":
        mine = None if error.get("place") or theirs.factory is None else theirs.factory.partition(":")[0]
        subject = "the original code" if mine is None else f"`{mine}`"
        where = f" {error['place']}" if error.get("place") else ": "
        lines = [line for line in error["trace"].rstrip().splitlines() if line.strip(" ^~")]
        last = "\n".join(lines[-LAST_LINES:]).replace(str(theirs.root), str(ours.root))
        message = f"{subject} fails{where}{message}\n\n{last}"
    return VerifyError(message, next_command=error.get("next_command"))


def _placeholder_notes(result: dict[str, Any]) -> list[str]:
    names = result.get("placeholders", [])
    return [f"not installed, not needed, and left empty: {', '.join(names)}"] if names else []
