"""The oracle's schedules, counts and choices against numbers that were worked out from the rules by other means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chipmunk.config import Config
from chipmunk.verify.oracle import Oracle
from chipmunk.verify.oracle.attention import keys_kept
from chipmunk.verify.oracle.decisions import Decisions, hash_of
from chipmunk.verify.oracle.mlp import neurons_kept
from tests.verify.tiny_flux import FACTS, TinyFlux, config, grid_ids, inputs


def kinds(settings: Config, steps: int, part: str, known: int | None = None) -> str:
    """The kinds of the steps as a string: F full, s sparse, d dense."""
    torch.manual_seed(0)
    model, letters = TinyFlux(1, 1), []
    with torch.no_grad(), Oracle(model, FACTS, settings, known) as oracle:
        for step in range(steps):
            before = oracle.calls.copy()
            model(**inputs(3, 4), t=1 - step / steps)
            (kind,) = {kind for layer, p, kind in oracle.calls - before if p == part and layer == 1}
            letters.append({"full": "F", "sparse": "s", "dense": "d"}[kind])
    return "".join(letters)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"full_step_every": 4}, "FFssFsssFsss"),
        ({"full_step_every": 2}, "FFFsFsFsFsFs"),
        ({"full_step_every": None}, "FFsFsssFssss"),
        ({"full_step_every": 1}, "FFFFFFFFFFFF"),
        ({"full_step_schedule": [0, 1, 6]}, "FFssssFsssss"),
        ({"full_step_schedule": [3]}, "FssFssssssss"),
        ({"full_step_schedule": []}, "Fsssssssssss"),
        ({"first_n_dense_layers": 2}, "dddddddddddd"),
        ({"first_n_dense_layers": 1}, "FFssFsssFsss"),
        ({"counts_multiple_of": 16}, "dddddddddddd"),
        ({"top_keys": 1.0}, "FFssFsssFsss"),
        ({"mbm": 15}, "dddddddddddd"),
        ({"mbm": 14}, "FFssFsssFsss"),
    ],
)
def test_kinds_of_attention_steps(settings: dict[str, Any], expected: str) -> None:
    assert kinds(config(settings), 12, "attention") == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"full_step_every": 4}, "FsssFsssFsss"),
        ({"full_step_every": None}, "FFsFsssFssss"),
        ({"full_step_every": 1}, "FFFFFFFFFFFF"),
        ({"top_keys": 0.9}, "dddddddddddd"),
        ({"bm": 15, "mbm": 15}, "dddddddddddd"),
        ({"bm": 14, "mbm": 7}, "FsssFsssFsss"),
    ],
)
def test_kinds_of_mlp_steps(settings: dict[str, Any], expected: str) -> None:
    assert kinds(config(mlp=settings), 12, "mlp") == expected


def test_loops_known_to_be_short_stay_dense() -> None:
    settings = config(min_steps=8)
    assert kinds(settings, 5, "mlp", known=7) == "ddddd"
    assert kinds(settings, 5, "mlp", known=8) == "FsssF"
    assert kinds(settings, 5, "attention") == "FFssF"


@pytest.mark.parametrize(
    ("top", "random", "multiple", "tokens", "expected"),
    [
        (0.165, 0.0, 112, 4352, (672, 0)),
        (0.165, 0.0, 112, 100, (100, 0)),
        (0.001, 0.0, 112, 4352, (112, 0)),
        (0.5, 0.0, 2, 5, (2, 0)),
        (0.6, 0.0, 2, 5, (4, 0)),
        (0.5, 0.0, 1, 5, (3, 0)),
        (0.5, 0.1, 1, 5, (3, 1)),
        (0.9, 0.9, 1, 10, (9, 1)),
        (1.0, 0.1, 112, 100, (100, 0)),
    ],
)
def test_count_of_keys(top: float, random: float, multiple: int, tokens: int, expected: tuple[int, int]) -> None:
    settings = config({"top_keys": top, "random_keys": random, "counts_multiple_of": multiple})
    assert keys_kept(settings.attn, tokens) == expected


@pytest.mark.parametrize(
    ("top", "random", "multiple", "neurons", "expected"),
    [
        (0.3, 0.05, 256, 12288, (4352 - 614, 614)),
        (0.3, 0.0, 256, 12288, (3840, 0)),
        (0.0, 0.0, 256, 12288, (1, 0)),
        (0.0, 0.05, 256, 12288, (768 - 614, 614)),
        (0.0, 0.5, 1, 2, (1, 0)),
        (0.3, 0.05, 256, 100, (95, 5)),
        (1.0, 0.05, 256, 100, (100, 0)),
    ],
)
def test_count_of_neurons(top: float, random: float, multiple: int, neurons: int, expected: tuple[int, int]) -> None:
    settings = config(mlp={"top_keys": top, "random_keys": random, "counts_multiple_of": multiple})
    assert neurons_kept(settings.mlp, neurons) == expected


@given(*(st.integers(0, 2**20) for _ in range(4)))
def test_hash_in_wrapping_arithmetic(step: int, layer: int, group: int, index: int) -> None:
    """Against NumPy's unsigned 32-bit integers, which wrap by themselves."""

    def mix(h: np.ndarray) -> np.ndarray:
        h = h ^ (h >> np.uint32(16))
        h = h * np.uint32(0x7FEB352D)
        h = h ^ (h >> np.uint32(15))
        h = h * np.uint32(0x846CA68B)
        return h ^ (h >> np.uint32(16))

    h = mix(np.array([step], dtype=np.uint32))
    for number in (layer, group, index):
        h = mix(np.array([number], dtype=np.uint32) + np.uint32(0x9E3779B9) * h)
    assert hash_of(step, layer, group, index) == int(h[0])


