"""Trees of single functions and statements: that they are those of the whole file, and that no more are built."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

import libcst as cst
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

from chipmunk.registry import load
from chipmunk.rewrite import parts as parts_of_files
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.minimal import FILES
from chipmunk.rewrite.modules import Module
from chipmunk.rewrite.source import Edit, Source, SourceError
from chipmunk.rewrite.spans import Printed
from chipmunk.rewrite.syntax import walk

HEADS = ["", "#!/usr/bin/env python\n# Licence.\n\n", '"""Doc."""\n', "\n\n# -*- coding: utf-8 -*-\n"]
STATEMENTS = [
    "x = 1\n",
    "# about a\na = [  # here\n    1,\n]  # there\n",
    "\n\n# about f\n\n@wrap\n# between\n@wrap(2)\ndef f(x, y=(1, 2)):\n    '''Doc.'''\n    return x\n    # after\n",
    "class A(B):\n    # first\n    n = 0\n\n    def g(self):\n        if self.n:\n            pass\n        # in\n\n\n",
    "if a: b = 1; c = 2;\nelse:\n    b = '''two\nlines'''\n",
    "try:\n  import é\nexcept ImportError: pass\n  # odd\n",
    "\tx\n".lstrip() + "\f\n",
    "for i in range(3):\n\tprint(i)\n# at the end\n",
    "async def h(): await x\n",
    "class L:\n"
    "    def long(self, x, y=None):\n"
    "        # before\n"
    "        'Doc.'\n"
    "        a = x; b = y\n"
    "\n"
    "        # about c\n"
    "        c = [\n            a,\n        ]\n"
    "        for i in c:\n"
    "            if i:\n"
    "                a = i\n"
    "            # in the loop\n"
    "        # after the loop\n"
    "        a = x; b = y\n"
    "        with a as d:\n"
    "                d()\n"
    "   # odd\n"
    "        return a\n\n",
    "@wrap\ndef long(x):\n\ta = x\n\tif a:\n\t\tx()\n\tb = a\n\twhile b:\n\t\tb()\n\treturn b\n",
    "def long(x): a = x; b = a; return b\n",
]
ADDED = ["pass", "x", "\nimport chipmunk", "import chipmunk\n", "@wrap\n", ", z=None", "\n    y = 1", "# note\n", ""]


TEXTS = ["".join(STATEMENTS), HEADS[1] + "".join(STATEMENTS).rstrip("\n"), "", *FILES.values()]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_those_of_libcst(text: str, newline: str) -> None:
    wrapper = MetadataWrapper(cst.parse_module(text.replace("\n", newline)), unsafe_skip_copy=True)
    printed = Printed(wrapper.module)
    assert printed.text == wrapper.module.code
    end = len(printed.text.encode())  # LibCST counts a last newline that is not there
    for node, span in wrapper.resolve(ByteSpanPositionProvider).items():
        assert printed.span(node) == (span.start, min(span.start + span.length, end))


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@st.composite
def texts(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(HEADS)) + "".join(draw(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=6)))
    if draw(st.booleans()):
        text = text.rstrip("\n")
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"])))


def parts(file: Source) -> Iterator[cst.CSTNode]:
    """Every tree that can be asked for: statements, functions, methods, and classes as a whole."""
    yield from file.statements
    for node in ast.walk(file.outline):
        if isinstance(node, DEFINITIONS):
            yield file.definition(node)


def meaning(node: cst.CSTNode) -> list[str]:
    """Kinds and words of everything below a node, without its layout."""
    words = {cst.Name: "value", cst.Integer: "value", cst.SimpleString: "value"}
    return [f"{type(part).__name__} {getattr(part, words.get(type(part), ''), '')}" for part in walk(node)]


@given(texts(), st.sampled_from(["utf-8", "utf-8-sig", "latin-1"]))
@settings(max_examples=200, deadline=None)
def test_parts_stand_where_they_stand_in_the_whole_file(text: str, encoding: str) -> None:
    if encoding == "latin-1":
        text = "# coding: latin-1\n" + text
    file = Source("x.py", text.encode(encoding))
    wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    positions = wrapper.resolve(ByteSpanPositionProvider)
    whole: dict[tuple[int, str], cst.CSTNode] = {}
    for node, position in positions.items():
        whole.setdefault((position.start, type(node).__name__), node)
    for part in parts(file):
        start, end = file.span(part)
        same = whole[start, type(part).__name__]
        assert meaning(part) == meaning(same)
        assert end == min(start + positions[same].length, len(file.text))
        for node, other in zip(walk(part), walk(same), strict=True):
            at = positions[other]
            if not getattr(node, "lpar", ()) and not isinstance(node, (cst.Arg, cst.Param)):
                assert file.span(node) == (at.start, min(at.start + at.length, len(file.text)))
    assert file.survives() or "\r" in text.replace("\r\n", "")  # LibCST loses a last lone carriage return


def test_the_same_function_twice_has_two_places() -> None:
    method = "    def f(self):\n        return 1\n"
    file = Source("x.py", f"class A:\n{method}class B:\n{method}".encode())
    functions = [node for node in ast.walk(file.outline) if isinstance(node, ast.FunctionDef)]
    assert [file.line(file.definition(function)) for function in functions] == [2, 5]
    edited = file.edited({Edit(0, 0, "x = 1\n")})
    functions = [node for node in ast.walk(edited.outline) if isinstance(node, ast.FunctionDef)]
    assert [edited.line(edited.definition(function)) for function in functions] == [3, 6]


@st.composite
def edits(draw: st.DrawFn) -> tuple[Source, set[Edit]]:
    file = Source("x.py", draw(texts()).encode())
    spans = [file.span(node) for node in walk(draw(st.sampled_from([*parts(file)])))]
    found: set[Edit] = set()
    for start, end in draw(st.lists(st.sampled_from(spans), max_size=3)):
        kind = draw(st.sampled_from(["before", "after", "replace", "line end"]))
        at = {"before": start, "after": end, "replace": start, "line end": file.line_at(end)[1]}[kind]
        stop = end if kind == "replace" else at
        if all(stop < e.start or e.end < at for e in found):
            found.add(Edit(at, stop, draw(st.sampled_from(ADDED)).replace("\n", file.newline)))
    return file, found


@given(edits())
@settings(max_examples=200, deadline=None)
def test_an_edited_file_is_that_file_read_anew(case: tuple[Source, set[Edit]]) -> None:
    file, changes = case
    content = file.apply(changes)
    try:
        whole = Source("x.py", content)
    except SourceError:
        with pytest.raises(SourceError):
            file.edited(changes)
        return
    new = file.edited(changes)
    assert new.content == content
    for part, anew in zip(parts(new), parts(whole), strict=True):
        assert new.span(part) == whole.span(anew)
        assert meaning(part) == meaning(anew)


LONG = """\
class A:
    def f(self, x):
        a = x
        a = g(a)
        for i in a:
            i()
        a = g(a)
        b = a
        return b

    def f2(self):
        return 1
