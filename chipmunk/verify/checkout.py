"""Importing modules of a checkout by their files, and making sure that it is the checkout that was imported."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from chipmunk.verify.placeholders import Placeholders, PlaceholderUsed, to_install


class CheckoutError(Exception):
    """A file of the checkout cannot be imported; says which, where it failed, and what to do."""

    def __init__(self, message: str, next_command: str | None = None) -> None:
        super().__init__(message)
        self.next_command = next_command


class Checkout:
    """A repository on the disk whose modules are imported by file.

    Nothing is written into it: no byte code, and relative output goes to the process's working directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.placeholders = Placeholders(root)
        self.placeholders.install()
        self.notes: list[str] = []
        sys.dont_write_bytecode = True

    def load(self, file: str) -> ModuleType:
        """The module of `file`, a path relative to the root. Raises CheckoutError."""
        path = self.root / file
        base = import_root(self.root, path)
        for folder in (self.root / "src", self.root, base):
            if folder.is_dir() and str(folder) in sys.path:
                sys.path.remove(str(folder))
            if folder.is_dir():
                sys.path.insert(0, str(folder))
        name = ".".join(path.relative_to(base).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        self._note_shadow(name, base)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise self._explain(error, file) from error
        found = getattr(module, "__file__", None)
        if found is None or not Path(found).is_relative_to(self.root):
            raise CheckoutError(
                f"importing '{name}' gave {found}, not {path}: another package of that name is installed and comes "
                f"first. Uninstall it, or run verify with a Python that does not have it (--python)",
                f"{sys.executable} -m pip uninstall {name.partition('.')[0]}",
            )
        return module

    def object(self, file: str, qualified_name: str) -> Any:
        """A class or function of `file`."""
        found: Any = self.load(file)
        for part in qualified_name.split("."):
            found = getattr(found, part)
        return found

    def _note_shadow(self, name: str, base: Path) -> None:
        """Say if Python finds another package of the same name where the checkout's folder is not on `sys.path`."""
        package = name.partition(".")[0]
        if package in sys.modules or base == self.root:
            return
        others = [entry for entry in sys.path if not Path(entry).is_relative_to(self.root)]
        spec = importlib.machinery.PathFinder.find_spec(package, others)
        if spec is not None and spec.origin is not None:
            self.notes.append(
                f"a package '{package}' is installed at {Path(spec.origin).parent}: Python runs that one instead of "
                f"this checkout, unless it is started in {base} or the checkout is installed (pip install -e)"
            )

    def place_of(self, error: Exception) -> str:
        """`at FILE:LINE: `, the innermost place in the checkout that an error passed through; empty if none."""
        where = ""
        trace = error.__traceback__
        while trace is not None:
            origin = Path(trace.tb_frame.f_code.co_filename)
            if origin.is_relative_to(self.root):
                where = f"at {origin.relative_to(self.root)}:{trace.tb_lineno}: "
            trace = trace.tb_next
        return where

    def _explain(self, error: Exception, file: str) -> CheckoutError:
        package = error.name if isinstance(error, ImportError) else None
        hint = None
        if isinstance(error, (ModuleNotFoundError, PlaceholderUsed)) and package:
            hint = to_install(package)
        message = f"{file} cannot be imported: {self.place_of(error)}{type(error).__name__}: {error}"
        return CheckoutError(message, hint)


def import_root(root: Path, file: Path) -> Path:
    """The folder that has to be on `sys.path` so that `file` is imported under the name that its package uses.

    Above the outermost regular package, where there is one. Otherwise the file's own imports decide: relative ones need
    parents, and an absolute one that starts with the name of a folder above the file names the package.
    """
    ancestors = [folder for folder in file.parents if folder.is_relative_to(root)]
    packages = [folder for folder in ancestors if folder != root and (folder / "__init__.py").exists()]
    if packages:
        return packages[-1].parent
    levels, names = _imports(file)
    for folder in ancestors[1:]:
        if file.relative_to(folder).parts[0] in names:
            return folder
    return ancestors[min(levels, len(ancestors) - 1)]


def _imports(file: Path) -> tuple[int, set[str]]:
    """The deepest relative import (1 for `from .x import`), and the first names of absolute ones."""
    levels, names = 0, set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            levels = max(levels, node.level)
            if not node.level and node.module:
                names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
    return levels, names - sys.stdlib_module_names
