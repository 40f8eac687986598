"""Getting hold of a model's class, and keeping the model small and its weights random."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from chipmunk.verify.checkout import CheckoutError

LARGEST = 100_000_000
"""Parameters of a model that is built with the target's `SMALL` values."""


class BuildError(Exception):
    """The model cannot be built or called; says why, with a file to complete that does."""

    def __init__(self, message: str, skeleton: str | None = None) -> None:
        super().__init__(message)
        self.skeleton = skeleton


def load_file(path: Path, name: str) -> ModuleType:
    """Execute a Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def installed_object(file: str, name: str) -> Any:
    """A class of an installed package, by its file's path among the packages. Raises CheckoutError."""
    module = file.removesuffix(".py").replace("/", ".")
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        installed = importlib.util.find_spec(package) is not None
        why = f"{type(error).__name__}: {error}" if installed else "it is not installed"
        raise CheckoutError(
            f"{name} of {package} cannot be imported by {sys.executable}: {why}",
            f"{sys.executable} -m pip install --upgrade {package}",
        ) from error


@contextmanager
def refuse_large(name: str, target: str) -> Iterator[None]:
    """Raise BuildError where a model grows beyond `LARGEST`: the target does not know what makes it small."""
    parameters = 0

    def count(module: nn.Module, name_of_parameter: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters
        parameters += 0 if parameter is None else parameter.numel()
        if parameters > LARGEST:
            raise BuildError(
                f"{name} has more than {LARGEST:,} parameters as target '{target}' builds it, which does not know "
                f"what makes it small"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def randomise(model: nn.Module, seed: int) -> None:
    """Random weights that depend on each parameter's name and `seed` alone, and on which every output depends.

    Matrices keep the size of what passes through; nothing is zero (final layers and LoRA start at zero); scales of
    norms are above one, so that attention has favourites.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()) + seed)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                is_scale = name.endswith("scale") or re.search(r"norm\w*\.weight$", name) is not None
                parameter.normal_(1.5 if is_scale else 0.0, 0.1, generator=generator)
