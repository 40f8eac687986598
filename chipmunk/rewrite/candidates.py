"""Which files and functions may hold a model, told by their text alone: the cheap test before they are parsed.

The answer may be yes too often, never no where `roles` would find a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from chipmunk.rewrite.passes import CONCATENATIONS

# Patterns that begin with plain text are found several times as fast as the same with a `\b` or a word before it.
_LOOP_OVER_ATTRIBUTE = re.compile(rb"in(?<!\win)\b[\s(]*(?:[\w.]+\([\s(]*)*(\w+)\s*\.\s*(\w+)")
# The second of two results, or of three; the empty group is where the value begins.
_SECOND_OF_TWO = re.compile(rb",\s*(\w+)(?=(?:\s*,\s*\w+)?[\s),]*=\s*())")
_DEFINITION = re.compile(rb"^([ \t]*)(?:async[ \t]+)?(def|class|@)", re.MULTILINE)
_CALL = 800  # bytes in which the streams are among a call's arguments
_CALLED = re.compile(rb"[\w.]+\(")
_OPENED = re.compile(rb"[\w.]*\(\s*")
_WORD_OF_CALL = re.compile(rb"(\w+)\s*[.(,]")
_GIVEN_BY_NAME = re.compile(rb"=(?<=[\w\s]=)\s*(\w+)\s*[,)]")
_LAST_WORD = re.compile(rb"(\w+)[\s)]*\Z")


def may_hold_model(content: bytes) -> bool:
    """Whether a file may hold a model."""
    if not any(name.encode() + b"(" in content for name in CONCATENATIONS) or not may_run_blocks(content):
        return False
    return any(may_run_blocks(function) for function in _functions(content))


def _functions(content: bytes) -> Iterator[bytes]:
    """The functions and methods of a file: from each `def` to the next definition that stands no deeper.

    Where such a line may be part of a string, which would end a function too early, the whole file stands for all.
    """
    found = [(line.start(), line[1], line[2]) for line in _DEFINITION.finditer(content)]
    if any(b"\t" in indentation for _, indentation, _ in found):
        yield content
        return
    start: int | None = None
    depth = 0
    for at, indentation, kind in [*found, (len(content), b"", b"")]:
        if start is not None and len(indentation) > depth:
            continue
        if start is not None:
            text = content[start:at]
            yield content if (text.count(b'"""') + text.count(b"'''")) % 2 else text
        start, depth = (at if kind == b"def" else None), len(indentation)


def may_run_blocks(content: bytes) -> bool:
    """Whether a file or function has loops over two attributes, one of whose elements turns two streams into two."""
    loops = list(_LOOP_OVER_ATTRIBUTE.finditer(content))
    lists = Counter(receiver for receiver, _ in {loop.groups() for loop in loops})
    loops = [loop for loop in loops if lists[loop.group(1)] > 1]
    targets = [_LAST_WORD.search(content[max(loop.start() - 100, 0) : loop.start()]) for loop in loops]
    elements = {target.group(1) for target in targets if target is not None}
    if not elements:
        return False
    for second in _SECOND_OF_TWO.finditer(content, min(loop.start() for loop in loops)):
        for start in _arguments(content, second.start(2), elements):
            first = _LAST_WORD.search(content[max(second.start() - 100, 0) : second.start()])
            if first is not None and _takes(content[start : start + _CALL], first.group(1), second.group(1)):
                return True
    return False


def _arguments(content: bytes, at: int, elements: set[bytes]) -> Iterator[int]:
    """Where the arguments start if an element is called at `at`, or handed to what is called there."""
    start: int | None = at
    while start is not None:  # element(…), run(element, …), outer(run(element.method, …))
        word = _WORD_OF_CALL.match(content, start)
        if word is not None and word.group(1) in elements:
            yield word.end()
        opened = _OPENED.match(content, start)
        start = opened.end() if opened is not None else None
    called = _CALLED.match(content, at)
    if called is not None:  # run(…, block=element, …)
        given = _GIVEN_BY_NAME.finditer(content, called.end(), called.end() + _CALL)
        if any(value.group(1) in elements for value in given):
            yield called.end()


def _takes(arguments: bytes, *streams: bytes) -> bool:
    """Whether a call's arguments name all streams, or may hold them."""
    named = all(re.search(rb"\b" + stream + rb"\b", arguments) for stream in streams)
    return named or arguments.lstrip().startswith(b"*")


__all__ = ["may_hold_model", "may_run_blocks"]
