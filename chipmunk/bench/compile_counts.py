"""What torch.compile did since the last time one asked."""

from __future__ import annotations

import re
from collections import Counter

from torch._dynamo import utils

_ENTRIES = 100_000
"""Of the compiler's own log, which by default forgets all but the last 64."""


class CompileCounts:
    """Counts of the compiler, from picture to picture.

    `graphs` compiled; `breaks`: places where a graph had to end early; `recompiles`: compilations of code that had been
    compiled before, for another kind of step or another size; `failures`: code given up on, which stays uncompiled.
    """

    def __init__(self) -> None:
        utils.set_compilation_metrics_limit(_ENTRIES)
        self._seen = self._totals()
        self._entries = len(utils.get_compilation_metrics())

    def since(self) -> dict[str, int]:
        """The counts since this was last called, or since the object was made."""
        totals, before = self._totals(), self._seen
        entries = utils.get_compilation_metrics()[self._entries :]
        self._seen, self._entries = totals, self._entries + len(entries)
        found = {name: totals[name] - before[name] for name in ("graphs", "breaks")}
        kinds: Counter[str] = Counter()
        for entry in entries:
            # "3/1" is the second compilation of the code with number 3
            again = re.match(r"\d+/(\d+)", str(entry.compile_id or ""))
            if entry.fail_type is not None:
                kinds["failures"] += 1
            elif again is not None and int(again[1]) > 0:
                kinds["recompiles"] += 1
        return {**found, "recompiles": kinds["recompiles"], "failures": kinds["failures"]}

    @staticmethod
    def _totals() -> Counter[str]:
        counters = utils.counters
        return Counter(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))
