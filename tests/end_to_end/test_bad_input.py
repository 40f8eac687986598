"""Repositories and habits that tools of this kind trip over, on the starter repository and through the command line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import chipmunk
from chipmunk.cli.app import app
from tests.end_to_end.fresh import Picture, draw
from tests.end_to_end.starter import STARTER, copy_starter, load, small_config

PICTURE = Picture(steps=8)


@pytest.fixture(autouse=True)
def _no_configuration_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout has a chipmunk-config.yml, which would turn every model on."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return copy_starter(tmp_path)


def run(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON object of a command."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def tree(root: Path) -> dict[str, bytes]:
    """All files but the journal."""
    files = (path for path in root.rglob("*") if path.is_file())
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not name.startswith(".chipmunk/")}


def meaning(root: Path) -> dict[str, str]:
    """What the Python files say, whatever they look like."""
    return {name: ast.dump(ast.parse(content)) for name, content in tree(root).items() if name.endswith(".py")}


@cache
def expected() -> Tensor:
    original = load(STARTER)
    return draw(original, original.model(), PICTURE)


def computes_what_the_starter_does(root: Path) -> None:
    """To the bit while off; and when it is on, something else, so that the code is really patched."""
    other = load(root)
    model = other.model()
    assert torch.equal(draw(other, model, PICTURE), expected())
    chipmunk.enable(model, small_config())
    assert not torch.equal(draw(other, model, PICTURE), expected())
    assert chipmunk.statistics(model).layers[-1].mlp["main"].sparse > 0


# Sources that look different.


def tabs(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(b"\t" * ((len(line) - len(line.lstrip(b" "))) // 4) + line.lstrip(b" ") for line in lines)


VARIANTS: dict[str, Callable[[bytes], bytes]] = {
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "tabs": tabs,
    "no final newline": lambda content: content.rstrip(b"\n"),
    "all at once": lambda content: b"\xef\xbb\xbf" + tabs(content).rstrip(b"\n").replace(b"\n", b"\r\n"),
    "trailing white space": lambda content: content.replace(b":\n", b":  \n"),
    "Latin-1": lambda content: b"# -*- coding: latin-1 -*-\n# \xe9t\xe9\n" + content,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_patched_as_it_is_and_reverted_to_the_byte(root: Path, variant: str) -> None:
    for path in root.rglob("*.py"):
        path.write_bytes(VARIANTS[variant](path.read_bytes()))
    before = tree(root)
    code, report = run("patch", root)
    assert (code, report["status"]) == (0, "patched")
    after = tree(root)
    assert report["files"] == sorted(name for name in before if after[name] != before[name])
    for name in report["files"]:
        if b"\r\n" in before[name]:
            assert b"\n" not in after[name].replace(b"\r\n", b"")
        assert before[name].startswith(b"\xef\xbb\xbf") == after[name].startswith(b"\xef\xbb\xbf")
        assert before[name].endswith(b"\n") == after[name].endswith(b"\n")
    computes_what_the_starter_does(root)
    assert run("revert", root)[0] == 0
    assert tree(root) == before


# Formatters that ran over patched code.


@pytest.mark.parametrize(
    "formatter",
    [
        ["format", "--line-length", "88"],
        ["format", "--line-length", "40"],
        ["format", "--line-length", "320"],
        ["format", "--config", "format.quote-style='single'"],
        ["check", "--select", "I", "--fix", "--config", "lint.isort.force-sort-within-sections=true"],
    ],
    ids=" ".join,
)
def test_a_formatter_run_over_patched_code(root: Path, formatter: list[str]) -> None:
    before = meaning(root)
    assert run("patch", root)[0] == 0
    patched = meaning(root)
    subprocess.run([sys.executable, "-m", "ruff", *formatter, "--isolated", "-q", str(root)], check=True)
    formatted = tree(root)
    # sorting imports changes what the files say, formatting does not
    assert formatter[0] == "check" or meaning(root) == patched

    code, report = run("status", root)
    assert (code, report["status"]) == (0, "patched and edited since")
    code, report = run("patch", root)
    assert code == 0
    assert {site["status"] for site in report["sites"]} == {"already patched"}
    assert tree(root) == formatted
    computes_what_the_starter_does(root)

    code, report = run("revert", root)
    if code == 0:
        assert formatter[0] == "check" or meaning(root) == before
        assert not any(b"chipmunk." in content for name, content in tree(root).items() if name.endswith(".py"))
    else:
        assert code == 3
        assert report["error"]["places"]
        assert tree(root) == formatted


# Patched by hand.


def test_patched_by_hand_already(root: Path) -> None:
    assert run("patch", root)[0] == 0
    by_hand = tree(root)
    for path in sorted((root / ".chipmunk").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / ".chipmunk").rmdir()

    code, report = run("patch", root)
    assert code == 0
    assert {site["status"] for site in report["sites"]} == {"already patched"}
    assert tree(root) == by_hand
    computes_what_the_starter_does(root)
    code, report = run("status", root)
    assert (code, report["status"]) == (0, "patched, but without a journal")
    code, report = run("revert", root)
    assert code == 2
    assert {"flux/math.py", "flux/sampling.py"} <= {place["file"] for place in report["error"]["places"]}
    assert tree(root) == by_hand


def test_patched_by_hand_in_one_file(root: Path, tmp_path: Path) -> None:
    other = copy_starter(tmp_path / "other")
    assert run("patch", other)[0] == 0
    (root / "flux/math.py").write_bytes((other / "flux/math.py").read_bytes())
    before = tree(root)
    code, report = run("patch", root)
    assert code == 0
    assert {site["status"] for site in report["sites"] if site["file"] == "flux/math.py"} == {"already patched"}
    assert {name for name in before if before[name] != tree(root)[name]} == set(report["files"])
    assert tree(root) == tree(other)
    computes_what_the_starter_does(root)
    assert run("revert", root)[0] == 0
    assert tree(root) == before
