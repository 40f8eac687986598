"""At step 5 the last two layers take each other's cached attention difference."""

from typing import Any

from chipmunk.runtime import clock


def advance(self: clock.Generation, advance: Any = clock.Generation.advance) -> None:
    advance(self)
    if self.step == 5:
        for slot in self.slots.values():
            one, other = slot.layers[-2:]
            assert one is not None
            assert other is not None
            one.difference, other.difference = other.difference, one.difference


clock.Generation.advance = advance  # type: ignore[method-assign]
