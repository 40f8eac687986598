"""Import placeholders: empty stand-ins for packages that a repository imports but that are not installed.

To build and run a model, the text encoders, image readers and downloaders that the same files import are not needed.
Until `arm` is called (while the repository is being imported) a placeholder bears everything that module-level code
does with it: attributes, calls, subclassing, decorating, annotations. After that, using one raises PlaceholderUsed.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

APPLICATIONS = {"comfy": "ComfyUI", "comfy_extras": "ComfyUI", "comfy_api": "ComfyUI", "folder_paths": "ComfyUI"}
"""Packages that only an application's folder holds: those that the package index has by their names are others."""


def to_install(package: str) -> str:
    """The command after which a missing package can be imported."""
    name = package.partition(".")[0]
    if name in APPLICATIONS:
        return f"export PYTHONPATH=/path/to/{APPLICATIONS[name]}  # its folder holds the package {name!r}"
    return f"{sys.executable} -m pip install {name}"


class PlaceholderUsed(ImportError):
    """Code that runs needs a package that is not installed."""


class _Meta(type):
    """Makes a class answer as if it were whatever the missing package holds."""

    _owner: Placeholders
    _path: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._owner.stand_in(f"{cls._path}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__dict__.get("_path") is None:  # a class of the repository that inherits from a placeholder
            return super().__call__(*args, **kwargs)
        return cls._owner.call(cls._path, args, kwargs)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *error: Any) -> None:
        return None


def missing_base(model_class: type) -> str | None:
    """The package that is not installed and that a class inherits from; None if there is none."""
    for base in model_class.__mro__:
        path = vars(base).get("_path")
        if isinstance(base, _Meta) and isinstance(path, str):
            return path.partition(".")[0]
    return None


class _Module(ModuleType):
    """A package that is not there."""

    def __init__(self, name: str, owner: Placeholders) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__["_owner"] = owner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        owner: Placeholders = self.__dict__["_owner"]
        return owner.stand_in(f"{self.__name__}.{name}")


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands at the end of `sys.meta_path`: it is asked only for what no one else has found."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: set[str] = set()
        """Top-level packages that were replaced."""
        self.armed = False

    def install(self) -> None:
        sys.meta_path.append(self)

    def arm(self) -> None:
        """From now on, using a placeholder raises, and a package that is not there is not there."""
        self.armed = True

    def stand_in(self, path: str) -> Any:
        if self.armed:
            self._refuse(path)
        return _Meta(path.rpartition(".")[2], (), {"_owner": self, "_path": path})

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.armed:
            self._refuse(path)
        if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], _Meta):
            return args[0]  # as a decorator
        return self.stand_in(path + "()")

    def _refuse(self, path: str) -> None:
        package = path.partition(".")[0]
        raise PlaceholderUsed(f"{path} is needed, but the package '{package}' is not installed", name=package)

    # The import machinery's side.

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = fullname.partition(".")[0]
        if "." in fullname and package not in self.names:
            return None  # a module that an installed package, or the repository, does not have
        if self.armed or package in sys.stdlib_module_names or package == "chipmunk":
            return None
        if package not in self.names and not self._is_imported_by_the_repository():
            return None
        self.names.add(package)
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        return None

    def _is_imported_by_the_repository(self) -> bool:
        """Whether a file of the repository asks, and not in order to find out if the package is there."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and ("importlib" in frame.f_code.co_filename or frame.f_globals is globals()):
            if frame.f_code is importlib.util.find_spec.__code__:
                return False
            frame = frame.f_back
        if frame is None:
            return False
        file = Path(frame.f_code.co_filename)
        return file.is_relative_to(self.root) and frame.f_lineno not in _optional_lines(file)


@cache
def _optional_lines(file: Path) -> frozenset[int]:
    """Lines inside `try` blocks that catch a failed import: the repository does without what they import."""

    def catches_import(handler: ast.ExceptHandler) -> bool:
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {node.id for node in caught if isinstance(node, ast.Name)}
        return None in caught or bool(names & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})

    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return frozenset()
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(map(catches_import, node.handlers)):
            for statement in node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return frozenset(lines)
