"""The operators by themselves, on a GPU: `python -m chipmunk.bench.ops`."""
