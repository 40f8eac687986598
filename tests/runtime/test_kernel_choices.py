"""Which reductions are held in registers: rows of adjacent numbers that are short enough, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sympy
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.virtualized import V

from chipmunk.runtime.kernel_choices import _is_over_rows, rows_in_registers

ROW, COLUMN = sympy.symbols("d0 d1", integer=True)


def features(length: object, *reads: object, others: tuple[object, ...] = ()) -> SimpleNamespace:
    """What Inductor tells of a kernel with one reduction of `length` numbers, and `others` read beside it."""
    node, rest = (SimpleNamespace(read_writes=SimpleNamespace(reads=each)) for each in (reads, others))
    return SimpleNamespace(reduction_numel=length, reduction_nodes=lambda: [node], scheduler_nodes=lambda: (node, rest))


def read(index: sympy.Expr, length: int = 128) -> MemoryDep:
    return MemoryDep("x", index, (ROW, COLUMN), (sympy.Integer(64), sympy.Integer(length)))


@pytest.mark.parametrize(
    ("length", "index"),
    [(4097, 4097 * ROW + COLUMN), (128, ROW + 3072 * COLUMN), (sympy.Symbol("s0"), 128 * ROW + COLUMN)],
    ids=["too long", "across rows", "of unknown length"],
)
def test_left_to_the_compiler(length: object, index: sympy.Expr) -> None:
    assert not _is_over_rows(features(sympy.sympify(length), read(index)))


def test_a_read_of_unknown_places_is_left_to_the_compiler() -> None:
    assert not _is_over_rows(features(sympy.Integer(128), read(128 * ROW + COLUMN), StarDep("y")))


def test_a_norm_with_rope_is_left_to_the_compiler() -> None:
    """RoPE takes even and odd numbers apart: its loads in one program would compile for seconds, and be no faster."""
    row, every_other = read(128 * ROW + COLUMN), read(256 * ROW + 2 * COLUMN)
    assert not _is_over_rows(features(sympy.Integer(128), row, others=(every_other,)))
    assert _is_over_rows(features(sympy.Integer(128), row, others=(row, read(ROW + 0 * COLUMN), StarDep("y"))))


@pytest.mark.parametrize("length", [128, 3072, 4096])
def test_rows(length: int) -> None:
    assert _is_over_rows(features(sympy.Integer(length), read(3 * length * ROW + COLUMN, length)))


def test_only_while_it_is_entered() -> None:
    before = type(V.choices)
    with rows_in_registers():
        assert issubclass(type(V.choices), before)
        assert type(V.choices) is not before
    assert type(V.choices) is before
