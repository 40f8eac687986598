"""What `ast` alone tells of a function: whether a model may be in it. Saying no where one is would lose a patch."""

from __future__ import annotations

import ast

import pytest

from chipmunk.rewrite.outlines import Outline


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
    return Outline.of(body)


@pytest.mark.parametrize(
    "text",
    [
        "return Model()",
        "return x",
        "a = x\nrun(a)",
        "run(key=a.to(1))\na = b\nb = Model()",  # in whatever order, as in a loop
        "a, (b, *c) = Model(), 1\nrun(c)",
        "if (a := Model()):\n    run(a)",
        "with Model() as a:\n    return a, 1",
        "self.model = x.to('cuda')",
        "self.model: Any = x",
        "def g():\n    return x\nreturn 1",
        "self.held.model = 1\nreturn [1, (2, x)]",
    ],
)
def test_a_model_that_leaves_the_function(text: str) -> None:
    assert outline(text).lets_out(source, ["x"])


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
    assert not outline(text).lets_out(source, ["x"])


@pytest.mark.parametrize("text", ["x(1)", "x.forward(1)", "slot(x, 'a')(1)", "a = Model()", "a = x\na.to(1)(2)"])
def test_a_model_that_is_made_or_called(text: str) -> None:
    assert outline(text).holds(source, ["x"])


@pytest.mark.parametrize("text", ["run(x)", "return x", "a = x", "x.save(1)", "y.forward(x)"])
def test_a_model_that_is_only_handed_on(text: str) -> None:
    assert not outline(text).holds(source, ["x"])


def test_annotations_are_names_without_their_modules() -> None:
    found = outline("self.a: list[lib.Model] = []")
    assert {"Flux", "Result", "Model"} <= found.annotations
    assert found.annotated == {"y"}


def test_a_module_says_nothing_of_its_functions() -> None:
    text = "def f():\n    return Model()\nclass A:\n    a = Model()\n"
    assert not Outline.of_module(ast.parse(text).body).lets_out(source, [])
    assert Outline.of_module(ast.parse(text + "try:\n    a = Model()\nexcept E: pass").body).lets_out(source, [])
