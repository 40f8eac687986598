"""Building a model by its constructor: what is asked for, and constants written into it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from chipmunk.target import SHRINK, CannotRun, construct, parameter_names
from chipmunk.target.construct import record_fields


class Wide(nn.Module):
    """Takes its sizes, with defaults."""

    def __init__(
        self,
        num_heads: int = 24,
        head_dim: int = 128,
        num_layers: int = 19,
        text_dim: int = 4096,
        dtype: torch.dtype | None = None,
        flavour: str = "oak",
    ) -> None:
        super().__init__()
        self.given = num_heads, head_dim, num_layers, text_dim, dtype, flavour


class Written(nn.Module):
    """Its sizes are written into its constructor."""

    depth_of_class = 19

    def __init__(self, mode: str = "torch") -> None:
        super().__init__()
        self.mode = mode
        self.hidden_size = 3072
        self.heads_num: int = 24
        double_depth = 19
        text_dim, other = 4096, 7
        self.blocks = nn.ModuleList([nn.Linear(self.hidden_size, 8) for _ in range(double_depth)])
        self.rest = text_dim, other, Written.depth_of_class


class Inheriting(Written):
    def __init__(self) -> None:
        super().__init__("flash")
        self.single_depth = 38


@dataclass
class Params:
    hidden_size: int
    num_heads: int = 24


class Recorded(nn.Module):
    def __init__(self, params: Params, scale: float = 1.0) -> None:
        super().__init__()
        self.params = params


def test_without_shrink_the_defaults_stay() -> None:
    assert construct(Wide, {}, "test").given == (24, 128, 19, 4096, None, "oak")
    assert construct(Written, {}, "test").hidden_size == 3072


def test_defaults_shrink_and_what_is_named_stays_as_named() -> None:
    assert construct(Wide, {SHRINK: True}, "test").given == (2, 64, 5, 168, None, "oak")
    assert construct(Wide, {SHRINK: True, "text_dim": 32, "num_layers": 4}, "test").given == (2, 64, 4, 32, None, "oak")


def test_constants_in_the_constructor_shrink_and_the_class_stays_as_it_is() -> None:
    model = construct(Written, {SHRINK: True, "mode": "sage"}, "test")
    assert type(model) is Written
    assert (model.mode, model.hidden_size, model.heads_num, len(model.blocks)) == ("sage", 128, 2, 5)
    assert model.blocks[0].in_features == 128
    assert model.rest == (4096, 7, 19)  # two at once, and another class's: not what a name is given alone
    assert Written().hidden_size == 3072


def test_a_constructor_that_calls_its_base_shrinks_its_own_constants_alone() -> None:
    model = construct(Inheriting, {SHRINK: True}, "test")
    assert (model.mode, model.single_depth, model.hidden_size) == ("flash", 3, 3072)


def test_a_record_with_a_field_that_is_not_known_is_refused() -> None:
    with pytest.raises(CannotRun, match="Params has a field 'hidden_size' that target 'test' does not know"):
        construct(Recorded, {SHRINK: True}, "test")
    assert construct(Recorded, {"hidden_size": 8}, "test").params == Params(8, 24)


def test_names_and_fields() -> None:
    assert parameter_names(Recorded) == {"params", "scale", "hidden_size", "num_heads"}
    assert record_fields(Params) == ["hidden_size", "num_heads"]
    assert record_fields(int) is None
