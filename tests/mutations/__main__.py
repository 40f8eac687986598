"""`python -m tests.mutations PATH`: rewrite a repository in every way, and tell what the tool makes of each."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .judge import (
    BROKEN,
    DENSE,
    NOT_HERE,
    REWRITINGS,
    SAME,
    Outcome,
    combined,
    covered,
    expected,
    judge,
    read,
    rewritten,
    verified,
    write,
)
from .program import Files, Program


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name", help="its name in expected.yml; that of its folder if not given")
    parser.add_argument("--only", action="append", help="names of rewritings")
    parser.add_argument("--combinations", type=int, default=10)
    parser.add_argument("--verify", type=int, default=0, help="how many mutants, drawn by the seed, to run and compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write each mutant that is not the same into this folder")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    args = parser.parse_args()
    program = Program.of(read(args.repository))
    name = args.name or args.repository.resolve().name
    wanted = expected().get(name)
    if wanted is None:
        parser.exit(2, f"{name} is not in expected.yml; the tool now finds {covered(program.plan)}\n")
    if covered(program.plan) != wanted:
        print(f"the original is not patched as expected: {covered(program.plan)}, not {wanted}", flush=True)
    outcomes: list[Outcome] = []
    same: list[tuple[str, Files]] = []
    started = time.perf_counter()
    for label, files in _mutants(program, args.only, args.combinations, args.seed):
        outcome = judge(label, files, wanted)
        outcomes.append(outcome)
        print(f"{outcome.kind:22} {outcome.name}", *outcome.why[:6], sep="\n    ", flush=True)
        if args.keep and files is not None and outcome.kind in (DENSE, BROKEN):
            _keep(args.keep / label.replace("/", "-")[:100], program.files, files)
        if files is not None and outcome.kind == SAME:
            same.append((label, files))
    for label, files in random.Random(args.seed).sample(same, min(args.verify, len(same))):
        failed = verified(args.repository, files)
        if failed is None:
            print(f"{'verify: not run':22} {label}: the target cannot build the model under other names", flush=True)
            continue
        print(f"{'verify: ' + ('fails' if failed else 'holds'):22} {label}", *failed, sep="\n    ", flush=True)
        if failed:
            outcomes.append(Outcome(f"verify: {label}", BROKEN, failed))
    counts = Counter(outcome.kind for outcome in outcomes)
    total = sum(counts.values()) - counts[NOT_HERE]
    seconds = time.perf_counter() - started
    print(
        f"\n{name}: {total} mutants, {counts[SAME]} with the same sites ({100 * counts[SAME] / max(total, 1):.1f} %), "
        f"{counts[DENSE]} left dense or refused, {counts[BROKEN]} broken; {counts[NOT_HERE]} rewritings do not apply "
        f"({seconds:.0f} s)"
    )
    if args.json:
        args.json.write_text(json.dumps([[o.name, o.kind, o.why] for o in outcomes], indent=1))


def _mutants(
    program: Program, only: list[str] | None, combinations: int, seed: int
) -> Iterator[tuple[str, Files | None]]:
    for name in only or REWRITINGS:
        yield name, rewritten(program, name, seed)
    if not only:
        yield from combined(program, list(REWRITINGS), combinations, seed)


def _keep(folder: Path, before: Files, after: Files) -> None:
    write(folder, {path: text.encode() for path, text in after.items() if text != before.get(path)})


if __name__ == "__main__":
    main()
