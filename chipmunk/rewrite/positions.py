"""Where the nodes of an `ast` stand in a file's text: what edits of expressions and statements need no LibCST for."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from keyword import iskeyword

_BLANK = b" \t\r\n\f\\"
_LAST_WORD = re.compile(rb"[\w\x80-\xff]+\Z")


def span(node: ast.expr | ast.stmt, text: bytes, line_start: Callable[[int], int]) -> tuple[int, int]:
    """Where a node starts and ends, in bytes; an expression with the parentheses around it, as far as none of them
    stands behind a comment. line_start: where a line, counted from 1, starts.
    """
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start, end = line_start(node.lineno) + node.col_offset, line_start(node.end_lineno) + node.end_col_offset
    while isinstance(node, ast.expr):
        before, after = _before(text, start), _after(text, end)
        if text[before : before + 1] != b"(" or text[after : after + 1] != b")" or _is_called(text, before):
            break
        start, end = before, after + 1
    return start, end


def _before(text: bytes, at: int) -> int:
    """Where the last byte before `at` is that is not blank; -1 if that may be in a comment."""
    last = len(text[:at].rstrip(_BLANK)) - 1
    line = text.rfind(b"\n", 0, last + 1) + 1
    return -1 if b"\n" in text[last + 1 : at] and b"#" in text[line : last + 1] else last


def _after(text: bytes, at: int) -> int:
    """Where the first byte after `at` is that is not blank."""
    while text[at : at + 1] and text[at : at + 1] in _BLANK:
        at += 1
    return at


def _is_called(text: bytes, parenthesis: int) -> bool:
    """Whether an opening parenthesis is that of a call."""
    line = text[text.rfind(b"\n", 0, parenthesis) + 1 : parenthesis].rstrip()
    word = _LAST_WORD.search(line)
    return not iskeyword(word[0].decode()) if word is not None else line.endswith((b")", b"]", b"}", b'"', b"'"))


__all__ = ["span"]
