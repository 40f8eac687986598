"""A small FLUX: the architecture of FLUX.1 at a width that runs on a laptop's CPU."""

__version__ = "0.1.0"
