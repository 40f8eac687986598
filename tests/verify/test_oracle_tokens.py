"""In which order the oracle gives the model its image tokens, and when it leaves them as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk.verify.oracle import Oracle
from tests.verify.tiny_flux import FACTS, Identity, config, grid_ids


def test_tokens_are_ordered_by_patches_of_patches_and_restored() -> None:
    model, ids = Identity(), grid_ids(3, 5)
    settings = config(patchify={"is_enabled": True, "chunk_size_1": 4, "chunk_size_2": 2})
    with torch.no_grad(), Oracle(model, FACTS, settings):
        output, more = model(torch.zeros(1, 15, 3), ids)
    assert torch.equal(output, ids)
    assert more == "more"
    assert model.seen == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
        *([2, 0], [2, 1]),
        *([2, 2], [2, 3]),
        *([0, 4], [1, 4]),
        [2, 4],
    ]


@pytest.mark.parametrize("reference", [grid_ids(3, 5), grid_ids(2, 2) + torch.tensor([1.0, 0, 0])])
def test_reference_images_keep_their_place(reference: Tensor) -> None:
    model, ids = Identity(), torch.cat((grid_ids(3, 5), reference), dim=1)
    with torch.no_grad(), Oracle(model, FACTS, config()):
        output, _ = model(torch.zeros_like(ids), ids)
    assert torch.equal(output, ids)
    assert model.seen[:3] == [[0, 0], [0, 1], [1, 0]]
    assert model.seen[15:] == reference[0, :, 1:].int().tolist()


@pytest.mark.parametrize(
    "ids",
    [grid_ids(3, 5).flip(1), grid_ids(3, 5)[:, :-1], grid_ids(3, 5).roll(5, dims=1), torch.zeros(1, 15, 3)],
    ids=["backwards", "last token missing", "last row first", "all the same"],
)
def test_ids_that_are_no_grid_are_left_in_order(ids: Tensor) -> None:
    model = Identity()
    with torch.no_grad(), Oracle(model, FACTS, config()):
        model(torch.zeros_like(ids), ids)
    assert model.seen == ids[0, :, 1:].int().tolist()


def test_ids_that_differ_between_batch_elements_are_left_in_order() -> None:
    model, ids = Identity(), torch.cat((grid_ids(3, 5), grid_ids(5, 3)))
    with torch.no_grad(), Oracle(model, FACTS, config()):
        output, _ = model(torch.zeros_like(ids), ids)
    assert torch.equal(output, ids)
    assert model.seen == ids[0, :, 1:].int().tolist()


@pytest.mark.parametrize(
    ("other", "in_order"),
    [
        ({"residual": torch.zeros(1, 15, 9)}, True),
        ({"residuals": [torch.zeros(1, 2), torch.zeros(1, 4, 15, 9)]}, True),
        ({"residuals": {"first": torch.zeros(1, 15, 9)}}, True),
        ({"mask": torch.zeros(1, 15)}, True),
        ({"mask": torch.zeros(1, 1, 1, 18, dtype=torch.bool)}, True),
        ({"mask": torch.zeros(1, 1, 18, 18)}, True),
        ({"txt": torch.zeros(1, 18, 15)}, False),
        ({"txt": torch.zeros(1, 14, 99), "y": torch.zeros(1, 20), "time": torch.zeros(15), "flag": None}, False),
    ],
)
def test_other_inputs_by_token_leave_all_in_order(other: dict[str, Any], in_order: bool) -> None:
    class WithOthers(Identity):
        def forward(self, img: Tensor, img_ids: Tensor, **others: Any) -> tuple[Tensor, str]:
            return super().forward(img, img_ids)

    model, ids = WithOthers(), grid_ids(3, 5)
    with torch.no_grad(), Oracle(model, FACTS, config()):
        model(torch.zeros_like(ids), ids, **other)
    assert (model.seen == ids[0, :, 1:].int().tolist()) == in_order


def test_a_model_without_ids_is_not_reordered() -> None:
    model, ids = Identity(), grid_ids(3, 5)
    with torch.no_grad(), Oracle(model, replace(FACTS, ids=None), config()):
        output, _ = model(torch.zeros_like(ids), ids)
    assert torch.equal(output, ids)
    assert model.seen == ids[0, :, 1:].int().tolist()
