"""Where each node of a LibCST tree stands in the text.

What LibCST's `ByteSpanPositionProvider` finds out, in a quarter of the time: that one measures every token when it is
printed, and visits the whole tree once more to hand positions out.
"""

from __future__ import annotations

from itertools import accumulate
from types import TracebackType

import libcst as cst
from libcst._nodes.internal import CodegenState


class Printed:
    """A module printed again from its tree, and the span of each node in that text, in bytes of UTF-8."""

    def __init__(self, module: cst.Module) -> None:
        state = _State(module)
        module._codegen(state)
        self.text = "".join(state.tokens)
        lengths = map(len, state.tokens if self.text.isascii() else (token.encode("utf-8") for token in state.tokens))
        self._offsets = [*accumulate(lengths, initial=0)]
        self._found = state.found

    def __contains__(self, node: cst.CSTNode) -> bool:
        return id(node) in self._found

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where the node starts and ends, as LibCST sees it: an argument's comma is counted in, parentheses are not.

        Raises KeyError for a node of another tree.
        """
        start, end, _ = self._found[id(node)]
        last = len(self._offsets) - 1  # the token of the last newline is taken back in a file that has none
        return self._offsets[min(start, last)], self._offsets[min(end, last)]


class _State(CodegenState):
    """Remembers for each node (`id`) between which tokens it was printed."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__(default_indent=module.default_indent, default_newline=module.default_newline)
        self.found: dict[int, tuple[int, int, cst.CSTNode]] = {}
        """The node too: as long as it lives, no other one has its `id`."""
        self._starts: list[int] = []

    def before_codegen(self, node: cst.CSTNode) -> None:
        self._starts.append(len(self.tokens))

    def after_codegen(self, node: cst.CSTNode) -> None:
        start = self._starts.pop()
        self.found.setdefault(id(node), (start, len(self.tokens), node))

    def record_syntactic_position(  # type: ignore[override]  # not a generator: ten thousands of these are made
        self, node: cst.CSTNode, *, start_node: cst.CSTNode | None = None, end_node: cst.CSTNode | None = None
    ) -> _Recording:
        return _Recording(self, node, start_node, end_node)


class _Recording:
    """While this is entered, a node is printed without the white space around it."""

    __slots__ = ("_end_node", "_node", "_start", "_start_node", "_state")

    def __init__(
        self, state: _State, node: cst.CSTNode, start_node: cst.CSTNode | None, end_node: cst.CSTNode | None
    ) -> None:
        self._state, self._node, self._start_node, self._end_node = state, node, start_node, end_node

    def __enter__(self) -> None:
        self._start = len(self._state.tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self._state.found
        start = self._start if self._start_node is None else found[id(self._start_node)][0]
        end = len(self._state.tokens) if self._end_node is None else found[id(self._end_node)][1]
        found[id(self._node)] = (start, end, self._node)
