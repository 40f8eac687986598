"""Writes docs/compatibility.md: what the tool makes of real repositories that lie on this machine.

    python docs/compatibility.py NAME@COMMIT=PATH [NAME@COMMIT=PATH ...] > docs/compatibility.md

Each repository is copied into a temporary folder and patched, patched again, verified and reverted there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HEAD = """# Real repositories

What `chipmunk` makes of them. Each was copied, patched, patched once more (which must change nothing), verified with
its own classes at a small size on a CPU, and reverted (which must give every byte back). Sites: places in the code that
the tool looked at. Written by `python docs/compatibility.py NAME@COMMIT=PATH …` from repositories at hand.

| repository | commit | patch | sites patched | left dense | in `forward` | second patch | verify | revert |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    rows, notes = [], []
    for argument in sys.argv[1:]:
        label, _, path = argument.partition("=")
        name, _, commit = label.partition("@")
        print(label, file=sys.stderr)
        row, left = examine(Path(path))
        rows.append(f"| {name} | {commit} | {' | '.join(row)} |")
        for site in left:
            notes.append(f"- {name} {commit}, `{site['file']}:{site['line']}` ({site['patch']}): {site['reason']}")
    print(HEAD + "\n".join(rows))
    print("\nLeft dense, and why:\n")
    print("\n".join(notes) or "nothing")


def examine(source: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(".git", ".chipmunk", "__pycache__"), symlinks=True)
        before = tree_hash(root)
        start = time.perf_counter()
        code, patched = chipmunk("patch", root)
        seconds = time.perf_counter() - start
        if code != 0:
            return [f"exit {code}", "", "", "", "", "", ""], patched.get("sites", [])
        kinds = Counter(site["status"] for site in patched["sites"])
        once = tree_hash(root)
        again = chipmunk("patch", root)[0] == 0 and tree_hash(root) == once
        verified, report = chipmunk("verify", root)
        passed = sum(check["holds"] for check in report.get("checks", []))
        reverted = chipmunk("revert", root)[0] == 0 and tree_hash(root) == before
        left = [site for site in patched["sites"] if site["status"] in ("left dense", "refused")]
        return [
            f"{seconds:.1f} s",
            str(kinds["patched"]),
            str(len(left)),
            f"{forward_lines(patched)} lines",
            "no change" if again else "**changed**",
            f"{passed} of {len(report.get('checks', []))} checks" + ("" if verified == 0 else f", **exit {verified}**"),
            "every byte" if reverted else "**differs**",
        ], left


def chipmunk(command: str, root: Path) -> tuple[int, dict[str, Any]]:
    arguments = [sys.executable, "-m", "chipmunk.cli", command, str(root), "--json"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    print(run.stderr, file=sys.stderr, end="")
    return run.returncode, json.loads(run.stdout) if run.stdout else {}


def forward_lines(patched: dict[str, Any]) -> int:
    return int(patched.get("lines", {}).get("in_forward", 0))


def tree_hash(root: Path) -> str:
    """Names, modes and bytes of everything in the tree but the tool's own folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if ".chipmunk" not in path.relative_to(root).parts and path.is_file():
            digest.update(f"{path.relative_to(root)} {path.lstat().st_mode}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
