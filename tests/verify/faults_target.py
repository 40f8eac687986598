"""The built-in target with a model of fewer blocks: faults show in two sparse layers of a kind as in three."""

from chipmunk import registry

_flux = registry.load().targets["flux"].module
globals().update({name: value for name, value in vars(_flux).items() if not name.startswith("__")})
SMALL = {**_flux.SMALL, "depth": 3, "depth_single_blocks": 2}
