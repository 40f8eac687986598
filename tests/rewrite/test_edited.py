"""What the second planning pass reads: a tree of which only the touched statements are parsed anew."""

from __future__ import annotations

from collections import Counter

import libcst as cst
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository, source
from chipmunk.rewrite.minimal import FILES
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


@st.composite
def edited(draw: st.DrawFn) -> tuple[Source, set[Edit]]:
    text = draw(st.sampled_from(HEADS)) + "".join(draw(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=6)))
    if draw(st.booleans()):
        text = text.rstrip("\n")
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    file = Source("x.py", text.encode())
    spans = [file.span(node) for node in walk(file.module.body[draw(st.integers(0, len(file.module.body) - 1))])]
    edits: set[Edit] = set()
    for start, end in draw(st.lists(st.sampled_from(spans), max_size=3)):
        kind = draw(st.sampled_from(["before", "after", "replace", "line end"]))
        at = {"before": start, "after": end, "replace": start, "line end": file.line_at(end)[1]}[kind]
        stop = end if kind == "replace" else at
        if all(stop < e.start or e.end < at for e in edits):
            edits.add(Edit(at, stop, draw(st.sampled_from(ADDED)).replace("\n", file.newline)))
    return file, edits


@given(edited())
@settings(max_examples=300, deadline=None)
def test_the_tree_is_that_of_the_whole_file_parsed(case: tuple[Source, set[Edit]]) -> None:
    file, edits = case
    content = file.apply(edits)
    try:
        whole = Source("x.py", content)
    except SourceError:
        with pytest.raises(SourceError):
            file.edited(edits)
        return
    new = file.edited(edits)
    assert new.content == content
    assert [meaning(part) for part in new.module.body] == [meaning(part) for part in whole.module.body]
    assert new.module.code == whole.module.code


def meaning(node: cst.CSTNode) -> list[str]:
    """Kinds and words of everything below a statement, without its layout."""
    words = {cst.Name: "value", cst.Integer: "value", cst.SimpleString: "value"}
    return [f"{type(part).__name__} {getattr(part, words.get(type(part), ''), '')}" for part in walk(node)]


def test_no_file_is_parsed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing is most of the time of `chipmunk patch`."""
    parsed: Counter[bytes | str] = Counter()
    parse = source._parse

    def counted(content: bytes | str) -> cst.Module:
        parsed[content] += 1
        return parse(content)

    monkeypatch.setattr(source, "_parse", counted)
    files = {path: text.encode() for path, text in FILES.items()}
    plan = plan_repository(files, load())
    assert len(plan.changes) == 6
    whole = {content: times for content, times in parsed.items() if isinstance(content, bytes)}
    assert {change.before for change in plan.changes} <= whole.keys() <= set(files.values())
    assert set(whole.values()) == {1}
    # Of the changed files, the second pass parses the statements that were touched.
    again = sum(len(content) for content in parsed if isinstance(content, str))
    assert 0 < again < 0.9 * sum(len(change.after) for change in plan.changes)
