"""Which reductions the compiler holds in registers: rows of a token or a head, which it would read twice.

FLUX normalises each token (3072 numbers) and each head (128 numbers). Inductor writes a loop that goes over the row
once for the sum and once more for the result: it takes a row for a short one up to 1024 numbers, or 64 where it does
not see in time that they lie side by side. Held in registers, each number is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

LONGEST_ROW = 4096
"""Numbers of a row that the registers of one program hold."""


@cache
def _handler() -> Callable[[], AbstractContextManager[Any]]:
    try:
        from torch._inductor import config
        from torch._inductor.choices import InductorChoices
        from torch._inductor.virtualized import V

        base = getattr(config, "inductor_choices_class", None) or InductorChoices
        inherited = base.should_use_persistent_reduction
        set_handler = V.set_choices_handler
    except (ImportError, AttributeError):
        return nullcontext  # another PyTorch: its own choices

    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if inherited(features, cooperative_reduction):
            return True
        return bool(config.triton.persistent_reductions) and not cooperative_reduction and _is_over_rows(features)

    name = "should_use_persistent_reduction"
    handler = type("RowsInRegisters", (base,), {name: staticmethod(should_use_persistent_reduction)})()
    return lambda: set_handler(handler)


def rows_in_registers() -> AbstractContextManager[Any]:
    """While it is entered, kernels that Inductor writes hold a row of at most 4096 adjacent numbers in registers."""
    return _handler()()


def _is_over_rows(features: Any) -> bool:
    """Whether all reductions of a kernel go over the last, adjacent numbers of what they read, and these are few.

    Not where anything in the kernel reads every other number, as RoPE does that is fused to a norm: it is no faster in
    registers, and takes seconds to compile.
    """
    from torch._inductor.dependencies import MemoryDep

    length = features.reduction_numel
    if not getattr(length, "is_Integer", False) or not 1 < int(length) <= LONGEST_ROW:
        return False
    if any(
        isinstance(read, MemoryDep) and not read.stride1_for_last_dim()
        for node in features.scheduler_nodes()
        for read in node.read_writes.reads
    ):
        return False
    return all(
        isinstance(read, MemoryDep) and read.stride1_for_last_dim(False)
        for node in features.reduction_nodes()
        for read in node.read_writes.reads
    )
