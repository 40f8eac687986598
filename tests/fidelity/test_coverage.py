"""The share of attention mass and of MLP change that is kept, against sums by hand."""

from __future__ import annotations

import pytest
import torch

from chipmunk.fidelity.coverage import kept_change, kept_mass


def test_all_keys_hold_all_the_mass() -> None:
    q, k = torch.randn(2, 1, 2, 7, 4)
    keys = torch.arange(7, dtype=torch.int32).expand(1, 2, 3, 7)
    assert kept_mass(q, k, keys, 3) == pytest.approx(1, abs=1e-6)


def test_equal_scores_give_the_share_of_keys() -> None:
    q, k = torch.zeros(2, 1, 1, 8, 4)
    keys = torch.tensor([[[[0, 3], [1, 2]]]], dtype=torch.int32)
    assert kept_mass(q, k, keys, 4) == pytest.approx(0.25)


def test_each_group_of_rows_has_keys_of_its_own_and_the_last_may_be_partial() -> None:
    # row i attends to key i alone
    q = k = 50 * torch.eye(5)[None, None]
    own = torch.tensor([[[[0, 1], [2, 3], [0, 4]]]], dtype=torch.int32)
    others = torch.tensor([[[[2, 3], [0, 1], [0, 1]]]], dtype=torch.int32)
    assert kept_mass(q, k, own, 2) == pytest.approx(1)
    assert kept_mass(q, k, others, 2) == pytest.approx(0, abs=1e-6)


def test_change_at_the_kept_neurons() -> None:
    change = torch.tensor([[[1.0, -3.0], [2.0, 2.0], [0.0, 8.0]]])
    neurons = torch.tensor([[[1], [0]]], dtype=torch.int32)  # rows 0 and 1 keep neuron 1, row 2 keeps neuron 0
    assert kept_change(change, neurons, 2) == pytest.approx(5 / 16)


def test_no_change_is_all_covered() -> None:
    assert kept_change(torch.zeros(1, 4, 4), torch.zeros(1, 2, 1, dtype=torch.int32), 2) == 1.0
