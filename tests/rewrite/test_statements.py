"""Statements as `ast` tells them are those of LibCST's tree, in the same order: one's index is the other's."""

from __future__ import annotations

import ast
import textwrap

import libcst as cst
import pytest

from chipmunk.rewrite.minimal import FILES
from chipmunk.rewrite.modules import Module
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.statements import Statements, bind, expression
from chipmunk.rewrite.syntax import last_name

ODD = textwrap.dedent(
    """
    import a.b, c as d
    from e import *
    from .f import (g, h as i)
    x: int = 1; y: str
    if x: y = 2; z = y
    elif (w := x):
        class Inside:
            hidden = 1
            def method(self): return hidden
    else:
        if y:
            z, (v, *u) = f(g(x), h(y)), (1, 2)
    def outer(self, /, a, *args, b=1, **kwargs) -> "x.Model":
        '''Doc.'''
        @wrap(a)(b)
        def inner(c=d(1)):
            return c
        for i, (j, k) in enumerate(a): self.j += j
        else:
            k = (yield i)
        while (n := next(a)): pass
        else: n = None
        try:
            import late.module as m
        except (A, B) as error:
            raise C from error
        except D: pass
        else: o = [p for p in q(a) if r(p)]
        finally: del a
        with s() as t, (u()): v = lambda: w(1)
        with (s() as t, u() as (x, y)):
            global z
        match a:
            case [1, b] if f(b): c = 1
            case {"x": d}: c = 2
            case _: return
        self.x[0], self.y.z = f'{g(a)} {a!r:>{h(b)}}', c if d(1) else e(2)
        x = y = z = g(*a, k=h(1), **b)
        assert a, f(a); return
        async def later():
            async for i in a: await i()
            async with b as c: return c
    """
)
TEXTS = {"odd": ODD, **FILES}


def name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_they_are_those_of_the_tree(text: str) -> None:
    module = Module(Source("file.py", text.encode()))
    for what in [module, *module.all_functions()]:
        told, tree = what.statements, what.scope
        assert [[branch for _, branch in s.chain] for s in told.steps] == [[b for _, b in s.chain] for s in tree.steps]
        assert {n: [(b.path, b.step.index, b.augmented) for b in found] for n, found in told.bindings.items()} == {
            n: [(b.path, b.step.index, b.augmented) for b in found] for n, found in tree.bindings.items()
        }
        of_tree = [(last_name(call.func), step.index) for call, step in tree.calls]
        assert sorted((name(call), step.index) for call, step in told.calls) == sorted(of_tree)
        for of_name, found in told.bindings.items():
            for binding, other in zip(found, tree.bindings[of_name], strict=True):
                reaching = [b.step.index for b in told.reaching(of_name, binding.step)]
                assert reaching == [b.step.index for b in tree.reaching(of_name, other.step)]


@pytest.mark.parametrize(
    "text",
    [
        "a", "a.b.c", "f(a, *b, c=d, **e)", "a.to(b)(c)", "(a, (b, c))", "[a, b]", "f((a), b=[c])", "f(a)(b).c",
    ],
)  # fmt: skip
def test_expressions_of_the_tree(text: str) -> None:
    assert ast.dump(expression(cst.parse_expression(text))) == ast.dump(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("text", ["1", "a + b", "a[b]", "(a, *b)", "lambda: a", "await a", "{a: b}", "-a", "'a'"])
def test_an_expression_that_is_no_model_is_a_constant(text: str) -> None:
    assert isinstance(expression(cst.parse_expression(text)), ast.Constant)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("1, 2", "a1 b2"),
        ("1, c=3", "a1 c3"),
        ("1, *rest, c=3", "a1 c3"),
        ("*rest, 1", ""),
        ("b=1, **more", "b1"),
        ("1, 2, 3, 4", "a1 b2"),
        ("other=1", ""),
    ],
)
def test_which_parameter_gets_which_argument(arguments: str, given: str) -> None:
    function = ast.parse("def f(self, a, /, b, *, c=0, **more): pass").body[0]
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(function, ast.FunctionDef)
    assert isinstance(call, ast.Call)
    found = bind(function, call, skip=1)
    assert " ".join(sorted(n + ast.unparse(v) for n, v in found.items())) == given


def test_statements_outside_functions_are_the_modules() -> None:
    found = Statements(ast.parse("def f():\n    a = 1\nclass C:\n    b = 1\nif x:\n    def g(): c = 1\n    d = 1\n"))
    assert list(found.bindings) == ["d"]
