"""The blocks of a model, and which modules find the state of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

from torch import nn

from chipmunk.runtime.find_model import ForwardSpec
from chipmunk.runtime.layer_state import LayerState


def blocks_of(model: nn.Module, spec: ForwardSpec) -> list[tuple[str, nn.Module]]:
    """All blocks with their names, `double_blocks.3`: those of the first list, then those of the second."""
    return [
        (f"{attribute}.{index}", block)
        for attribute in (spec.double, spec.single)
        for index, block in enumerate(attrgetter(attribute)(model))
    ]


def holders(blocks: Sequence[nn.Module], states: Sequence[LayerState | None]) -> Iterator[tuple[nn.Module, LayerState]]:
    """The modules that are to find a state: each block, and the modules right below it.

    A processor object, which may be the user's own, is handed such a module and not the block. One that several blocks
    share would find the wrong layer's state, and gets none.
    """
    owners: dict[nn.Module, int] = {}
    shared: set[nn.Module] = set()
    for index, block in enumerate(blocks):
        for module in block.children():
            if owners.setdefault(module, index) != index:
                shared.add(module)
    whole = set(blocks)
    for index, (block, state) in enumerate(zip(blocks, states, strict=True)):
        if state is not None:
            yield block, state
            for module in block.children():
                if owners[module] == index and module not in shared and module not in whole:
                    yield module, state
