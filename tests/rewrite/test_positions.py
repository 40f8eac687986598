"""Where nodes of an `ast` stand in the text: the same places as those of LibCST's tree."""

from __future__ import annotations

import ast

import pytest

from chipmunk.rewrite.modules import Module
from chipmunk.rewrite.source import Source


def head_of(text: str) -> str:
    """What is iterated by the only loop of the text."""
    source = Source("a.py", text.encode())
    loop = next(node for node in ast.walk(source.outline) if isinstance(node, ast.For))
    return source.code(loop.iter)


@pytest.mark.parametrize(
    ("iterated", "found"),
    [
        ("(a)", "(a)"),
        ("( (a) )", "( (a) )"),
        ("(a, b)", "(a, b)"),
        ("(a), b", "(a), b"),
        ("((a), b)", "((a), b)"),
        ("f(a)", "f(a)"),
        ("(\n        a\n    )", "(\n        a\n    )"),
        ("'é', (ü)", "'é', (ü)"),
        ("(  # see (\n        a\n    )", "a"),  # behind a comment none is looked for, so none of a comment is taken
    ],
)
def test_what_is_iterated_with_its_parentheses(iterated: str, found: str) -> None:
    assert head_of(f"def f():\n    x = 'é'; y = 1\n    for t in {iterated}:\n        pass\n") == found


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "text", ["print(g(x))", "y = (g(x))", "h((g(x)), 1)", "return (g(x))", "z = [(g(x))]", "é = g(x)"]
)
def test_calls_stand_where_the_tree_has_them(text: str, newline: str) -> None:
    source = Source("a.py", f"import m{newline}def f(x):{newline}    # é (g{newline}    {text}{newline}".encode())
    function = Module(source).functions["f"]
    told = [source.code(call) for call, _ in function.statements.calls]
    assert told == [source.code(call) for call, _ in function.scope.calls]
    assert any("g(x)" in code for code in told)
