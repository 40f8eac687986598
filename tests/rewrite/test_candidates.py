"""The cheap tests of a text: saying no where a model is would lose it."""

from __future__ import annotations

import ast
import textwrap

import pytest

from chipmunk.rewrite.candidates import may_hold_model, may_run_blocks
from chipmunk.rewrite.minimal import FILES, MODEL
from chipmunk.rewrite.passes import may_join
from chipmunk.rewrite.statements import Statements

MANY = """\
def forward(self, img, txt):
    {first}
        {call}
    x = torch.cat((txt, img), 1)
    for block in self.single:
        x = block(x)
    return x
"""
FIRST = "for block in self.double:"
CALL = "img, txt = block(img, txt)"


def text(first: str = FIRST, call: str = CALL) -> bytes:
    return MANY.format(first=first, call=call).encode()


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        "(img, txt) = block(img=img, txt=txt)",
        "img,txt=block (img, txt)",
        "img, txt = block.run(img, txt)",
        "img, txt = checkpoint(block, img, txt)",
        "img, txt = outer(inner(block.run, img, txt))",
        "img, txt = lib.checkpoint(\n            block,\n            img,\n            txt,\n        )",
        "img, txt = run(img, txt, block=block, pe=pe)",
        "img, txt = run(image=img, text=txt, owner = block)",
        "img, txt = block(*streams)",
        "more, img, txt = block(img, txt)",
        "img, txt = block(img, block=block, txt=txt)",
    ],
)
def test_calls_of_a_block(call: str) -> None:
    assert may_run_blocks(text(call=call))


@pytest.mark.parametrize(
    "call",
    [
        "img = block(img)",
        "img, txt = other(img, txt)",
        "img, txt = other(img, txt, flag=a == block)",
        "if img, txt == block(img, txt): pass",
        "img, txt = myblock(img, txt)",
        "img, txt = run(img, txt, key=blocks)",
    ],
)
def test_calls_that_are_none(call: str) -> None:
    assert not may_run_blocks(text(call=call))


@pytest.mark.parametrize(
    "first",
    [
        "for i, block in enumerate(self.double):",
        "for block in tqdm(zip(self.double, x)):",
        "for (block) in(self . double):",
        "for block in \\\n            self.double:",
    ],
)
def test_loops_over_an_attribute(first: str) -> None:
    assert may_run_blocks(text(first).replace(b"\\\n", b"\n"))


@pytest.mark.parametrize(
    "first", ["for block in double:", "for block in self.single:", "for block within self.double:"]
)
def test_loops_that_are_none(first: str) -> None:
    assert not may_run_blocks(text(first))


def test_a_loop_at_the_very_beginning() -> None:
    assert may_run_blocks(b"in self.a\nfor block in self.b:\n    x, y = block(x, y)\n")


def test_a_file_with_a_model() -> None:
    assert [path for path, text in FILES.items() if may_hold_model(text.encode())] == ["flow/model.py"]
    assert not may_hold_model(MODEL.replace("cat(", "stack(").encode())


LOOPS = """\
def one(self):
    for block in self.double:
        img, txt = block(img, txt)
def other(self):
    x = torch.cat((txt, img), 1)
    for block in self.single:
        x = block(x)
"""


def test_loops_in_several_functions_are_no_model() -> None:
    assert may_run_blocks(LOOPS.encode())
    assert not may_hold_model(LOOPS.encode())
    assert not may_hold_model(("class A:\n" + textwrap.indent(LOOPS, "    ")).encode())
    assert not may_hold_model(LOOPS.replace("def other", "@wrap\ndef other").encode())


@pytest.mark.parametrize(
    "between",
    [
        "    def inner(x):",
        "    @wrap",
        "    class Inner:",
        "    text = '''\ndef other(self):\n'''",
        '    """Doc.\n\ndef other(self):\n    \'\'\'\n    """',
        "    # def other(self):",
        "    if x:\n        def inner(x):\n            return x",
    ],
)
def test_what_stands_between_the_loops_of_a_model(between: str) -> None:
    """An inner definition ends no function, nor does one that is written in a string."""
    text = LOOPS.replace("def other(self):", between)
    assert may_hold_model(text.encode())
    assert may_hold_model(text.replace("    ", "\t").encode())
    inside = f"if True:\n    class A(B):\n{textwrap.indent(text, ' ' * 8)}"
    assert may_hold_model(inside.encode())


JOINED = """\
def forward(self, img, txt):
    for block in self.double:
        {call}
    {between}
    for block in self.single:
        x = block(x)
    return x[:, txt.shape[1] :]
"""


def streams(call: str, between: str = "x = torch.cat((txt, img), 1)") -> Statements:
    function = ast.parse(JOINED.format(call=call, between=between)).body[0]
    assert isinstance(function, ast.FunctionDef)
    return Statements(function)


@pytest.mark.parametrize(
    ("call", "between"),
    [
        ("img, txt = block(img, txt)", "x = self.join(img, txt)"),
        ("img, txt = block(txt=txt, img=img)", "x = join()"),
        ("[img, txt] = run(block, img, txt)", "x = join()"),
        ("img, txt = block(*streams)", "x = torch.cat([txt, img], dim=1)"),
        ("a, img, txt = block(*streams)", "x = cat(tensors=(txt, img))"),
        ("(img, txt), more = block(x)\n        img, more = block(x)", "x = torch.concat((img, more), 1)"),
        ("img, txt = self.s.img, s.txt = block(**given)", "x = torch.concatenate((img, txt))"),
    ],
)
def test_streams_that_may_be_joined(call: str, between: str) -> None:
    assert may_join(streams(call, between))


@pytest.mark.parametrize(
    ("call", "between"),
    [
        ("img, kept = block(img)", "x = torch.cat((img, txt), 1)"),
        ("img = block(img, txt)", "x = torch.cat((txt, img), 1)"),
        ("img, txt = other, more", "x = torch.cat((txt, img), 1)"),
        ("img, txt = block(one, two)", "x = torch.stack((txt, img), 1)"),
        ("img, txt = block(one, two)", "x = torch.cat((txt, img, more), 1)"),
    ],
)
def test_streams_that_are_not_joined(call: str, between: str) -> None:
    assert not may_join(streams(call, between))


@pytest.mark.parametrize("path", FILES)
def test_a_model_joins_its_streams(path: str) -> None:
    functions = [node for node in ast.walk(ast.parse(FILES[path])) if isinstance(node, ast.FunctionDef)]
    assert any(may_join(Statements(function)) for function in functions) == (path == "flow/model.py")
