"""The arithmetic of counts and the schedule of steps, by hand-worked examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk.config import Attention, Mlp
from chipmunk.runtime.clock import steps_at_most
from chipmunk.runtime.layer_state import AttentionRules, MlpRules
from chipmunk.runtime.schedule import attention_is_full, attention_step, mlp_is_full, mlp_step


@pytest.mark.parametrize(
    ("tokens", "top", "random", "multiple", "expected"),
    [
        (4352, 0.165, 0.0, 112, (672, 0)),  # 718.08 / 112 = 6.41
        (4352, 0.18, 0.0, 112, (784, 0)),  # 6.99
        (40, 0.25, 0.0, 4, (12, 0)),  # 2.5 tiles: half up
        (4352, 0.0, 0.0, 112, (112, 0)),  # one tile at least
        (60, 0.0, 0.0, 112, (60, 0)),  # fewer tokens than a tile
        (4352, 1.0, 0.5, 112, (4352, 0)),
        (4352, 0.999, 0.0, 112, (4352, 0)),  # 38.8 tiles are more than there are
        (100, 0.2, 0.1, 8, (24, 10)),  # 20 / 8 = 2.5
        (100, 0.95, 0.5, 8, (96, 4)),
    ],
)
def test_keys_kept(tokens: int, top: float, random: float, multiple: int, expected: tuple[int, int]) -> None:
    assert AttentionRules(192, top, random, multiple).kept(tokens) == expected


@pytest.mark.parametrize(
    ("neurons", "top", "random", "multiple", "expected"),
    [
        (12288, 0.3, 0.05, 256, (4352 - 614, 614)),  # 35.4 % in all
        (12288, 0.3, 0.0, 256, (3840, 0)),
        (64, 0.0, 0.0, 8, (1, 0)),  # never none
        (64, 0.0, 1.0, 8, (1, 63)),  # one at least for its score
        (60, 0.99, 0.0, 64, (60, 0)),
        (64, 1.0, 0.5, 8, (64, 0)),
    ],
)
def test_neurons_kept(neurons: int, top: float, random: float, multiple: int, expected: tuple[int, int]) -> None:
    assert MlpRules(128, 128, top, random, multiple).kept(neurons) == expected


fractions = st.floats(0, 1)


@given(st.integers(1, 5000), fractions, fractions, st.integers(1, 300))
def test_counts_are_possible(size: int, top: float, random: float, multiple: int) -> None:
    for rules in (AttentionRules(192, top, random, multiple), MlpRules(128, 128, top, random, multiple)):
        kept, lucky = rules.kept(size)
        assert kept >= 1
        assert lucky >= 0
        assert kept + lucky <= size


def attention_kinds(attn: Attention, calls: int) -> str:
    """d dense, S full and selecting, f full with the keys it has, s sparse."""
    kinds, has_selection = "", False
    for count in range(calls):
        kind, select = attention_step(attn, count, has_selection)
        has_selection |= select
        kinds += {"dense": "d", "sparse": "s", "full": "S" if select else "f"}[kind]
    return kinds


def test_attention_schedule() -> None:
    assert attention_kinds(Attention(), 23) == "dSsSsssSsssssssSsssssss"
    assert attention_kinds(Attention(full_step_every=10, recompute_mask=False), 23) == "dSssssssssfsssssssssfss"
    assert attention_kinds(Attention(full_step_every=None), 33) == "dSsSsssSsssssssSsssssssssssssssSs"
    assert attention_kinds(Attention(full_step_every=10), 23) == "dSssssssssSsssssssssSss"
    assert attention_kinds(Attention(full_step_every=4), 10) == "dSssSsssSs"
    assert attention_kinds(Attention(full_step_every=1), 4) == "dddd"
    assert attention_kinds(Attention(full_step_every=2), 7) == "ddSsSsS"
    assert attention_kinds(Attention(full_step_schedule=(0, 1, 10)), 12) == "dSssssssssSs"
    assert attention_kinds(Attention(full_step_schedule=(5, 6)), 9) == "SssssdSss"
    assert attention_kinds(Attention(full_step_schedule=(5, 6), recompute_mask=False), 9) == "Sssssdfss"
    assert attention_kinds(Attention(full_step_schedule=()), 4) == "Ssss"


def mlp_kinds(mlp: Mlp, calls: int) -> str:
    """f full, S sparse with a new selection, s sparse with the old one."""
    kinds, fresh = "", False
    for count in range(calls):
        kind, select = mlp_step(mlp, count, fresh)
        fresh = kind == "sparse" and (fresh or select)
        kinds += {"dense": "d", "full": "f", "sparse": "S" if select else "s"}[kind]
    return kinds


def test_mlp_schedule() -> None:
    assert mlp_kinds(Mlp(), 13) == "ffSfSSSfSSSSS"
    assert mlp_kinds(Mlp(block_mask_cache=2, full_step_every=10), 17) == "fSSSSSSSSSfSSsSsS"
    assert mlp_kinds(Mlp(block_mask_cache=5, full_step_every=7), 18) == "fSSSSSSfSSSsssfSss"
    assert mlp_kinds(Mlp(full_step_every=1), 3) == "ddd"
    assert mlp_kinds(Mlp(full_step_every=None), 17) == "ffSfSSSfSSSSSSSfS"
    assert mlp_kinds(Mlp(full_step_every=10), 13) == "fSSSSSSSSSfSS"


def test_ever_further_apart_is_about_as_many_full_steps_as_every_ten_of_fifty() -> None:
    for every in (None, 10):
        assert attention_kinds(Attention(full_step_every=every), 50).count("S") == 5
    assert mlp_kinds(Mlp(full_step_every=10), 50).count("f") == 5
    assert mlp_kinds(Mlp(full_step_every=None), 50).count("f") == 6


def test_by_default_attention_and_mlp_are_full_on_the_same_steps() -> None:
    """No step of one kind alone: it would be two graphs more to compile, for a single step of a picture."""
    for count in range(100):
        assert attention_is_full(Attention(), count) == mlp_is_full(Mlp(), count), count


def test_step_zero_is_always_full() -> None:
    assert attention_is_full(Attention(full_step_schedule=(7,)), 0)


class Tqdm:
    """Like tqdm over something without a length."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __len__(self) -> int:
        return len(self.iterable)


