"""How a parent process tells a worker its order, a dataclass: in a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

Kind = TypeVar("Kind")

PROGRESS = "\x1echipmunk "
"""Starts a line of a worker's output that is for the parent."""


def write_order(order: Any, path: Path) -> None:
    path.write_bytes(TypeAdapter(type(order)).dump_json(order, indent=1))


def read_order(kind: type[Kind], path: Path) -> Kind:
    """The order of class `kind` that was written to `path`: equal to it, paths, tuples and all."""
    return TypeAdapter(kind).validate_json(path.read_bytes())
