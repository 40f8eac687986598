"""The search on made-up models whose best configuration is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk.config import Config
from chipmunk.tune.search import LADDERS, Search, Trial, changed, confirmed, notch_of, value_of

DEFAULTS = Config().model_dump(mode="json", by_alias=True)
LOSS = dict.fromkeys(LADDERS, 0.5) | {"token order": 3.0, "keys kept": 0.4}
SAVED = dict.fromkeys(LADDERS, 0.03) | {"step caching": 0.07, "token order": 0.0, "random keys": 0.0}


class Model:
    """A model whose notches lose decibels and save cost, each by itself; picture 0 is a little worse than the mean."""

    def __init__(self, loss: dict[str, float] = LOSS, saved: dict[str, float] = SAVED, top: float = 45.0) -> None:
        self.loss, self.saved, self.top = loss, saved, top
        self.measured: list[tuple[dict[str, Any], int]] = []

    def __call__(self, config: dict[str, Any], pictures: int) -> Trial:
        self.measured.append((config, pictures))
        notches = {name: notch_of(ladder, config, DEFAULTS) for name, ladder in LADDERS.items()}
        fidelity = self.top - sum(self.loss[name] * notch for name, notch in notches.items())
        cost = 1.0 - sum(self.saved[name] * notch for name, notch in notches.items())
        return Trial(config, fidelity - (0.3 if pictures == 1 else 0.0), cost, pictures)


def search(model: Model, floor: float, pictures: int = 3, trials: int = 80) -> Search:
    return Search(model, floor, pictures, DEFAULTS, trials=trials)


def test_the_result_holds_the_floor_and_is_cheaper_than_the_start() -> None:
    model = Model()
    found = search(model, 30.0)
    best = found.run({})
    assert best is not None
    assert best.fidelity >= 30
    assert best.cost < model({}, 3).cost - 0.2
    assert best.pictures == 3, "one picture decides nothing"


def test_what_a_decibel_buys_decides() -> None:
    """Step caching saves more than twice as much for each decibel: it goes to its end before the others begin."""
    found = search(Model(), 33.5)
    found.run({})
    caching = [notch_of(LADDERS["step caching"], trial.config, DEFAULTS) for trial in found.trail]
    assert caching[: len(LADDERS["step caching"])] == list(range(len(LADDERS["step caching"])))


def test_the_trail_gets_cheaper_and_never_falls_below_the_floor() -> None:
    found = search(Model(), 30.0)
    found.run({})
    costs = [trial.cost for trial in found.trail]
    assert all(after <= before + 0.002 for before, after in itertools.pairwise(costs))
    assert all(trial.fidelity >= 30 for trial in found.trail)


@pytest.mark.parametrize("trials", [10, 25])
def test_no_more_trials_than_allowed(trials: int) -> None:
    model = Model()
    search(model, 20.0, trials=trials).run({})
    assert len(model.measured) <= trials + 1


def test_a_start_below_the_floor_is_mended_first() -> None:
    cheap = {"mlp": {"top_keys": 0.1}, "attn": {"top_keys": 0.05}}
    model = Model(loss={**LOSS, "neurons kept": 2.0, "keys kept": 2.0}, top=50.0)
    assert model(cheap, 3).fidelity < 30
    best = search(model, 30.0, trials=200).run(cheap)
    assert best is not None
    assert best.fidelity >= 30


def test_no_configuration_holds_an_impossible_floor() -> None:
    found = search(Model(), 99.0)
    assert found.run({}) is None
    assert found.trail == []


def test_what_improves_for_nothing_is_taken() -> None:
    """Random neurons that only cost fidelity go, although not one operation is saved."""
    loss = dict.fromkeys(LADDERS, 100.0) | {"random neurons": -1.0}
    saved = dict.fromkeys(LADDERS, 0.0)
    start = {"step_caching": {"is_enabled": False}}
    model = Model(loss, saved, top=2000.0)
    best = search(model, 30.0).run(start)
    assert best is not None
    assert value_of(best.config, "mlp.random_keys", DEFAULTS) == 0.0


def test_notches_that_rounding_makes_equal_are_passed_over() -> None:
    class Rounded(Model):
        def __call__(self, config: dict[str, Any], pictures: int) -> Trial:
            kept = value_of(config, "mlp.top_keys", DEFAULTS)
            steps = 2 if kept > 0.3 else 1 if kept > 0.15 else 0
            return Trial(config, 30.0 + steps, 0.5 + 0.1 * steps, pictures)

    best = search(Rounded(), 29.0).run({})
    assert best is not None
    assert best.cost == pytest.approx(0.5)


def test_on_the_way_up_they_are_passed_over_too() -> None:
    """0.3, 0.4 and 0.5 keep the same neurons of a small model; and a rung may be worse than the one below it."""

    class Rounded(Model):
        def __call__(self, config: dict[str, Any], pictures: int) -> Trial:
            kept, every = (value_of(config, key, DEFAULTS) for key in ("mlp.top_keys", "mlp.full_step_every"))
            kept, often = (2.0 if kept > 0.5 else 0.0), {None: 0.0, 7: -1.0, 5: 1.5, 3: 3.0}.get(every, -2.0)
            return Trial(config, 27.0 + kept + often, 0.5 + 0.1 * kept + 0.05 * often, pictures)

    best = search(Rounded(), 30.0).run({})
    assert best is not None
    assert best.fidelity >= 30


@given(
    st.fixed_dictionaries({name: st.floats(0, 3) for name in LADDERS}),
    st.fixed_dictionaries({name: st.floats(-0.01, 0.05) for name in LADDERS}),
    st.floats(20, 44),
)
def test_whatever_the_model_the_result_holds_and_never_costs_more_than_the_start(
    loss: dict[str, float], saved: dict[str, float], floor: float
) -> None:
    model = Model(loss, saved)
    start = model({}, 3)
    best = search(model, floor).run({})
    if best is not None:
        assert best.fidelity >= floor
        assert start.fidelity < floor or best.cost <= start.cost + 0.002 * len(LADDERS)


def test_every_rung_is_a_configuration() -> None:
    for ladder in LADDERS.values():
        for setting in ladder:
            Config.model_validate(changed({}, setting))


def test_the_defaults_stand_on_every_ladder() -> None:
    for name, ladder in LADDERS.items():
        notch = notch_of(ladder, {}, DEFAULTS)
        assert all(value_of({}, key, DEFAULTS) == value for key, value in ladder[notch].items()), name


def test_changing_a_configuration_leaves_the_old_one_alone() -> None:
    old = {"mlp": {"bm": 64}}
    new = changed(old, {"mlp.top_keys": 0.5, "attn.top_keys": 0.1})
    assert old == {"mlp": {"bm": 64}}
    assert new == {"mlp": {"bm": 64, "top_keys": 0.5}, "attn": {"top_keys": 0.1}}


def test_confirmation_goes_back_along_the_trail() -> None:
    trail = [Trial({"n": n}, 31.0, 1 - n / 10, 2) for n in range(4)]
    fidelity = {0: 32.0, 1: 30.5, 2: 29.0, 3: 28.0}
    asked = []

    def confirm(config: dict[str, Any]) -> Trial:
        asked.append(config["n"])
        return Trial(config, fidelity[config["n"]], 0.5, 4)

    found = confirmed(trail, confirm, 30.0)
    assert found is not None
    assert found[0] is trail[1]
    assert asked == [3, 2, 1]
    assert confirmed(trail, lambda config: Trial(config, 0.0, 0.5, 4), 30.0) is None
