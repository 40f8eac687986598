"""`chipmunk doctor`: what this machine and its Python can run of Chipmunk, and what stands in the way."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chipmunk.cli.environment import Environment, Finding, inspect, package_findings, packages_of, runtime_finding
from chipmunk.cli.failure import UNMET, command
from chipmunk.cli.options import Json, Python

if TYPE_CHECKING:
    from rich.console import Console


_OLDEST_GPU = (8, 0)
_OLDEST_TORCH = (2, 6)


@command
def doctor(
    repo: Annotated[
        Path | None, typer.Argument(metavar="REPO", help="A FLUX repository: is it the one that would be imported?")
    ] = None,
    python: Python = None,
    as_json: Json = False,
) -> None:
    """Say what will run here, and what is missing.

    Looks at Python, torch, Triton and the GPU, and at what `import chipmunk` and the repository's own package would
    load. Exits with 1 if something stands in the way.
    """
    from chipmunk.apply import status as status_of
    from chipmunk.cli.terminal import Waiting, print_json, screen

    root = None
    files: tuple[str, ...] = ()
    if repo is not None:
        root, files = _model_files(repo)
    packages = packages_of(files, root) if root is not None else {}
    with Waiting() as waiting:
        waiting("asking that Python", 0, 1)
        found = inspect(root, python, packages, deep=True)
    findings = [*_machine(found), runtime_finding(found), *_what_runs(found)]
    if root is not None:
        findings.append(Finding("repository", "ok", f"{root}: {status_of(root).state.value}"))
        findings += package_findings(root, packages, found)
    healthy = not any(finding.level == "problem" for finding in findings)
    if as_json:
        status = "healthy" if healthy else "check failed"
        print_json({"status": status, "python": found.executable, "findings": list(map(asdict, findings))})
    else:
        _show(screen(), findings)
    if not healthy:
        raise typer.Exit(UNMET)


def _model_files(repo: Path) -> tuple[Path, tuple[str, ...]]:
    """The repository's root, and the files in it that are or would be patched."""
    from chipmunk import registry, rewrite
    from chipmunk.apply import Store, locate, read

    root = locate(repo)
    journal = Store(root).load()
    if journal is not None and journal.files:
        return root, tuple(file.path for file in journal.files)
    plan = rewrite.plan_repository(read(root).files, registry.load())
    return root, tuple(change.path for change in plan.changes)


def _machine(found: Environment) -> list[Finding]:
    import chipmunk

    facts = found.facts
    tool = f"chipmunk {chipmunk.__version__} on Python {platform.python_version()} ({sys.executable})"
    findings = [
        Finding("tool", "ok", tool),
        Finding("Python", "ok", f"{facts['python']}, {found.executable} ({found.chosen})"),
    ]
    if "torch_error" in facts:
        findings.append(
            Finding("torch", "problem", facts["torch_error"], f"{found.executable} -m pip install 'torch>=2.6'")
        )
        return findings
    old = _version(facts["torch"]) < _OLDEST_TORCH
    findings.append(
        Finding(
            "torch",
            "problem" if old else "ok",
            facts["torch"] + ("; Chipmunk needs 2.6 or newer" if old else ""),
            f"{found.executable} -m pip install --upgrade 'torch>=2.6'" if old else None,
        )
    )
    if "triton" in facts:
        findings.append(Finding("triton", "ok", facts["triton"]))
    else:
        findings.append(Finding("triton", "note", facts["triton_error"]))
    for device in facts["devices"]:
        findings.append(Finding("GPU", "ok", _gpu(device)))
    if not facts["devices"]:
        build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU only"
        findings.append(Finding("GPU", "note", facts.get("device_error") or f"torch sees none (its build: {build})"))
    return findings


def _what_runs(found: Environment) -> list[Finding]:
    facts = found.facts
    if "torch_error" in facts:
        return [Finding("runs", "note", "nothing without torch; patch, diff, status and revert need none")]
    findings = [Finding("reference", "ok", "PyTorch operators run here, on the CPU and on any GPU")]
    capable = [device for device in facts["devices"] if tuple(device["capability"]) >= _OLDEST_GPU]
    if facts["hip"]:
        findings.append(Finding("Triton", "note", "untested on ROCm; `implementation: reference` runs"))
    elif not facts["devices"]:
        findings.append(Finding("Triton", "note", "will not run: no CUDA GPU, so expect no speed-up"))
    elif not capable:
        findings.append(Finding("Triton", "note", "will not run: the GPU is older than compute capability 8.0"))
    elif "triton_error" in facts:
        findings.append(
            Finding("Triton", "problem", "will not run: triton is missing", f"{found.executable} -m pip install triton")
        )
    else:
        findings.append(Finding("Triton", "ok", "operators run here; `implementation: auto` takes them"))
    return findings


def _show(out: Console, findings: list[Finding]) -> None:
    from rich.text import Text

    from chipmunk.cli.terminal import clean, exact, hanging

    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        head = Text.assemble((finding.level.ljust(9), styles[finding.level]), f"{finding.subject.ljust(width)}  ")
        hanging(out, head, Text(clean(finding.says)))
        if finding.next_command is not None:
            exact(out, " " * (width + 11) + finding.next_command, "bold")


def _gpu(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    return f"{device['name']}, compute capability {major}.{minor}, {device['bytes'] / 2**30:.0f} GiB"


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version; something unreadable counts as new."""
    try:
        major, minor = text.split("+")[0].split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return (99, 0)
