"""Operators held against the reference during a run, under Triton's interpreter; run by `test_operators.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chipmunk
from chipmunk.ops.sparse_mlp_out import triton as mlp_out
from chipmunk.verify.operators import Found, as_json, hold_against_reference
from tests.runtime import flux_model

OPERATORS = {
    "attention_with_column_sums",
    "column_sparse_attention",
    "reorder_tokens",
    "select_columns",
    "select_neurons",
    "sparse_mlp_in",
    "sparse_mlp_out",
}


def run(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Found]:
    model = flux_model.build(double=2, single=1).to(dtype)
    given = {
        name: x.to(dtype) if name in ("img", "txt") else x for name, x in flux_model.inputs(height=6, width=6).items()
    }
    chipmunk.enable(model, flux_model.small(min_steps=1, implementation="auto", compile=False, **changes))
    with torch.no_grad(), hold_against_reference() as found:
        flux_model.denoise(model, 3, **given)
    return found


def test_sound_operators_hold() -> None:
    found = run(torch.float16)
    assert set(found) == OPERATORS
    assert all(each.holds for each in found.values()), as_json(found)
    assert found["select_neurons"].error == 0


def test_an_operator_that_is_slightly_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mlp_out.sparse_mlp_out

    def wrong(delta: torch.Tensor, *args: Any) -> None:
        right(delta * 1.01, *args)

    monkeypatch.setattr(mlp_out, "sparse_mlp_out", wrong)
    found = run()
    assert [name for name, each in found.items() if not each.holds] == ["sparse_mlp_out"]
    assert found["sparse_mlp_out"].shapes


def test_numbers_that_are_none_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(delta: Any, weight: Any, indices: Any, out: torch.Tensor, group: int) -> None:
        out.fill_(torch.nan)

    monkeypatch.setattr(mlp_out, "sparse_mlp_out", wrong)
    assert run()["sparse_mlp_out"].error == float("inf")


def test_a_call_that_triton_does_not_take_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_out, "unsupported", lambda *args: "no reason")
    found = run()
    assert [name for name, each in found.items() if not each.holds] == ["sparse_mlp_out"]
    assert found["sparse_mlp_out"].passed_over == {"no reason": 4}
