"""The search: from one configuration to a cheaper one, notch by notch, where a decibel lost buys the most.

Each setting is a ladder from faithful to cheap. Every next notch is measured on one picture; the one that saves the
most for each decibel is measured on all of them and taken if the mean stays above the floor. What the others save is
remembered and measured anew only when its turn comes (lazy greedy), so that a search is some thirty trials. Pure: what
measuring means is the caller's.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Config = dict[str, Any]
"""The content of a `chipmunk-config.yml`."""
Setting = Mapping[str, Any]
"""Dotted keys that belong together, with their values."""


def _ladder(*keys: str, values: tuple[Any, ...]) -> tuple[Setting, ...]:
    return tuple({key: value for key in keys} for value in values)


def _caching(threshold: float | None) -> Setting:
    if threshold is None:
        return {"step_caching.is_enabled": False}
    return {
        "step_caching.is_enabled": True,
        "step_caching.mode": "adaptive",
        "step_caching.threshold": threshold,
    }


LADDERS: dict[str, tuple[Setting, ...]] = {
    "step caching": tuple(map(_caching, (None, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3))),
    "neurons kept": _ladder("mlp.top_keys", values=(0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)),
    "keys kept": _ladder("attn.top_keys", values=(0.6, 0.45, 0.35, 0.25, 0.165, 0.12, 0.08, 0.05)),
    "counts kept": (
        {"mlp.counts_multiple_of": 256, "attn.counts_multiple_of": 112},
        {"mlp.counts_multiple_of": 64, "attn.counts_multiple_of": 16},
    ),
    "full step every": _ladder("mlp.full_step_every", "attn.full_step_every", values=(3, 5, 7, None, 10, 14, 20)),
    "neurons chosen every": _ladder("mlp.block_mask_cache", values=(1, 2, 4)),
    "keys chosen": _ladder("attn.recompute_mask", values=(True, False)),
    "random neurons": _ladder("mlp.random_keys", values=(0.1, 0.05, 0.0)),
    "random keys": _ladder("attn.random_keys", values=(0.03, 0.0)),
    "token order": _ladder("patchify.is_enabled", values=(True, False)),
}
"""By name, from faithful to cheap."""

NOTHING = 0.002
"""A notch that saves less of the dense cost than this is passed over."""
HOPELESS = 3.0
"""dB below the floor, on one picture, at which the others are not drawn."""


@dataclass(frozen=True)
class Trial:
    """One configuration, measured."""

    config: Config
    fidelity: float
    """Mean PSNR, dB."""
    cost: float
    """Of the dense model: seconds on a GPU, FLOPs on a CPU."""
    pictures: int


Measure = Callable[[Config, int], Trial]
"""Of a configuration, on so many of the tuning pictures."""
Watch = Callable[[str, Trial, Trial | None, int], None]
"""Told of every trial: what was tried, what came of it, the best so far, and how many may come still."""


def value_of(config: Config, key: str, defaults: Config) -> Any:
    """The value of a dotted key, or its default."""
    section, _, name = key.rpartition(".")
    inside = config.get(section) or {}
    return inside[name] if name in inside else defaults[section][name]


def changed(config: Config, setting: Setting) -> Config:
    """A copy of `config` with dotted keys set."""
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in setting.items():
        section, _, name = key.rpartition(".")
        inside = copy[section] = dict(copy.get(section) or {})
        inside[name] = value
    return copy


def notch_of(ladder: tuple[Setting, ...], config: Config, defaults: Config) -> int:
    """Where `config` stands on a ladder: the notch whose settings are its own, or else the nearest number."""
    for index, setting in enumerate(ladder):
        if all(value_of(config, key, defaults) == value for key, value in setting.items()):
            return index
    key = [*ladder[-1]][-1]
    here = _number(value_of(config, key, defaults))
    return min(
        (index for index, setting in enumerate(ladder) if key in setting),
        key=lambda index: abs(_number(ladder[index][key]) - here),
    )


def _number(value: Any) -> float:
    """A value as a place on its ladder: full steps that are ever further apart cost as much as every tenth of 50."""
    return 10.0 if value is None else float(value)


@dataclass
class Search:
    """The state of one search. `run` returns the best configuration found, or None if even the most faithful fails."""

    measure: Measure
    floor: float
    """dB"""
    pictures: int
    """Tuning pictures there are."""
    defaults: Config
    """Of every key."""
    watch: Watch = lambda what, trial, best, left: None
    trials: int = 60
    """At most so many."""
    trail: list[Trial] = field(default_factory=list)
    """Configurations that held the floor, each cheaper than the one before."""
    tried: list[tuple[str, Trial]] = field(default_factory=list)
    _cheaper: dict[str, Config] = field(default_factory=dict, init=False)
    """By ladder, the configuration that its entry in the queue stands for."""
    _one: dict[str, Trial] = field(default_factory=dict, init=False)
    """The same, as it was measured on one picture."""

    def run(self, start: Config) -> Trial | None:
        """Search from `start`."""
        here = self._try("start", start, self.pictures)
        here = self._repair(here) if here.fidelity < self.floor else here
        if here.fidelity < self.floor:
            return None
        self.trail.append(here)
        self._descend(here)
        return self.trail[-1]

    def _try(self, what: str, config: Config, pictures: int, left: int | None = None) -> Trial:
        trial = self.measure(config, pictures)
        self.tried.append((what, trial))
        best = self.trail[-1] if self.trail else None
        self.watch(what, trial, best, self.trials - len(self.tried) if left is None else left)
        return trial

    def _next(self, name: str, config: Config, direction: int) -> Config | None:
        ladder = LADDERS[name]
        notch = notch_of(ladder, config, self.defaults) + direction
        return changed(config, ladder[notch]) if 0 <= notch < len(ladder) else None

    def _repair(self, here: Trial) -> Trial:
        """From below the floor: the move that gains most for its cost, until the floor is reached."""
        while here.fidelity < self.floor and len(self.tried) < self.trials:
            base = self._try("the start, on one picture", here.config, 1) if self.pictures > 1 else here
            gains = [gain for name in LADDERS if (gain := self._gain(name, base)) is not None]
            if not gains:
                break
            # the best half at once: a start far below the floor is far from it on several ladders
            config = here.config
            for _, name, notch in sorted(gains, reverse=True)[: max(len(gains) // 2, 1)]:
                config = changed(config, LADDERS[name][notch])
            here = self._try("several, more", config, self.pictures)
        return here

    def _gain(self, name: str, base: Trial) -> tuple[float, str, int] | None:
        """The nearest notch towards faithful that gains: what it gains for its cost, the ladder and the notch.

        Notches that gain nothing are passed over: counts are rounded, and where a loop is short, full steps every so
        often can be fewer than those that are ever further apart.
        """
        for notch in reversed(range(notch_of(LADDERS[name], base.config, self.defaults))):
            if len(self.tried) >= self.trials:
                return None
            trial = self._try(f"{name}, more", changed(base.config, LADDERS[name][notch]), 1)
            gained = trial.fidelity - base.fidelity
            if gained > 0.05:
                return gained / max(trial.cost - base.cost, NOTHING), name, notch
        return None

    def _descend(self, here: Trial) -> None:
        base = here if self.pictures == 1 else self._try("the start, on one picture", here.config, 1)
        queue: list[tuple[float, int, str]] = []
        round_, fresh = 0, dict[str, int]()
        for name in LADDERS:
            self._price(name, base, queue, fresh, round_)
        while queue and len(self.tried) < self.trials:
            _, _, name = heapq.heappop(queue)
            if fresh[name] < round_:  # measured from another place: look again, it may no longer be the best
                self._price(name, base, queue, fresh, round_)
                continue
            config = self._cheaper[name]
            trial = self._try(f"{name}, all pictures", config, self.pictures) if self.pictures > 1 else self._one[name]
            last = self.trail[-1]
            free = trial.cost <= last.cost + NOTHING and trial.fidelity > last.fidelity
            if trial.fidelity < self.floor or (trial.cost >= last.cost and not free):
                continue  # this ladder ends here
            self.trail.append(trial)
            base = self._one[name]
            round_ += 1
            self._price(name, base, queue, fresh, round_)

    def _price(
        self, name: str, base: Trial, queue: list[tuple[float, int, str]], fresh: dict[str, int], round_: int
    ) -> None:
        """Measure the next notch of a ladder that saves anything, on one picture, and queue it by what a dB buys."""
        config: Config | None = base.config
        while config is not None and len(self.tried) < self.trials:
            config = self._next(name, config, 1)
            if config is None:
                return
            trial = self._try(name, config, 1, left=self.trials - len(self.tried))
            saved, lost = base.cost - trial.cost, base.fidelity - trial.fidelity
            if saved < NOTHING and lost >= 0:
                continue  # rounding: the same as before, or worse
            if trial.fidelity < self.floor - HOPELESS:
                return
            worth = saved / lost if lost > 1e-6 else float("inf") if saved > -NOTHING else 0.0
            if worth <= 0:
                return
            self._cheaper[name], self._one[name] = config, trial
            fresh[name] = round_
            heapq.heappush(queue, (-worth, len(self.tried), name))
            return


def confirmed(trail: list[Trial], confirm: Callable[[Config], Trial], floor: float) -> tuple[Trial, Trial] | None:
    """The cheapest configuration of the trail that holds the floor on pictures that it was not chosen by.

    Returns it as it was tuned and as it was confirmed; None where none holds.
    """
    for trial in reversed(trail):
        found = confirm(trial.config)
        if found.fidelity >= floor:
            return trial, found
    return None


def as_json(trial: Trial | None) -> dict[str, Any] | None:
    return None if trial is None else asdict(trial)
