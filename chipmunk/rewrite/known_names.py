"""Which files can see the names by which models are made or handed on, told by their text before they are parsed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

from chipmunk.rewrite.repository import Module, Repository

_FROM_HERE = re.compile(rb"from(?<!\wfrom)\s+\.+\s+import(?!\w)")


class KnownNames:
    """Names of model classes, and of functions that return a model, each with the modules that it is taken from."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.stems: dict[str, set[str]] = {}
        """Name → last parts of the names of its modules."""
        self._unseen: set[tuple[str, str, int]] = set()
        """Files that do not see a name from any of so many modules."""

    def learn(self, name: str, module: Module) -> bool:
        """Files that take `name` from `module` are worth reading. False if that was known."""
        path = PurePosixPath(module.path)
        stem = path.parent.name if path.stem == "__init__" else path.stem
        if stem in self.stems.setdefault(name, set()):
            return False
        self.stems[name].add(stem)
        return True

    def files(self, but: set[str]) -> Iterator[str]:
        """The paths, in order, of the files that can see a known name, without those in `but`."""
        paths = {path for name in self.stems for path in self._repository.files_with(name)}
        return (path for path in sorted(paths - but) if self._is_seen_by(path))

    def _is_seen_by(self, path: str) -> bool:
        """Whether a file has a name, not just in prose, and a module that gives it."""
        content = self._repository.files[path]
        for name, stems in self.stems.items():
            if name.encode() not in content or (path, name, len(stems)) in self._unseen:
                continue
            if _word(name, r"(?:[ \t]*[^\w \t]|\s+as\b|\Z)").search(content):
                if any(stem.encode() in content and _word(stem, r"(?!\w)").search(content) for stem in stems):
                    return True
                if _FROM_HERE.search(content):
                    return True
            self._unseen.add((path, name, len(stems)))
        return False


@cache
def _word(word: str, then: str) -> re.Pattern[bytes]:
    """A whole word, and what comes after it. That the pattern begins with plain text makes it fast."""
    text = re.escape(word)
    return re.compile(f"{text}(?<!\\w{text}){then}".encode())
