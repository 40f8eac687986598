"""Finding the configuration that is cheapest while fidelity stays above a floor, on the model at hand."""

from chipmunk.tune.run import TuneOptions, TuneReport, run

__all__ = ["TuneOptions", "TuneReport", "run"]
