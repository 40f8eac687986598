"""From step 5 on, two call slots have each other's caches."""

from typing import Any

from chipmunk.runtime import clock


def advance(self: clock.Generation, advance: Any = clock.Generation.advance) -> None:
    advance(self)
    if self.step == 5 and len(self.slots) == 2:
        (one, other) = self.slots
        self.slots[one], self.slots[other] = self.slots[other], self.slots[one]


clock.Generation.advance = advance  # type: ignore[method-assign]
