"""The Python that runs the repository: which one it is, and whether it can import Chipmunk's runtime.

Patched code imports `chipmunk`, so what matters is not the Python that runs this tool. A Python that lies inside the
repository is part of it: it is looked at, but executed only by `chipmunk doctor`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import chipmunk
from chipmunk.cli.failure import Failure

_INSIDE = (".venv", "venv", "env")
_ENOUGH = 120.0


@dataclass(frozen=True)
class Environment:
    """What one Python is and would import."""

    executable: str
    chosen: str
    """How it was found, for the user: "given", "active environment"."""
    chipmunk: tuple[Path, ...] = ()
    """Folders that `import chipmunk` would load from."""
    packages: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """The same for the packages of the repository that were asked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Versions and devices; see `chipmunk.cli.probe`."""

    @property
    def importable(self) -> bool:
        """Whether `import chipmunk` finds this project's runtime."""
        return any((folder / "runtime").is_dir() for folder in self.chipmunk)

    @property
    def other(self) -> Path | None:
        """Where another package of the same import name is found in its place, the original Chipmunk's say."""
        return self.chipmunk[0] if self.chipmunk and not self.importable else None


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    level: str
    """`ok`, `note` (something cannot run, and that may be fine) or `problem`."""
    says: str
    next_command: str | None = None


def inspect(root: Path | None, python: str | None, packages: Iterable[str] = (), *, deep: bool = False) -> Environment:
    """Look at the Python that runs the repository at `root`: `python`, or the likeliest one.

    `deep` imports torch there, which takes seconds, and may execute a Python inside the repository. Raises `Failure`
    if the Python cannot be run.
    """
    executable, chosen = _choose(root, python)
    if python is None and not deep and root is not None and Path(executable).is_relative_to(root):
        return _look_at(Path(executable), chosen)
    source = Path(__file__).with_name("probe.py").read_text("utf-8")
    question = json.dumps([None if root is None else str(root), list(packages), deep])
    try:
        done = subprocess.run(
            [executable, "-c", source, question], capture_output=True, timeout=_ENOUGH, cwd=os.sep, check=False
        )
        facts = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        why = getattr(error, "strerror", None) or "it does not answer"
        if isinstance(error, ValueError):
            why = (done.stderr.decode(errors="replace").strip().splitlines() or ["it prints no answer"])[-1]
        raise Failure(
            f"{executable} cannot be run as a Python ({why})", next_command="chipmunk doctor --python EXECUTABLE"
        ) from error
    return Environment(
        executable,
        chosen,
        tuple(map(Path, facts.pop("chipmunk"))),
        {name: tuple(map(Path, found)) for name, found in facts.pop("packages").items()},
        facts,
    )


def _choose(root: Path | None, python: str | None) -> tuple[str, str]:
    if python is not None:
        found = shutil.which(python)
        if found is None:
            raise Failure(f"there is no Python at {python}", next_command="chipmunk doctor --python EXECUTABLE")
        return os.path.abspath(found), "given"
    for name in _INSIDE if root is not None else ():
        assert root is not None
        if (root / name / "pyvenv.cfg").is_file() and (executable := _python_of(root / name)):
            return executable, f"the repository's {name}"
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if (prefix := os.environ.get(variable)) and (executable := _python_of(Path(prefix))):
            return executable, "the active environment"
    found = shutil.which("python3") or shutil.which("python")
    return (os.path.abspath(found), "on your PATH") if found else (sys.executable, "the one that runs this tool")


def _python_of(prefix: Path) -> str | None:
    candidates = (prefix / "bin" / "python", prefix / "Scripts" / "python.exe", prefix / "python.exe")
    return next((str(path) for path in candidates if path.is_file()), None)


def _look_at(executable: Path, chosen: str) -> Environment:
    """What can be told of a virtual environment without running its Python."""
    prefix = executable.parent.parent
    folders = [*prefix.glob("lib/python3*/site-packages"), *prefix.glob("Lib/site-packages")]
    packages = [folder / "chipmunk" for folder in folders if (folder / "chipmunk").is_dir()]
    if not packages and any(any(folder.glob("chipmunk_flux-*.dist-info")) for folder in folders):
        packages = [Path(chipmunk.__file__).parent]  # an editable installation, whose folder is elsewhere
    return Environment(str(executable), chosen, tuple(packages))


def runtime_finding(found: Environment) -> Finding:
    """Whether patched code would import this project's runtime."""
    if found.importable:
        version = found.facts.get("version")
        name = f"chipmunk-flux {version}" if version else "a checkout"
        return Finding("runtime", "ok", f"{name}, {found.chipmunk[0]}")
    install = install_command(found.executable)
    if found.other is not None:
        says = f"another package called chipmunk is in {found.other}; patched code would import that one"
        return Finding("runtime", "problem", says, f"{found.executable} -m pip uninstall chipmunk   then: {install}")
    return Finding("runtime", "problem", "this Python cannot import chipmunk, which patched code does", install)


def package_findings(root: Path, packages: dict[str, Path], found: Environment) -> list[Finding]:
    """Whether the repository's own packages are imported from the repository."""
    from chipmunk.apply.errors import quoted

    findings = []
    remedy = f"{found.executable} -m pip install --editable {quoted(root)}"
    for name, folder in packages.items():
        places = found.packages.get(name, ())
        if any(place.resolve() == folder.resolve() for place in places):
            findings.append(Finding(name, "ok", f"imported from this repository, {folder}"))
        elif places:
            says = f"imported from {places[0]}, not from this repository: the patched code would never run"
            findings.append(Finding(name, "problem", says, remedy))
        else:
            says = "not importable from the repository's root; that may be right if you start it from another folder"
            findings.append(Finding(name, "note", says, remedy))
    return findings


def install_command(executable: str) -> str:
    """The command that gives a Python what patched code imports."""
    from chipmunk.apply.errors import quoted

    return f"{quoted(Path(executable))} -m pip install {_requirement()}"


def _requirement() -> str:
    """What to tell pip: the checkout that this tool runs from, or the name of the distribution."""
    from importlib import metadata

    from chipmunk.apply.errors import quoted

    checkout = Path(chipmunk.__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return quoted(checkout)
    try:
        origin = json.loads(metadata.distribution("chipmunk-flux").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    return str(origin.get("url", f"chipmunk-flux=={chipmunk.__version__}"))


def packages_of(files: Iterable[str], root: Path) -> dict[str, Path]:
    """The top-level packages that files of the repository belong to, each with its folder, the nearest to the root."""
    found: dict[str, PurePosixPath] = {}
    for file in files:
        folder = PurePosixPath(file).parent
        top = None
        while folder.name and (root / folder / "__init__.py").is_file():
            top, folder = folder, folder.parent
        if top is not None and len(top.parts) < len(found.get(top.name, top / "deeper").parts):
            found[top.name] = top
    return {name: root / top for name, top in found.items()}
