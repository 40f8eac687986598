"""What a call of an operator launched is launched again by the next call of its form, on that call's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk.ops import dispatch, launch


class Kernel:
    """Stands for a compiled kernel: `out = (x · factor + y) · size`, noting which way it was launched."""

    arg_names = ("x", "y", "out", "factor", "size")

    def __init__(self) -> None:
        self.through_triton = 0
        self.direct = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def first(x: Tensor, y: Tensor, out: Tensor, factor: float, size: int, num_warps: int) -> Any:
            assert num_warps == 4
            self.through_triton += 1
            compute(x, y, out, factor, size)
            return {(*grid, 1, 1)[:3]: again}

        def again(*args: Any) -> None:
            self.direct += 1
            compute(*args)

        return first


def compute(x: Tensor, y: Tensor, out: Tensor, factor: float, size: int) -> None:
    out.copy_((x * factor + y) * size)


Operator = Callable[..., Any]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel for an operator whose implementation is what the test names with `implemented`."""
    monkeypatch.setattr(dispatch, "_repeated", {})
    return Kernel()


def implemented(monkeypatch: pytest.MonkeyPatch, function: Operator) -> Operator:
    """The operator that `function` carries out where Triton runs; it takes tensors that are not empty."""
    module = SimpleNamespace(toy=function, unsupported=lambda *args: None)
    monkeypatch.setattr(dispatch, "_triton_module", lambda operator: module)

    def expect(x: Tensor, *others: Any) -> None:
        dispatch.check(x.numel() > 0, "toy", "x must not be empty")

    def run(*args: Any) -> Any:
        return dispatch.call("toy", "triton", lambda *_: pytest.fail("not in Triton"), expect, *args)

    return run


def toy(kernel: Kernel) -> Operator:
    def work(x: Tensor, y: Tensor | None, factor: float) -> Tensor:
        out = launch.empty(tuple(x.shape), x)
        launch.launch(kernel, (3,), x, x if y is None else y, out, factor, size=2, num_warps=4)
        return out

    return work


def test_the_second_call_computes_with_its_own_tensors(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implemented(monkeypatch, toy(kernel))
    results = []
    for _ in range(3):
        x, y = torch.randn(4, 5), torch.randn(4, 5)
        results.append(run(x, y, 3.0))
        assert torch.equal(results[-1], (x * 3.0 + y) * 2)
    assert (kernel.through_triton, kernel.direct) == (1, 2)
    assert len({result.data_ptr() for result in results}) == 3  # nobody's result is written over


def test_what_is_written_in_place(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implemented(
        monkeypatch, lambda x, y, cache: launch.launch(kernel, (3,), x, y, cache, 1.0, size=1, num_warps=4)
    )
    for _ in range(2):
        x, y, cache = torch.randn(3, 7, 7).unbind()
        assert run(x, y, cache) is None
        assert torch.equal(cache, x + y)
    assert kernel.direct == 1


def test_another_form_is_another_call(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implemented(monkeypatch, toy(kernel))
    x, y = torch.randn(6, 6), torch.randn(6, 6)
    run(x, y, 3.0)
    forms: list[tuple[Tensor, Tensor | None, float]] = [
        (x, y, 4.0),  # another number
        (x, None, 3.0),  # an argument left out
        (x.half(), y.half(), 3.0),
        (x.T, y, 3.0),  # other strides
        (x[:5], y[:5], 3.0),
        (torch.randn(37)[1:].view(6, 6), y, 3.0),  # another alignment
    ]
    for args in forms:
        run(*args)
    assert (kernel.through_triton, kernel.direct) == (1 + len(forms), 0)
    for first, second, factor in forms:
        assert torch.equal(run(first, second, factor), (first * factor + (first if second is None else second)) * 2)
    assert kernel.through_triton == 1 + len(forms)


def test_arguments_that_are_not_allowed_are_refused_as_before(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implemented(monkeypatch, toy(kernel))
    run(torch.ones(2), torch.ones(2), 1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="toy: x must not be empty"):
            run(torch.ones(0), torch.ones(0), 1.0)


def test_one_tensor_as_two_arguments_says_nothing_of_two_tensors(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = implemented(monkeypatch, toy(kernel))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(run(x, x, 3.0), 8 * x)
    for _ in range(2):
        assert torch.equal(run(x, y, 3.0), (x * 3.0 + y) * 2)
    assert torch.equal(run(x, x, 3.0), 8 * x)


def _copies_first(kernel: Kernel) -> Operator:
    def work(x: Tensor, y: Tensor, factor: float) -> Tensor:
        out = launch.empty(tuple(x.shape), x)
        launch.launch(kernel, (3,), x.clone(), y, out, factor, size=2, num_warps=4)
        return out

    return work


def _returns_a_view(kernel: Kernel) -> Operator:
    return lambda *args: toy(kernel)(*args).view(-1).view(4, 5)


def _works_without_kernels(kernel: Kernel) -> Operator:
    def work(x: Tensor, y: Tensor, factor: float) -> Tensor:
        return launch.empty(tuple(x.shape), x).copy_((x * factor + y) * 2)

    return work


def _tries_parameters_out(kernel: Kernel) -> Operator:
    def work(*args: Any) -> Any:
        launch.do_not_repeat()
        return toy(kernel)(*args)

    return work


@pytest.mark.parametrize(
    "made",
    [_copies_first, _returns_a_view, _works_without_kernels, _tries_parameters_out],
    ids=lambda made: made.__name__,
)
def test_what_is_not_known_to_be_launches_alone_is_worked_out_anew(
    made: Callable[[Kernel], Operator], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = implemented(monkeypatch, made(kernel))
    for _ in range(2):
        x, y = torch.randn(4, 5), torch.randn(4, 5)
        assert torch.equal(run(x, y, 3.0), (x * 3.0 + y) * 2)
    assert kernel.direct == 0


def test_a_benchmark_s_own_parameters_are_asked_for_each_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = implemented(monkeypatch, toy(kernel))
    args = torch.ones(3), torch.ones(3), 1.0
    run(*args)
    monkeypatch.setitem(dispatch.override, "toy", {"warps": 4})
    run(*args)
    monkeypatch.delitem(dispatch.override, "toy")
    run(*args)
    assert (kernel.through_triton, kernel.direct) == (2, 1)


def test_heads_that_lie_last_in_memory() -> None:
    q = torch.zeros(2, 3, 5, 4, dtype=torch.float16)
    new = launch.empty((2, 3, 5, 4), q, heads_last=True)
    assert new.dtype == q.dtype
    assert new.transpose(1, 2).is_contiguous()
    assert new.shape == q.shape
