"""The table of the operators' times: its lines are found by name, by the processes that compile and by one another."""

from __future__ import annotations

import pytest

from chipmunk import ops
from chipmunk.bench.ops.cases import VARIANTS, cases


@pytest.mark.parametrize("variants", ["tuned", "all"])
def test_each_line_has_a_name_of_its_own_and_stands_below_what_it_is_compared_with(variants: str) -> None:
    above: set[str] = set()
    for case in cases(variants):
        assert case.name not in above
        assert not case.dense or case.dense in above
        above.add(case.name)


def test_every_design_that_was_tried_is_timed() -> None:
    timed = {(case.operator, tuple((case.parameters or {}).items())) for case in cases("all")}
    assert VARIANTS.keys() <= set(dir(ops))
    for operator, designs in VARIANTS.items():
        assert {(operator, tuple(design.items())) for design in designs} <= timed