"""


def test_of_an_edited_function_only_edited_statements_are_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Source("x.py", LONG.encode())
    methods = [node for node in ast.walk(file.outline) if isinstance(node, ast.FunctionDef)]
    before = file.definition(methods[0])
    parsed = counted(monkeypatch)
    at = LONG.index("i()")
    new = file.edited({Edit(at, at, "chipmunk.")})
    methods = [node for node in ast.walk(new.outline) if isinstance(node, ast.FunctionDef)]
    after = new.definition(methods[0])
    assert [*parsed] == ["if 1:\n    if 1:\n        if 1:\n            chipmunk.i()\n"]
    assert new.code(after) == LONG[LONG.index("def f(") : LONG.index("\n\n")].replace("i()", "chipmunk.i()")
    olds, news = before.body.body, after.body.body
    assert [old is one for old, one in zip(olds, news, strict=True)] == [True, True, False, True, True, True]
    assert len({*map(id, news)}) == len(news)


def test_a_comment_behind_an_edited_block_is_not_lost() -> None:
    text = LONG.replace("            i()\n", "            i()\n            # in the loop\n")
    file = Source("x.py", text.encode())
    file.definition(next(node for node in ast.walk(file.outline) if isinstance(node, ast.FunctionDef)))
    at = text.index("i()")
    new = file.edited({Edit(at, at, "chipmunk.")})
    method = new.definition(next(node for node in ast.walk(new.outline) if isinstance(node, ast.FunctionDef)))
    assert new.code(method).endswith("        return b")
    assert "# in the loop" in new.code(method)


def test_two_functions_of_one_name_do_not_share_statements() -> None:
    body = "".join(f"        a{n} = x\n" for n in range(5))
    text = f"class A:\n    def f(self, x):\n{body}class B:\n    def f(self, x):\n{body}"
    file = Source("x.py", text.encode())
    for node in ast.walk(file.outline):
        if isinstance(node, ast.FunctionDef):
            file.definition(node)
    places = [match.start() for match in re.finditer("a2", text)]
    new = file.edited({Edit(at, at, "b") for at in places})
    functions = [new.definition(node) for node in ast.walk(new.outline) if isinstance(node, ast.FunctionDef)]
    assert {*map(id, walk(functions[0]))}.isdisjoint(map(id, walk(functions[1])))
    assert [new.line(function.body.body[0]) for function in functions] == [3, 10]


def test_parts_that_are_left_alone_are_not_parsed_again() -> None:
    file = Source("x.py", b"def f():\n    return 1\n\ndef g():\n    return 2\n")
    before = [*parts(file)]
    new = file.edited({Edit(len(b"def f():\n    "), len(b"def f():\n    return 1"), "pass")})
    after = [*parts(new)]
    assert [new.code(part) for part in after] == ["def f():\n    pass", "def g():\n    return 2"]
    assert after[0] is not before[0]
    assert after[1] is before[1]


def test_words_of_functions_that_are_left_alone_serve_again() -> None:
    same = "    def g(self):\n        return 2\n"
    file = Module(Source("x.py", f"def f():\n    return 1\n\nclass A:\n{same}\nclass B:\n{same}".encode()))
    for function in file.all_functions():
        assert function.words == {"def", "return", function.outline.name} | ({"self"} if function.owner else set())
    at = len("def f():\n    ")
    end = file.source.text.index(b"class B") + len("class B")
    new = Module(file.source.edited({Edit(at, at, "x = 1; "), Edit(end - 1, end, "C")}), file)
    kept = {function.name: "words" in vars(function) for function in new.all_functions()}
    assert kept == {"f": False, "A.g": True, "C.g": False}
    assert new.functions["f"].words == {"def", "f", "x", "return"}
    assert new.classes["C"].methods["g"].words == file.classes["B"].methods["g"].words


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often LibCST is given which text."""
    parsed: Counter[str] = Counter()
    parse = parts_of_files.parse

    def count(text: str) -> cst.Module:
        parsed[text] += 1
        return parse(text)

    monkeypatch.setattr(parts_of_files, "parse", count)
    return parsed


