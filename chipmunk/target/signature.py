"""What a function or class asks for, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence


class CannotRun(Exception):
    """A target does not know how to build or call what it found; the message says what and why.

    known: names that the target would have known in place of the one that was given.
    """

    def __init__(self, message: str, known: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.known = tuple(known)


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a call has to give it."""
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def refuse_unknown(where: str, parameters: Mapping[str, inspect.Parameter], known: Iterable[str], target: str) -> None:
    """Raise CannotRun if one of the required `parameters` of `where` is not `known` to the target of that name."""
    known = set(known)
    for parameter in parameters.values():
        if is_required(parameter) and parameter.name not in known:
            raise CannotRun(f"{where}() needs '{parameter.name}', which target '{target}' does not know")
