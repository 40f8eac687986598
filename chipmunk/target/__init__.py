"""What targets share: building a model by its constructor, calling it by its forward, an image without its own loop.

Targets (`targets/`, and those that users write) are small because of these. Nothing here imports torch before it is
called: the tool loads targets without it.
"""

from __future__ import annotations

from chipmunk.target.calls import call, inputs
from chipmunk.target.construct import SHRINK, construct, parameter_names
from chipmunk.target.signature import CannotRun, refuse_unknown
from chipmunk.target.tensors import depth, grid, random_tensors, shapes_of, widths
from chipmunk.target.without_loop import run_loop, sample

__all__ = [
    "SHRINK",
    "CannotRun",
    "call",
    "construct",
    "depth",
    "grid",
    "inputs",
    "parameter_names",
    "random_tensors",
    "refuse_unknown",
    "run_loop",
    "sample",
    "shapes_of",
    "widths",
]