def test_nothing_is_parsed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing is most of the time of `chipmunk patch`."""
    parsed = counted(monkeypatch)
    plan = plan_repository({path: text.encode() for path, text in FILES.items()}, load())
    assert len(plan.changes) == 6
    texts = [*FILES.values(), *(change.after.decode() for change in plan.changes)]
    for part, times in parsed.items():
        part = re.sub(r"\A(?: *if 1:\n)+", "", part)
        part = re.sub(r" *pass\n\Z", "", part)  # the head of an edited loop, say
        assert part not in texts
        same = [sum(text.count(part) for text in found) for found in (texts[: len(FILES)], texts[len(FILES) :])]
        assert times <= (same[0] or same[1])


UNRELATED = """\
import torch
from flow.model import Painter

class Trainer{n}:
    def __init__(self, width):
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range({n})])

    def forward(self, image, text):
        for layer in self.layers:
            image, text = layer(image, text)
        return torch.cat((image, text), 1)


def sample(image, steps):
    \"\"\"Draws as a `Painter(…)` does.\"\"\"
    for step in range(steps):
        image = Trainer{n}(step)(image, image)
    return image
"""


def test_a_large_repository_costs_what_its_model_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files that have nothing to do with the model, LibCST is given nothing, whatever they look like."""
    parsed = counted(monkeypatch)
    files = {path: text.encode() for path, text in FILES.items()}
    alone = plan_repository(files, load())
    small = sum(len(text) * times for text, times in parsed.items())
    parsed.clear()
    plain = UNRELATED.replace("from flow.model import Painter\n", "").replace("`Painter(…)`", "painter")
    others = {f"other/file_{n}.py": plain.replace("{n}", str(n)).encode() for n in range(300)}
    plan = plan_repository({**files, **others}, load())
    assert plan == alone
    assert sum(len(text) * times for text, times in parsed.items()) == small
    # Files that name the model are read, but only for the functions that do.
    parsed.clear()
    near = {f"near/file_{n}.py": UNRELATED.replace("{n}", str(n)).encode() for n in range(30)}
    assert plan_repository({**files, **near}, load()).changes == alone.changes
    assert not any(
        "class Trainer" in text or "def forward(self, image, text):\n        for layer" in text for text in parsed
    )


