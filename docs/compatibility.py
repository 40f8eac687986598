"""Writes docs/compatibility.md: what the tool makes of real repositories that lie on this machine.

    python docs/compatibility.py [--python PYTHON] [--results FILE] NAME@COMMIT=PATH [...] > docs/compatibility.md

Each repository is copied into a temporary folder and patched, patched again, verified and reverted there. PYTHON runs
verify: it needs the light ones of the packages that the repositories import (tqdm, einops; for diffusers its own
requirements), and Chipmunk. FILE keeps a line of JSON for each repository, so that a long run can be taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

HEAD = """# Real repositories

What `chipmunk` makes of them. Each was copied, patched, patched once more (which must change nothing), verified with
its own classes at a small size on a CPU, and reverted (which must give every byte back). Sites: places in the code that
the tool looked at. Seconds are of processor time. *Formatted*: of the changed files that `ruff format` had nothing to
change in before, those in which it still has nothing to change. Written by
`python docs/compatibility.py NAME@COMMIT=PATH …` from repositories at hand.
"""

UNVERIFIED = """
`chipmunk verify REPOSITORY --model CLASS` prints a file to complete, with all that signatures tell: how such a model is
built small, and how it is called. `--factory` names it.
"""

COLUMNS = [
    "repository",
    "commit",
    "patch",
    "sites_patched",
    "left_dense",
    "in_`forward`",
    "formatted",
    "second_patch",
    "models_verified",
    "checks",
    "verify",
    "revert",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--results", type=Path)
    parser.add_argument("repositories", nargs="*", metavar="NAME@COMMIT=PATH")
    options = parser.parse_args()
    known: dict[str, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        known = {found["label"]: found for found in map(json.loads, options.results.read_text().splitlines())}
    for argument in options.repositories:
        label, _, path = argument.partition("=")
        print(label, file=sys.stderr)
        if label not in known:
            known[label] = {"label": label, **examine(Path(path), options.python)}
            if options.results is not None:
                with options.results.open("a") as results:
                    results.write(json.dumps(known[label]) + "\n")
    labels = [argument.partition("=")[0] for argument in options.repositories]
    print(HEAD)
    print(f"| {' | '.join(COLUMNS).replace('_', ' ')} |\n{'|---' * len(COLUMNS)}|")
    print("\n".join(row(known[label]) for label in labels))
    for title, key, note in (
        ("Left dense, and why", "left", ""),
        ("Patched, but not verified", "unverified", UNVERIFIED),
    ):
        print(f"\n## {title}\n{note}")
        print("\n".join(line for label in labels for line in listed(known[label], key)) or "nothing")


def examine(source: Path, python: str) -> dict[str, Any]:
    """Everything about one repository."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(".git", ".chipmunk", "__pycache__"), symlinks=True)
        before, was_formatted = tree_hash(root), formatted(root)
        code, patched, seconds = chipmunk("patch", root)
        if code != 0:
            return {"exit": code, "left": patched.get("sites", []), "unverified": []}
        sites = patched["sites"]
        changed = {site["file"] for site in sites if site["status"] == "patched"}
        once = tree_hash(root)
        again = chipmunk("patch", root)[0] == 0 and tree_hash(root) == once
        verified, report, verify_seconds = chipmunk("verify", root, "--python", python)
        checks, unverified = report.get("checks", []), report.get("unverified", [])
        return {
            "exit": 0,
            "seconds": seconds,
            "patched": Counter(site["status"] for site in sites)["patched"],
            "left": [site for site in sites if site["status"] in ("left dense", "refused")],
            "in_forward": int(patched.get("lines", {}).get("in_forward", 0)),
            "formatted": [len(was_formatted & changed & formatted(root)), len(was_formatted & changed)],
            "again": again,
            "verify_exit": verified,
            "verify_seconds": verify_seconds,
            "checks": [sum(check["holds"] for check in checks), len(checks)],
            "models": len({check["name"].partition(", ")[2] for check in checks}),
            "failed": [check for check in checks if not check["holds"]],
            "unverified": [{**each, "reason": each["reason"].replace(python, "python")} for each in unverified],
            "refusal": report if verified == 2 else None,
            "reverted": chipmunk("revert", root)[0] == 0 and tree_hash(root) == before,
        }


def row(found: dict[str, Any]) -> str:
    name, _, commit = found["label"].partition("@")
    if found["exit"] != 0:
        return f"| {name} | {commit} | exit {found['exit']} |" + " |" * (len(COLUMNS) - 3)
    holding, checks = found["checks"]
    kept, before = found["formatted"]
    cells = [
        name,
        commit,
        f"{found['seconds']:.1f} s",
        str(found["patched"]),
        str(len(found["left"])),
        f"{found['in_forward']} lines",
        f"{kept} of {before}" if before else "none before",
        "no change" if found["again"] else "**changed**",
        f"{found['models']} of {found['models'] + len(found['unverified'])}",
        f"{holding} of {checks} hold" + ("" if found["verify_exit"] == 0 else f", **exit {found['verify_exit']}**"),
        f"{found['verify_seconds']:.0f} s",
        "every byte" if found["reverted"] else "**differs**",
    ]
    return f"| {' | '.join(cells)} |"


def listed(found: dict[str, Any], key: str) -> list[str]:
    """A line for each reason, with the places that it was given for."""
    label = found["label"].replace("@", " ")
    places: defaultdict[str, list[str]] = defaultdict(list)
    for each in found[key]:
        where = f"`{each['file']}:{each['line']}` ({each['patch']})" if key == "left" else f"{each['model']}"
        places[each["reason"]].append(where)
    return [
        f"- {label}: {', '.join(where[:2])}{f' and {len(where) - 2} more' if where[2:] else ''}: {reason}"
        for reason, where in places.items()
    ]


def chipmunk(command: str, root: Path, *options: str) -> tuple[int, dict[str, Any], float]:
    """Exit code, report and processor time of a command."""
    arguments = [sys.executable, "-m", "chipmunk.cli", command, str(root), "--json", *options]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(run.stderr, file=sys.stderr, end="")
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return run.returncode, json.loads(run.stdout) if run.stdout else {}, seconds


def formatted(root: Path) -> set[str]:
    """Files in which ruff, with the repository's own settings, or its defaults, has nothing to change."""
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--no-cache", "--force-exclude", "."]
    # from there: where a repository has no settings, ruff takes those of the current folder
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout
    # What `--check` prints differs from release to release; a diff names each file that would change.
    others = {line.removeprefix("--- ").strip() for line in said.splitlines() if line.startswith("--- ")}
    paths = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    return paths - {os.path.normpath(other) for other in others}


def tree_hash(root: Path) -> str:
    """Names, modes and bytes of everything in the tree but the tool's own folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if ".chipmunk" not in path.relative_to(root).parts and path.is_file():
            digest.update(f"{path.relative_to(root)} {path.lstat().st_mode}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
