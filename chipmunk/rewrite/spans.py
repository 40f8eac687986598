"""Where each node of a LibCST tree stands in the text.

What LibCST's `ByteSpanPositionProvider` finds out, in a quarter of the time: that one measures every token when it is
printed, and visits the whole tree once more to hand positions out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import TracebackType

import libcst as cst
from libcst._nodes.internal import CodegenState

_STATEMENTS = {
    cst.SimpleStatementLine, cst.If, cst.For, cst.While, cst.With, cst.Try, cst.TryStar, cst.Match, cst.FunctionDef,
    cst.ClassDef,
}  # fmt: skip


class Printed:
    """A module printed again from its tree, and the span of each node in that text, in bytes of UTF-8."""

    def __init__(self, module: cst.Module) -> None:
        state = _State(module)
        module._codegen(state)
        self.text = "".join(state.tokens)
        lengths = map(len, state.tokens if self.text.isascii() else (token.encode("utf-8") for token in state.tokens))
        self._offsets = [*accumulate(lengths, initial=0)]
        self._found = state.found
        self._whole = state.whole

    def __contains__(self, node: cst.CSTNode) -> bool:
        return id(node) in self._found

    def span(self, node: cst.CSTNode) -> tuple[int, int]:
        """Where the node starts and ends, as LibCST sees it: an argument's comma is counted in, parentheses are not.

        Raises KeyError for a node of another tree.
        """
        start, end, _ = self._found[id(node)]
        last = len(self._offsets) - 1  # the token of the last newline is taken back in a file that has none
        return self._offsets[min(start, last)], self._offsets[min(end, last)]

    def whole(self, statement: cst.BaseStatement) -> tuple[str, str]:
        """A statement's lines with the comments above and inside it, and the white space before it."""
        start, end, margin = self._whole[id(statement)]
        last = len(self._offsets) - 1
        start, end = self._offsets[min(start, last)], self._offsets[min(end, last)]
        return self._content[start:end].decode("utf-8"), margin

    @cached_property
    def _content(self) -> bytes:
        return self.text.encode("utf-8")


@dataclass(frozen=True)
class Kept(cst.BaseStatement):
    """A statement of which only the text is known, and the white space before it where that was printed."""

    text: str
    margin: str

    def _visit_and_replace_children(self, visitor: cst.CSTVisitorT) -> Kept:
        return self

    def _codegen_impl(self, state: CodegenState) -> None:
        if "".join(state.indent_tokens) == self.margin:
            state.add_token(self.text)


class _State(CodegenState):
    """Remembers for each node (`id`) between which tokens it was printed."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__(default_indent=module.default_indent, default_newline=module.default_newline)
        self.found: dict[int, tuple[int, int, cst.CSTNode]] = {}
        """The node too: as long as it lives, no other one has its `id`."""
        self.whole: dict[int, tuple[int, int, str]] = {}
        """Of statements, with what LibCST does not count to them, and what they are indented by."""
        self._starts: list[int] = []

    def before_codegen(self, node: cst.CSTNode) -> None:
        self._starts.append(len(self.tokens))

    def after_codegen(self, node: cst.CSTNode) -> None:
        start = self._starts.pop()
        self.found.setdefault(id(node), (start, len(self.tokens), node))
        if type(node) in _STATEMENTS:
            self.whole[id(node)] = start, len(self.tokens), "".join(self.indent_tokens)

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
