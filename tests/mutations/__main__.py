"""`python -m tests.mutations PATH`: rewrite a repository in every way, and tell what the tool makes of each."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .judge import (
    BROKEN,
    DENSE,
    NOT_HERE,
    REWRITINGS,
    SAME,
    combined,
    covered,
    drawn,
    expected,
    judge,
    read,
    rewritten,
    write,
)
from .judge import verified as verify
from .part import part_of
from .program import Files, Program


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name", help="its name in expected.yml; that of its folder if not given")
    parser.add_argument("--only", action="append", help="names of rewritings")
    parser.add_argument("--draw", type=int, help="not all rewritings, but so many, drawn by the seed from each kind")
    parser.add_argument("--combinations", type=int, default=10)
    parser.add_argument("--verify", type=int, default=0, help="how many mutants, drawn by the seed, to run and compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write each mutant that is not the same into this folder")
    parser.add_argument("--results", type=Path, help="add each outcome here, a line of JSON; those it has are not run")
    args = parser.parse_args()
    name = args.name or args.repository.resolve().name
    wanted = expected().get(name)
    if wanted is None:
        found = covered(Program.of(read(args.repository)).plan)
        parser.exit(2, f"{name} is not in expected.yml; the tool now finds {found}\n")
    files = read(args.repository)
    program = Program.of(part_of(files, wanted.files) if wanted.files else files)
    if covered(program.plan) != wanted.sites:
        print(f"the original is not patched as expected: {covered(program.plan)}, not {wanted.sites}", flush=True)
    results = Results(args.results)
    only = args.only or (drawn(args.draw, args.seed) if args.draw else None)
    for key, make in _mutants(program, only, 0 if args.only else args.combinations, args.seed):
        if key in results.done:
            continue
        started = time.process_time()
        label, mutant = make()
        outcome = judge(label, mutant, wanted.sites)
        results.add(key, label, outcome.kind, outcome.why, time.process_time() - started)
        if args.keep and mutant is not None and outcome.kind in (DENSE, BROKEN):
            _keep(args.keep / label.replace("/", "-")[:100], program.files, mutant)
    same = [key for key, result in results.done.items() if result["kind"] == SAME]
    makers = dict(_mutants(program, None, args.combinations, args.seed))
    for key in random.Random(args.seed).sample(same, min(args.verify, len(same))):
        if f"verify {key}" in results.done:
            continue
        label, mutant = makers[key]()
        assert mutant is not None
        failed = verify(args.repository, program.files, mutant)
        kind = "verify: not run" if failed is None else "verify: fails" if failed else "verify: holds"
        results.add(f"verify {key}", label, kind, failed or (), 0.0)
    counts = Counter(result["kind"] for result in results.done.values())
    total = counts[SAME] + counts[DENSE] + counts[BROKEN]
    seconds = sum(result["seconds"] for result in results.done.values())
    print(
        f"\n{name}: {total} mutants, {counts[SAME]} with the same sites ({100 * counts[SAME] / max(total, 1):.1f} %), "
        f"{counts[DENSE]} left dense or refused, {counts[BROKEN]} broken; {counts[NOT_HERE]} rewritings do not apply; "
        f"verify holds on {counts['verify: holds']}, fails on {counts['verify: fails']} "
        f"({seconds:.0f} s of CPU, {seconds / max(total, 1):.1f} each)"
    )


class Results:
    """Outcomes by key, in a file that a later run goes on with."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.done = {(result := json.loads(line))["key"]: result for line in path.read_text().splitlines()}

    def add(self, key: str, name: str, kind: str, why: tuple[str, ...], seconds: float) -> None:
        print(f"{kind:22} {name}", *why[:6], sep="\n    ", flush=True)
        self.done[key] = {"key": key, "name": name, "kind": kind, "why": why, "seconds": round(seconds, 2)}
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")


class _Mutant:
    """Makes one mutant when it is called: its name, and its files, None where nothing applies."""

    def __init__(self, program: Program, seed: int, rewriting: str | None, index: int = 0) -> None:
        self.program, self.seed, self.rewriting, self.index = program, seed, rewriting, index

    def __call__(self) -> tuple[str, Files | None]:
        if self.rewriting is not None:
            return self.rewriting, rewritten(self.program, self.rewriting, self.seed)
        return combined(self.program, list(REWRITINGS), self.index, self.seed)


def _mutants(program: Program, only: list[str] | None, combinations: int, seed: int) -> Iterator[tuple[str, _Mutant]]:
    for name in only or REWRITINGS:
        yield name, _Mutant(program, seed, name)
    for index in range(combinations):
        yield f"combination {index}", _Mutant(program, seed, None, index)


def _keep(folder: Path, before: Files, after: Files) -> None:
    write(folder, {path: text.encode() for path, text in after.items() if text != before.get(path)})


if __name__ == "__main__":
    main()