def test_choice_best_first_ties_to_the_lower_index_then_random_ascending() -> None:
    decisions = Decisions(config(), steps=None)
    assert decisions.choose([1.0, 3.0, 3.0, 2.0, 3.0], 2, 0, 0, 0, 0) == [1, 2]
    rest = sorted([0, 3, 4], key=lambda index: hash_of(5, 6, 7, index))
    assert decisions.choose([1.0, 3.0, 3.0, 2.0, 3.0], 2, 2, 5, 6, 7) == sorted([1, 2, *rest[:2]])
    assert decisions.smallest_margin == 0


def test_how_close_a_choice_was_is_told_in_what_is_rounded() -> None:
    """Small differences of large means have the means' rounding."""
    of_scores, of_values = Decisions(config(), steps=None), Decisions(config(), steps=None)
    assert of_scores.choose([0.01, 0.02, 0.04], 1, 0, 0, 0, 0) == [2]
    assert of_scores.smallest_margin == pytest.approx(0.5)
    assert of_values.choose([0.01, 0.02, 0.04], 1, 0, 0, 0, 0, values=2.0) == [2]
    assert of_values.smallest_margin == pytest.approx(0.01)
    of_values.choose([1.0, 3.0], 1, 0, 0, 0, 0, values=2.0)
    assert of_values.smallest_margin == pytest.approx(0.01)


def test_mlp_by_hand() -> None:
    """One single block without attention to speak of: y = W2·relu-like(W1·x), three neurons, one kept, two groups."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(1, 3 + 3), nn.Linear(1 + 3, 1)
            self.linear1.weight.data = torch.tensor([0.0, 0, 0, 1, 2, 3])[:, None]
            self.linear1.bias.data = torch.tensor([0.0, 0, 0, 0, 0, -100])
            self.linear2.weight.data = torch.tensor([[7.0, 1, 10, 100]])
            self.linear2.bias.data = torch.tensor([0.5])

        def forward(self, x: Tensor) -> Tensor:
            mlp = self.linear1(x)[..., 3:]
            return self.linear2(torch.cat((x * 0, mlp.relu()), dim=-1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList([Block()])

        def forward(self, img: Tensor, img_ids: Tensor) -> Tensor:
            return self.single_blocks[0](img)

    mlp = {"top_keys": 0.01, "random_keys": 0.0, "counts_multiple_of": 1, "bm": 2, "mbm": 1, "full_step_every": 3}
    steps = [[1.0, 1, 5], [2.0, 0, 5], [2.0, 4, 40], [2.0, 4, 40]]
    with torch.no_grad(), Oracle(Model(), FACTS, config(mlp=mlp)) as oracle:
        outputs = [oracle.model(torch.tensor(x)[None, :, None], grid_ids(1, 3)).flatten().tolist() for x in steps]
    dense = [[21.5, 21.5, 105.5], [42.5, 0.5, 105.5], [42.5, 84.5, 2000 + 840.5], [42.5, 84.5, 2840.5]]
    assert outputs[0] == dense[0]
    # Step 1: in the first group neuron 2 has moved most (|3| + |3|) but is still at zero; nothing changes.
    assert outputs[1] == dense[0]
    # Step 2: neuron 2 was refreshed, so its score is |0| + |12| against |2| + |6| of neuron 1: again neuron 2.
    # The second group's neuron 2 has moved by 105 and is active now: 20 · 100.
    assert outputs[2] == [21.5, 21.5, 105.5 + 2000]
    assert outputs[3] == dense[3]
