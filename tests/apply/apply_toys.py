"""A small repository, and rules that change it: enough to try everything that has to do with the disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from pathlib import Path

from hypothesis import HealthCheck, settings

from chipmunk.apply import Update, carry_out, plan_update
from chipmunk.rewrite.plan import FileChange, Plan, Site, SiteStatus

MATH = b"""import torch


def attention(q, k, v, pe):
    q, k = rope(q, k, pe)
    x = sdpa(q, k, v)
    return x


def rope(q, k, pe):
    # both at once
    return turn(q, pe), turn(k, pe)


def turn(x, pe):
    return x * pe
"""
LAYERS = b"""import torch
from .math import attention


class Block:
    def forward(self, q, k, v, pe):
        return sdpa(q, k, v) + attention(q, k, v, pe)
"""
FILES = {
    "src/flux/math.py": MATH,
    "src/flux/layers.py": LAYERS,
    "src/flux/dos.py": LAYERS.replace(b"\n", b"\r\n"),
    "src/flux/no_end.py": b"\xef\xbb\xbfx = 1\ny = sdpa(x, x, x)",
    "setup.py": b"# nothing to do here: caf\xe9\n",
    "README.md": b"# Flux\n",
}

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Each example makes a folder of its own in `tmp_path`."""

SMALL = {path: FILES[path] for path in ("src/flux/math.py", "src/flux/layers.py")}
"""Where every byte that is written costs a run of its own."""

_CALL = re.compile(rb"(?<!chipmunk\.)\bsdpa\(")


def make(root: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def rules(files: dict[str, bytes], version: int = 1) -> Plan:
    """Each `sdpa(` becomes `chipmunk.sdpa(`, and the file gets an import; version 2 adds a last line too."""
    changes, sites = [], []
    for path, data in files.items():
        done = [("already", n) for n, line in enumerate(data.split(b"\n"), 1) if b"chipmunk.sdpa(" in line]
        found = [("new", n) for n, line in enumerate(data.split(b"\n"), 1) if _CALL.search(line)]
        for what, line in done + found:
            status = SiteStatus.ALREADY if what == "already" else SiteStatus.PATCHED
            sites.append(Site(path, line, "attention", status, "sdpa(", "a call of sdpa"))
        if found:
            end = b"\r\n" if b"\r\n" in data else b"\n"
            mark, body = (data[:3], data[3:]) if data.startswith(b"\xef\xbb\xbf") else (b"", data)
            after = mark + b"import chipmunk" + end + _CALL.sub(b"chipmunk.sdpa(", body)
            if version > 1:
                after = after.replace(b"chipmunk.sdpa(", b"chipmunk.sdpa(None, ")
            changes.append(FileChange(path, data, after))
    return Plan("toy", tuple(changes), tuple(sites), patches={"attention": str(version)})


def rules_2(files: dict[str, bytes]) -> Plan:
    return rules(files, version=2)


def patch(root: Path) -> Update:
    update = plan_update(root, rules)
    carry_out(update)
    return update


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace the first `old` in a file."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def snapshot(root: Path) -> dict[str, tuple[str, int, str]]:
    """Everything below a folder: kind, permission bits, contents' hash or link's target."""
    found: dict[str, tuple[str, int, str]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            mode = stat.S_IMODE(path.lstat().st_mode)
            if path.is_symlink():
                entry = ("link", 0, os.readlink(path))
            elif path.is_dir():
                entry = ("folder", mode, "")
            else:
                entry = ("file", mode, hashlib.sha256(path.read_bytes()).hexdigest())
            found[str(path.relative_to(root))] = entry
    return found


def user_files(root: Path) -> dict[str, tuple[str, int, str]]:
    """The same, without Chipmunk's own folder."""
    return {path: entry for path, entry in snapshot(root).items() if not path.startswith(".chipmunk")}


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target
