"""The HTML report: one self-contained page of a fidelity run."""

from chipmunk.report.page import render, write

__all__ = ["render", "write"]
