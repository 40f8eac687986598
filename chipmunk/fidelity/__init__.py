"""Fidelity of the patched repository: how close its pictures are to the dense ones, and what they cost."""

from chipmunk.fidelity.report import FidelityError, FidelityReport
from chipmunk.fidelity.run import FidelityOptions, run

__all__ = ["FidelityError", "FidelityOptions", "FidelityReport", "run"]
