"""What ran sparse, what stayed dense and why, and what the caches take."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chipmunk.runtime.clock import Generation
    from chipmunk.runtime.layer_state import LayerState


@dataclass(frozen=True)
class Calls:
    """Calls of one part of one layer from one slot."""

    sparse: int = 0
    full: int = 0
    """Dense by schedule: caches are made, or will be at the next step."""
    dense: dict[str, int] = field(default_factory=dict)
    """Dense for another reason, by reason."""

    @property
    def total(self) -> int:
        return self.sparse + self.full + sum(self.dense.values())


@dataclass(frozen=True)
class LayerStatistics:
    """One layer; keys are the names of the call slots, the untagged one is called `main`."""

    name: str
    """`double_blocks.3`, `single_blocks.0`"""
    attention: dict[str, Calls]
    mlp: dict[str, Calls]


@dataclass(frozen=True)
class Statistics:
    """Everything since Chipmunk was enabled on this model."""

    enabled: bool
    forward: str = ""
    """The model's forward, whose calls are counted: `Flux.forward`."""
    layers: tuple[LayerStatistics, ...] = ()
    """Double blocks, then single blocks."""
    model_calls: int = 0
    dense_model_calls: dict[str, int] = field(default_factory=dict)
    """Calls of the whole model that ran dense, by reason; they are not counted in `layers`."""
    token_order: dict[str, int] = field(default_factory=dict)
    """What was done with the order of the image tokens, by call slot of a generation."""
    restarts: dict[str, int] = field(default_factory=dict)
    """Call slots that had to start over, by reason."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Operator calls that ran in PyTorch although Triton could have been expected, by operator and reason."""
    skipped_steps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Steps of the last generation that had any of them, on which step caching ran no block, by call slot."""
    skipped_model_calls: int = 0
    """Calls of the whole model on which step caching ran no block, of all generations."""
    no_step_caching: str | None = None
    """Why no steps are skipped although the configuration asks for it."""
    cache_bytes: int = 0
    """Caches of all running generations, now."""
    peak_cache_bytes: int = 0
    """The most they took after any call."""

    def __str__(self) -> str:
        if not self.enabled:
            return "Chipmunk is off for this model."
        lines = [
            f"Chipmunk: {self.model_calls} model calls, {sum(self.dense_model_calls.values())} of them dense; "
            f"caches {_size(self.cache_bytes)} now, {_size(self.peak_cache_bytes)} at most."
        ]
        if not self.model_calls:
            lines.append(f"  no call came through {self.forward}: other methods that run the blocks are dense")
        for title, counts in (
            ("dense model calls", self.dense_model_calls),
            ("token order", self.token_order),
            ("started over", self.restarts),
            ("not in Triton", self.fallbacks),
        ):
            lines += [f"  {title}: {reason} ({count})" for reason, count in counts.items()]
        if self.no_step_caching is not None:
            lines.append(f"  no steps are skipped: {self.no_step_caching}")
        for slot, steps in self.skipped_steps.items():
            where = "" if slot == MAIN_SLOT else f" [{slot}]"
            lines.append(f"  skipped steps of the last image{where}: {' '.join(map(str, steps)) or 'none'}")
        for part in ("attention", "mlp"):
            for slot in dict.fromkeys(slot for layer in self.layers for slot in getattr(layer, part)):
                lines += self._layer_lines(part, slot)
        return "\n".join(_wrapped(line) for line in lines)

    def _layer_lines(self, part: str, slot: str) -> Iterator[str]:
        """One line for each run of layers, one after the other, that did the same."""

        def calls_of(layer: LayerStatistics) -> tuple[str, Calls | None]:
            by_slot: dict[str, Calls] = getattr(layer, part)
            return layer.name.rpartition(".")[0], by_slot.get(slot)

        for (_, calls), run in groupby(self.layers, calls_of):
            names = [layer.name for layer in run]
            if calls is not None:
                name = names[0] + (f" to {names[-1].rpartition('.')[2]}" if len(names) > 1 else "")
                where = f"{name} {part}" + ("" if slot == MAIN_SLOT else f" [{slot}]")
                dense = "".join(f", {count} dense ({reason})" for reason, count in calls.dense.items())
                yield f"  {where}: {calls.sparse} sparse, {calls.full} full{dense}"


def _wrapped(line: str) -> str:
    """The line in rows of at most 80 columns."""
    indent = "      " if line.startswith(" ") else "  "
    return fill(line, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


MAIN_SLOT = "main"


class Recorder:
    """Counts while the model runs; the session's lock is held."""

    def __init__(self) -> None:
        self.model_calls = 0
        self.dense_model_calls: Counter[str] = Counter()
        self.token_order: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.peak_cache_bytes = 0
        self.watch: Callable[[int, LayerState | None], object] | None = None
        """Told of every layer after a call, with its caches and what it did; None where a layer is always dense."""
        self.skipped_model_calls = 0
        self.no_step_caching: str | None = None
        self._generation: weakref.ref[object] | None = None
        self._skipped: dict[str, list[int]] = {}
        self._layers: dict[int, dict[str, dict[str, Counter[str]]]] = {}

    def count(self, layer: int, part: str, slot: str, what: str) -> None:
        """One call of a layer's `attention` or `mlp`: what is `sparse`, `full` or the reason for running dense."""
        parts = self._layers.setdefault(layer, {"attention": {}, "mlp": {}})
        parts[part].setdefault(slot, Counter())[what] += 1

    def step(self, generation: Generation, slot: str, skipped: bool) -> None:
        """One call of the model from a slot where steps may be skipped."""
        if self._generation is None or self._generation() is not generation:
            self._generation, self._skipped = weakref.ref(generation), {}
        steps = self._skipped.setdefault(slot, [])
        if skipped:
            self.skipped_model_calls += 1
            steps.append(generation.step)

    def report(self, forward: str, names: list[str], cache_bytes: int) -> Statistics:
        layers = []
        for index, name in enumerate(names):
            parts = self._layers.get(index, {"attention": {}, "mlp": {}})
            attention, mlp = ({slot: _calls(c) for slot, c in parts[part].items()} for part in ("attention", "mlp"))
            layers.append(LayerStatistics(name, attention, mlp))
        return Statistics(
            enabled=True,
            forward=forward,
            layers=tuple(layers),
            model_calls=self.model_calls,
            dense_model_calls=dict(self.dense_model_calls),
            token_order=dict(self.token_order),
            restarts=dict(self.restarts),
            fallbacks=dict(self.fallbacks),
            skipped_steps={slot: tuple(steps) for slot, steps in self._skipped.items()},
            skipped_model_calls=self.skipped_model_calls,
            no_step_caching=self.no_step_caching,
            cache_bytes=cache_bytes,
            peak_cache_bytes=self.peak_cache_bytes,
        )


def _calls(counter: Counter[str]) -> Calls:
    dense = {what: count for what, count in counter.items() if what not in ("sparse", "full")}
    return Calls(counter["sparse"], counter["full"], dense)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