def test_of_an_edited_loop_only_its_head_is_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    text = LONG.replace("        for i in a:\n", "        with a:\n          for i in a:  # each\n            # once\n")
    file = Source("x.py", text.encode())
    methods = [node for node in ast.walk(file.outline) if isinstance(node, ast.FunctionDef)]
    before = file.definition(methods[0])
    assert file.survives()  # as it must before it is edited
    parsed = counted(monkeypatch)
    at = text.index("a:  #")
    new = file.edited({Edit(at, at + 1, "steps(a)")})
    methods = [node for node in ast.walk(new.outline) if isinstance(node, ast.FunctionDef)]
    after = new.definition(methods[0])
    assert [*parsed] == ["if 1:\n    if 1:\n        if 1:\n          for i in steps(a):  # each\n            pass\n"]
    assert new.code(after) in new.text.decode()
    assert new.survives()
    kept = {id(node) for node in walk(before)} & {id(node) for node in walk(after)}
    calls = [node for node in walk(after) if isinstance(node, cst.Call)]
    assert [id(call) in kept for call in calls] == [True, False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        "def f(a):\n    for i in a:\n        i()\n        # in the loop\n    # after it\n    b = a\n    return b\n",
        "def f(a):\n    if a:\n        b = 1\n        # in the block\n    b = a\n    return b\n",
        "def f(a):\n    b = 1; c = 2\n    for i in a:\n        b = i; c = i\n    return b\n",
        "def f(a):\n    for i in a: i()\n    b = a\n    return b\n",
        "def f(a):\n    for i in (\n        a\n        # of them\n    ):\n        # first\n\n        i()\n",
        "def f(a):\n    if a:\n            b = a\n            c = b\n    for i in a:\n      b = i\n      c = b\n",
        "def f(a):\n    b = a\n    '''\n    text\n'''; c = a\n    return b\n",
        "@wrap\n# why\ndef f(a):\n\n    # first\n    b = a\n    with a as c, b:\n        b = c\n    return b",
    ],
)
def test_a_mended_function_is_what_parsing_it_gives(text: str) -> None:
    """Whatever names are edited: comments stay where they were, and every node where it stands."""
    lines = text.splitlines(keepends=True)
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and node.id in "abc"]
    for name in names:
        at = len("".join(lines[: name.lineno - 1])) + name.col_offset
        file = Source("x.py", text.encode())
        function = file.outline.body[0]
        assert isinstance(function, ast.FunctionDef)
        file.definition(function)
        assert file.survives()
        new = file.edited({Edit(at, at + 1, "other")})
        whole = Source("x.py", new.content)
        after, anew = new.outline.body[0], whole.outline.body[0]
        assert isinstance(after, ast.FunctionDef)
        assert isinstance(anew, ast.FunctionDef)
        tree = new.definition(after)
        assert new.survives()
        assert tree.deep_equals(whole.definition(anew))
        assert [new.span(node) for node in walk(tree)] == [whole.span(node) for node in walk(whole.definition(anew))]
