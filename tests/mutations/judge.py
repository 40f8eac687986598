"""What the tool makes of a rewritten repository, held against what it should make of the original."""

from __future__ import annotations

import random
import shutil
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml

from chipmunk import verify
from chipmunk.apply import carry_out, plan_update, revert
from chipmunk.rewrite import Plan, SiteStatus

from . import calls, layout, moves, names
from .names import Rewriting
from .program import Files, Program, planned

EXPECTED = Path(__file__).with_name("expected.yml")
KINDS = (names.REWRITINGS, layout.REWRITINGS, calls.REWRITINGS, moves.REWRITINGS)
REWRITINGS: dict[str, Rewriting] = {name: rewriting for kind in KINDS for name, rewriting in kind.items()}

SAME, DENSE, BROKEN, NOT_HERE = "same sites", "left dense or refused", "broken", "does not apply"


@dataclass(frozen=True)
class Outcome:
    """One mutant."""

    name: str
    kind: str
    why: tuple[str, ...] = ()
    plan: Plan | None = field(default=None, repr=False)


def covered(plan: Plan) -> dict[str, int]:
    """What a plan makes sparse: blocks whose attention it hands over, and places of each other patch.

    Sites of the attention patch are not counted themselves: a helper between block and attention is one more of them.
    """
    sites = Counter(site.patch for site in plan.sites if site.status is SiteStatus.PATCHED)
    blocks = {(b.file, b.name): b.attention for m in plan.models for b in (m.double_block, m.single_block)}
    return {**{patch: sites[patch] for patch in sorted(sites)}, "attention": sum(blocks.values())}


@dataclass(frozen=True)
class Expected:
    """What is written down of one repository."""

    sites: dict[str, int]
    files: tuple[str, ...] = ()
    """The mutants hold these and what they import; everything, if there are none."""


def expected() -> dict[str, Expected]:
    loaded = yaml.safe_load(EXPECTED.read_text())
    return {n: Expected(e["sites"], tuple(e["files"])) if "sites" in e else Expected(e) for n, e in loaded.items()}


def rewritten(program: Program, name: str, seed: int) -> Files | None:
    """The repository after one rewriting; None where it does not apply."""
    return REWRITINGS[name](program, random.Random(f"{seed} {name}"))


def drawn(number: int, seed: int) -> list[str]:
    """Rewritings drawn by the seed, from each kind in its proportion."""
    rng = random.Random(f"{seed} draw")
    shuffled = [
        (place / len(kind), name) for kind in KINDS for place, name in enumerate(rng.sample([*kind], len(kind)))
    ]
    chosen = {name for _, name in sorted(shuffled)[:number]}
    return [name for name in REWRITINGS if name in chosen]


def combined(program: Program, chosen: list[str], index: int, seed: int) -> tuple[str, Files | None]:
    """Three rewritings one after the other, drawn by seed and index, with the names of those that applied."""
    rng = random.Random(f"{seed} combination {index}")
    done: list[str] = []
    current = program
    for name in rng.sample(chosen, k=min(3, len(chosen))):
        if done:  # its facts moved
            current = Program.of(current.files)
        files = REWRITINGS[name](current, rng) if current.models else None
        if files is not None:
            done.append(name)
            current = Program(files, current.plan)
    return " + ".join(done) or "nothing", current.files if done else None


def judge(name: str, files: Files | None, wanted: dict[str, int]) -> Outcome:
    """What the tool makes of a mutant: planned, patched again, and reverted on the disk."""
    if files is None:
        return Outcome(name, NOT_HERE)
    before = {path: text.encode() for path, text in files.items()}
    for path, content in before.items():
        if (error := does_not_compile(path, content)) is not None:
            return Outcome(name, BROKEN, (f"the rewriting itself: {error}",))
    plan = planned(before)
    after = {**before, **{change.path: change.after for change in plan.changes}}
    for change in plan.changes:
        if (error := does_not_compile(change.path, change.after)) is not None:
            return Outcome(name, BROKEN, (f"patched: {error}",))
    second = planned(after)
    if second.changes or any(site.status is SiteStatus.PATCHED for site in second.sites):
        return Outcome(name, BROKEN, ("a second patch changes something",))
    if (problem := _on_disk(before, plan)) is not None:
        return Outcome(name, BROKEN, (problem,))
    got = covered(plan)
    if got == wanted:
        return Outcome(name, SAME, plan=plan)
    left = [site for site in plan.sites if site.status in (SiteStatus.LEFT_DENSE, SiteStatus.REFUSED)]
    difference = ", ".join(
        f"{patch} {got.get(patch, 0)} of {wanted.get(patch, 0)}"
        for patch in sorted({*got, *wanted})
        if got.get(patch, 0) != wanted.get(patch, 0)
    )
    reasons = dict.fromkeys(f"{site.file}:{site.line} {site.patch}: {site.reason}" for site in left)
    return Outcome(name, DENSE, (difference, *reasons), plan)


def does_not_compile(path: str, content: bytes) -> str | None:
    error = _compile_error(content)
    return None if error is None else f"{path}: {error}"


@lru_cache(1000)
def _compile_error(content: bytes) -> str | None:
    """Mutants share most of their files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(content, "the file", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return str(error)
    return None


def _on_disk(files: dict[str, bytes], plan: Plan) -> str | None:
    """Carry the plan out in a folder of its own, and revert."""
    with tempfile.TemporaryDirectory(prefix="chipmunk-mutant-") as folder:
        root = Path(folder)
        write(root, files)
        carry_out(plan_update(root, lambda _: plan))
        revert(root)
        found = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return None if found == files else "a revert does not give every byte back"


def verified(source: Path, before: Files, files: Files) -> tuple[str, ...] | None:
    """Checks of `chipmunk verify` that a mutant of the repository at `source` fails: the same numbers as before it was
    patched, with Chipmunk off and with everything kept, are among them. None where the model cannot be built.

    `before` are the files that were rewritten, and `files` what they have become, and are patched; the repository's
    others stay as they are.
    """
    plan = planned({path: text.encode() for path, text in files.items()})
    with tempfile.TemporaryDirectory(prefix="chipmunk-mutant-") as folder:
        root = Path(folder) / "repository"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(".git", ".chipmunk", "__pycache__"))
        for path in before.keys() - files.keys():
            (root / path).unlink()
        write(root, {path: text.encode() for path, text in files.items()})
        carry_out(plan_update(root, lambda _: plan))
        checks: list[verify.Check] = []
        for model in plan.models:
            with suppress(verify.VerifyError):
                checks += verify.run(root, verify.VerifyOptions(model=model.name)).checks
    return tuple(f"{check.name}: {check.says}" for check in checks if not check.holds) if checks else None


def write(root: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def read(root: Path) -> Files:
    """The Python files of a repository that are UTF-8 and Python at all; the others are left out."""
    found: Files = {}
    for path in sorted(root.rglob("*.py")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if does_not_compile(str(path), content) is None:
            found[path.relative_to(root).as_posix()] = text
    return found
