"""What Chipmunk can change (patches) and which families of code base it knows (targets), each one Python file.

Found in three places: built in (the folders `patches/` and `targets/`), entry points of installed packages (groups
`chipmunk.patches` and `chipmunk.targets`), and folders that the user names. No file lists them, so adding one is
adding a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context
    from chipmunk.rewrite.plan import ModelFacts

API = 1
"""Version of the interface between Chipmunk and its plug-ins; a plug-in states the one it was written for."""


class RegistryError(Exception):
    """A plug-in that cannot be used; the message names where it comes from."""


@dataclass(frozen=True)
class Example:
    """A before/after pair that documents a patch and tests it.

    `before` stands at `path` in a minimal FLUX repository (`chipmunk.rewrite.minimal.FILES`), beside `others`; the
    patch must turn it into `after`, or leave it alone if `after` is None.
    """

    title: str
    path: str
    before: str
    after: str | None
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Patch:
    """One change that Chipmunk makes."""

    name: str
    version: str
    summary: str
    """One line."""
    documentation: str
    examples: tuple[Example, ...]
    origin: str
    """Where it comes from: the path of its file, or the entry point."""
    rule: Callable[[Context], None]


@dataclass(frozen=True)
class Target:
    """One family of code base."""

    name: str
    summary: str
    documentation: str
    origin: str
    recognise: Callable[[Sequence[ModelFacts], Mapping[str, bytes]], bool]
    module: ModuleType
    """The plug-in itself: verify and bench call its other functions, in processes of their own."""


@dataclass(frozen=True)
class Registry:
    patches: dict[str, Patch]
    targets: dict[str, Target]


def data_path(name: str) -> Path:
    """Where `patches`, `targets`, `templates` or `chipmunk-config.yml` lies: in the wheel, or on top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_data", package.parent):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is missing from this installation of Chipmunk: reinstall chipmunk-flux")


def load(plugins: Sequence[Path] = ()) -> Registry:
    """All patches and targets: built in, from entry points, and from the folders `plugins`.

    A folder may hold `patches/` and `targets/`, or the plug-in files themselves. Raises RegistryError for a file that
    cannot be loaded, a duplicate name, or a plug-in for another version of the interface.
    """
    patches: dict[str, Patch] = {}
    targets: dict[str, Target] = {}
    for origin, module in _modules(plugins):
        name = _attribute(module, "NAME", str, origin)
        if (api := _attribute(module, "API", int, origin)) != API:
            raise RegistryError(f"{name} ({origin}) was written for plug-in interface {api}; this Chipmunk has {API}.")
        kind = patches if hasattr(module, "rule") else targets
        if name in kind:
            raise RegistryError(
                f"Two plug-ins are called {name}: {kind[name].origin} and {origin}. Rename or remove one."
            )
        documentation = _attribute(module, "__doc__", str, origin).strip()
        summary = documentation.splitlines()[0].rstrip(".")
        if hasattr(module, "rule"):
            version = _attribute(module, "VERSION", str, origin)
            examples = tuple(_attribute(module, "EXAMPLES", (tuple, list), origin))
            patches[name] = Patch(name, version, summary, documentation, examples, origin, module.rule)
        elif hasattr(module, "recognise"):
            targets[name] = Target(name, summary, documentation, origin, module.recognise, module)
        else:
            raise RegistryError(f"{origin} is no plug-in: a patch defines rule(), a target recognise().")
    return Registry(patches, targets)


def _modules(plugins: Sequence[Path]) -> Iterator[tuple[str, ModuleType]]:
    for kind in ("patches", "targets"):
        for path in _files(data_path(kind)):
            yield _relative(path), _import_file(path)
    for group in ("chipmunk.patches", "chipmunk.targets"):
        for point in metadata.entry_points(group=group):
            package = f" of {point.dist.name}" if point.dist is not None else ""
            origin = f"entry point {point.name} = {point.value}{package}"
            try:
                module = point.load()
            except (Exception, SystemExit) as error:
                raise RegistryError(f"{origin} cannot be loaded: {type(error).__name__}: {error}") from error
            yield origin, module
    for root in plugins:
        if not root.is_dir():
            raise RegistryError(f"The plug-in folder {root} does not exist.")
        folders = [root / name for name in ("patches", "targets") if (root / name).is_dir()] or [root]
        for folder in folders:
            for path in _files(folder):
                yield str(path), _import_file(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def _relative(path: Path) -> str:
    """Built-in files are named from the top of the checkout: `patches/attention.py`."""
    return f"{path.parent.name}/{path.name}"


def _import_file(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"_chipmunk_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RegistryError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, kind: type | tuple[type, ...], origin: str) -> Any:
    value = getattr(module, name, None)
    if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
        what = "a docstring" if name == "__doc__" else name
        raise RegistryError(f"{origin} is no usable plug-in: {what} is missing or of the wrong type.")
    return value


__all__ = ["API", "Example", "Patch", "Registry", "RegistryError", "Target", "data_path", "load"]
