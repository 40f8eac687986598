"""Every operator call of a run that Triton takes, held against the reference on exactly the same numbers.

Two sparse runs in half precision drift apart, for rounding chooses between scores that are nearly equal. Two operators
that are given the same inputs do not, so the check is strict, and says which operator is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from chipmunk.ops import dispatch

LIMITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
"""Largest relative L2 error against float64, by dtype: twice the distance between two neighbouring numbers, of which
rounding the result alone takes about a third."""

_CHOICES = ("select_columns", "select_neurons", "reorder_tokens")
"""Their results have to be equal: the reference computes them in the same dtype."""
_MUTATED = {"sparse_mlp_in": 4, "sparse_swiglu_in": 6, "sparse_mlp_out": 3, "select_neurons": 1}
"""Which argument an operator writes to."""


@dataclass
class Found:
    """What came of one operator's calls."""

    calls: int = 0
    error: float = 0.0
    """The largest, relative to the result (to the addend, where that is larger)."""
    limit: float = 0.0
    shapes: str = ""
    """Of the tensors in the call with the largest error."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Calls that Triton did not take, by reason."""

    @property
    def holds(self) -> bool:
        return self.calls > 0 and self.error <= self.limit and not self.passed_over


@contextmanager
def hold_against_reference() -> Iterator[dict[str, Found]]:
    """While this is open, each call of an operator runs both ways; what the run goes on with is Triton's result."""
    found: dict[str, Found] = {}
    original = dispatch.call

    def call(
        operator: str, implementation: str, reference: Callable[..., Any], expect: Callable[..., None], *args: Any
    ) -> Any:
        here = found.setdefault(operator, Found())
        reason = dispatch.why_not_triton(operator, *args)
        if reason is not None:
            here.passed_over[reason] = here.passed_over.get(reason, 0) + 1
            return original(operator, implementation, reference, expect, *args)
        exact = [_exact(arg, operator) for arg in args]
        wanted = _results(operator, reference(*exact), exact)
        result = original(operator, "triton", reference, expect, *args)
        here.calls += 1
        for got, want in zip(_results(operator, result, args), wanted, strict=True):
            error = _error(got, want, _scale(operator, want, args, exact))
            if error >= here.error:
                here.error = error
                here.shapes = ", ".join(str(tuple(arg.shape)) for arg in args if isinstance(arg, Tensor))
        here.limit = 0.0 if operator in _CHOICES else LIMITS[args[0].dtype]
        return result

    dispatch.call = call
    try:
        yield found
    finally:
        dispatch.call = original


def as_json(found: dict[str, Found]) -> dict[str, dict[str, Any]]:
    return {operator: {**asdict(each), "holds": each.holds} for operator, each in sorted(found.items())}


def _exact(arg: Any, operator: str) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    if operator in _CHOICES or not arg.is_floating_point():
        return arg.clone()
    return arg.double()


def _results(operator: str, returned: Any, args: Any) -> list[Tensor]:
    returned = list(returned) if isinstance(returned, tuple) else [] if returned is None else [returned]
    return [*returned, args[_MUTATED[operator]]] if operator in _MUTATED else returned


def _scale(operator: str, want: Tensor, args: Any, exact: Any) -> float:
    """The size of what a result was computed from: what changed in a cache is as exact as the cache, not as itself."""
    sizes = [float(want.double().norm())]
    sizes += [float(arg.double().norm()) for arg in args if isinstance(arg, Tensor) and arg.shape == want.shape]
    if operator in _MUTATED:
        mutated = exact[_MUTATED[operator]].double()
        sizes.append(float(mutated.norm()) * (want.numel() / mutated.numel()) ** 0.5)
    return max(*sizes, 1e-30)


def _error(got: Tensor, want: Tensor, scale: float) -> float:
    if got.shape != want.shape:
        return float("inf")
    error = float((got.double() - want.double()).norm()) / scale
    return error if error == error else float("inf")