@pytest.mark.parametrize(
    ("iterable", "expected"),
    [
        ([1, 2, 3], 3),
        (range(4), 4),
        (zip([1, 2, 3], [4, 5], strict=False), 2),
        (zip([1, 2], [4, 5], strict=True), 2),
        (zip(range(5), Tqdm([0] * 4), strict=False), 4),
        (enumerate([1, 2, 3]), 3),
        (enumerate(zip([1, 2, 3], (4, 5), strict=False), 7), 2),
        (reversed([1, 2]), 2),
        (reversed(range(6)), 6),
        (iter((1, 2)), 2),
        (Tqdm([1, 2, 3]), 3),
        (Tqdm(x for x in "ab"), None),
        ((x for x in "ab"), None),
        (zip([1, 2, 3], (x for x in "ab"), strict=False), 3),  # at most as many as the one that can tell
        (map(str, [1]), None),
    ],
)
def test_number_of_steps(iterable: Any, expected: int | None) -> None:
    assert steps_at_most(iterable) == expected


def test_counting_takes_nothing() -> None:
    pairs = enumerate(zip([1, 2, 3], iter("abc"), strict=True))
    assert steps_at_most(pairs) == 3
    assert list(pairs) == [(0, (1, "a")), (1, (2, "b")), (2, (3, "c"))]
    started = zip([1, 2, 3], [4, 5, 6], strict=True)
    next(started)
    assert steps_at_most(started) == 2
