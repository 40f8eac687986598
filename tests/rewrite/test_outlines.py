"""What `ast` alone tells of a function: whether a model may be in it. Saying no where one is would lose a patch."""

from __future__ import annotations

import ast
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk.rewrite.outlines import Outline
from chipmunk.rewrite.repository import External, Function, Module, Repository
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.statements import Statements
from chipmunk.rewrite.syntax import last_name


def source(node: ast.expr) -> list[ast.expr] | bool:
    """`Model(…)` is a model, `x.to(…)` is what x is, and a tuple has what is in it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "Model"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        return [node.func.value]
    return node.elts if isinstance(node, (ast.Tuple, ast.List)) else False


def outline(text: str) -> Outline:
    body = ast.parse("def f(self, x, y: 'models.Flux' = None) -> Result:\n    " + text.replace("\n", "\n    ")).body[0]
    assert isinstance(body, ast.FunctionDef)
    return Outline(Statements(body), body)


def lets_out(found: Outline, *given: str) -> bool:
    return found.lets_out(source, found.warm(source, given))


@pytest.mark.parametrize(
    "text",
    [
        "return Model()",
        "return x",
        "a = x\nrun(a)",
        "run(key=a.to(1))\na = b\nb = Model()",  # in whatever order, as in a loop
        "a, (b, *c) = x.to(1)\nrun(c)",
        "if (a := Model()):\n    run(a)",
        "with Model() as a:\n    return a, 1",
        "self.model = x.to('cuda')",
        "self.model: Any = x",
        "def g():\n    return x\nreturn 1",
        "self.held.model = 1\nreturn [1, (2, x)]",
    ],
)
def test_a_model_that_leaves_the_function(text: str) -> None:
    assert lets_out(outline(text), "x")


@pytest.mark.parametrize(
    "text",
    [
        "return Other()",
        "a = Model()\nreturn {'a': a}",
        "a = Model()",
        "other.model = Model()",
        "run(**x)",
        "return x.shape",
        "return y",
        "run(y, x.device)",
    ],
)
def test_a_model_that_goes_nowhere(text: str) -> None:
    assert not lets_out(outline(text), "x")


def test_annotations_are_names_without_their_modules() -> None:
    found = outline("self.a: list[lib.Model] = []")
    assert {"Flux", "Result", "Model"} <= found.annotations
    assert found.may_be_object("y")
    assert not found.may_be_object("x")


def test_a_module_says_nothing_of_its_functions() -> None:
    text = "def f():\n    return Model()\nclass A:\n    a = Model()\n"
    assert not lets_out(Outline(Statements(ast.parse(text)), None))
    text += "try:\n    a = Model()\nexcept E: pass"
    assert lets_out(Outline(Statements(ast.parse(text)), None))


FORMS = [
    "a = 1",
    "a, (b, *c) = x",
    "self.a = b.c = x",
    "(a).b = x",
    "a: int = 1",
    "self.a: int = 1",
    "a += f(x)",
    "self.a.append(x)",
    "import a.b, c as d",
    "from e import f as g, h",
    "from .i import *",
    "if (j := f(x)) and k.g(y): z = 1\nelse:\n    w = h(x)(y)",
    "for l, m in zip(x, y):\n    n = f(l)\nelse:\n    o = 1",
    "while f(x):\n    p = 1",
    "with open(x) as q, f(y) as (r, s): t = 1",
    "try:\n    u = f(x)\nexcept E as e:\n    v = 1\nfinally:\n    w = 1",
    "def inner(x, y=f(1)):\n    a1 = g(x)\n    return a1",
    "class C:\n    b1 = f(x)",
    "match x:\n    case [c1, *d1]:\n        e1 = f(c1)",
    "return [f(x) for f1 in g(x) if (g1 := f1)]",
    "async def later():\n    async with f(x) as h1:\n        async for i1 in g(x): await h(i1)",
    "l1 = lambda m1: f(m1)",
    "x[a.b] = f(x); n1 = 2",
    "@wrap(x)\ndef o1(): pass",
]


@given(st.lists(st.sampled_from(FORMS), min_size=1, max_size=5))
@settings(deadline=None)
def test_names_are_those_of_the_tree_at_least(forms: list[str]) -> None:
    """What is not bound or called by this, is not looked for in the tree."""
    body = "\n".join(forms)
    method = "    def f(self, x, /, y=1, *rest, z: int, **more):\n" + textwrap.indent(body, " " * 8)
    for text in (f"class A:\n{method}\n", "\n".join(form for form in forms if "return" not in form) or "pass"):
        module = Module(Source("a.py", text.encode()))
        places = [module, *module.all_functions()]
        for place in places:
            assert {last_name(call.func) for call, _ in place.scope.calls} - {""} == place.statements.called
            steps = [[branch for _, branch in step.chain] for step in place.scope.steps]
            assert [[branch for _, branch in step.chain] for step in place.statements.steps] == steps
            for name, found in place.scope.bindings.items():
                told = module.bindings(name) if place is module and "." not in name else place.statements.bindings[name]
                assert [(b.path, b.step.index) for b in told] == [(b.path, b.step.index) for b in found]
            if isinstance(place, Function):
                assert place.parameters == place.scope.parameters
                assert place.owner is None or place.parameters == ["self", "x", "y", "z"]


def test_a_name_that_is_bound_nowhere_needs_no_tree() -> None:
    text = (
        "from lib import g\ndef f(x):\n    return g(x)\ndef h(g):\n    return g(1)\ndef k():\n    g = f\n    return g\n"
    )
    repository = Repository({"a.py": text.encode()})
    module = repository.module("a.py")
    assert module is not None
    f, h, k = module.all_functions()
    assert repository.resolve("g", f) == External("lib.g")
    assert repository.resolve("g", h) is None
    assert "node" not in vars(f)
    assert "node" not in vars(h)
    assert repository.resolve("g", k) is f
