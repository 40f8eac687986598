"""Edited statements are laid out as a formatter would: it has nothing to change in them, if it had nothing before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chipmunk.registry import load
from chipmunk.rewrite import plan_repository
from chipmunk.rewrite.layout import bounds_of, laid_out, limit_of
from chipmunk.rewrite.minimal import FILES
from chipmunk.rewrite.source import Edit, Source

LIMITS = (88, 100, 110, 120)
LONG = "a_name_that_makes_this_statement_longer"


def formatted(text: str, limit: int) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--no-cache", "--line-length", str(limit), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def broken(limit: int) -> str:
    """A statement that a formatter with this limit has broken: on one line it is up to three characters longer."""
    inside = ", ".join(["1"] * ((limit - len(LONG) - 6) // 3 + 1))
    return f"{LONG} = run(\n    {inside}\n)\n"


def evidence(limit: int) -> str:
    """What tells of this limit: a line as long, and a statement that was broken."""
    return formatted(f"x = {'a' * (limit - 4)}\n{broken(limit)}", limit)


def edited(before: str, old: str, new: str, limit: int) -> str:
    """The text with `old` replaced by `new` in one edit, laid out."""
    source = Source("code.py", before.encode())
    at = before.index(old)
    edits = {Edit(at, at + len(old), new)}
    return source.apply(laid_out(source, edits, limit)).decode()


STATEMENTS = {
    "a call": (
        "def f(self, image):\n    image = self.mlp(image)\n",
        "self.mlp(image)",
        "run(self, self.mlp, image{more})",
    ),
    "a sum": (
        "def f(self, x):\n    x = x + self.gate * self.mlp(x)\n",
        "self.mlp(x)",
        "run(self, self.mlp, x{more})",
    ),
    "a call on three lines": (
        "def f(self, x):\n    x = some_function_with_a_name(\n"
        "        self.first, [3 * self.hidden_size, self.mlp_hidden_dim], self.third_of_three\n    )\n",
        "self.first,",
        "self.first, x{more},",
    ),
    "a signature": (
        "def attend(q, k, v, rotation, mask=None) -> Tensor:\n    pass\n",
        "mask=None",
        "mask=None{keywords}",
    ),
    "a method behind": (
        "def f(q):\n    x = attend(q, q, q).transpose(1, 2)\n",
        "attend(q",
        "run(attend{more}, q",
    ),
    "a loop": (
        "def f(times):\n    for t in zip(times[:-1], times[1:]):\n        pass\n",
        "zip(times[:-1], times[1:])",
        "steps(model{more}, zip(times[:-1], times[1:]))",
    ),
    "what is returned": ("def f(x):\n    return x + leave(x)\n", "leave(x)", "run(leave, x{more})"),
    "a call in a call": ("def f(x):\n    print(inner(x), x)\n", "inner(x)", "inner(x{more})"),
}


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_formatter_has_nothing_to_change(name: str, limit: int) -> None:
    before, old, new = STATEMENTS[name]
    before = formatted(before, limit)
    for count in range(0, 14, 1 if limit == 88 else 3):
        more = "".join(f", argument_{i}" for i in range(count))
        keywords = "".join(f", keyword_{i}=None" for i in range(count))
        after = edited(before, old, new.format(more=more, keywords=keywords), limit)
        assert after == formatted(after, limit)


def test_what_is_left_as_it_is() -> None:
    """Comments, texts over several lines, and statements that nobody laid out."""
    more = ", ".join(f"argument_{i}" for i in range(12))
    for before in (
        "x = run(first)  # why\n",
        'x = run(first, """\n""")\n',
        "x = run(first,\n        second)\n",
        "x = run(\n    first,\n    second,\n)\n",
        "x = zero + run(first) + second\n",  # which would go into parentheses
    ):
        head, tail = before.rsplit("first", 1)
        source = Source("code.py", before.encode())
        edits = {Edit(len(head), len(head) + 5, f"first, {more}")}
        assert source.apply(laid_out(source, edits, 88)).decode() == f"{head}first, {more}{tail}"


def test_a_new_statement_behind_another_stays_one() -> None:
    before = "def f():\n    model = load(name)\n    return model\n"
    source = Source("code.py", before.encode())
    at = before.index("\n    return")
    new = "\n    enable(model, " + ", ".join(["argument"] * 12) + ")"
    assert source.apply(laid_out(source, {Edit(at, at, new)}, 88)).decode() == before[:at] + new + before[at:]


def test_the_limit_is_told_by_what_a_formatter_has_joined_and_broken() -> None:
    def limit(*texts: str) -> int:
        own, *others = [bounds_of(Source("code.py", text.encode())) for text in texts]
        return limit_of(own, others)

    for each in LIMITS:
        assert limit(evidence(each)) == each
        assert limit("x = 1\n", evidence(each)) == each
        assert limit(evidence(each), evidence(88), evidence(120)) == each
    assert limit("x = 1\n") == 120
    assert limit("x = run(\n    1\n)\n") == 0  # no formatter leaves that
    assert limit(f"x = {'a' * 130}\n") == 0
    assert limit(f"x = '{'a' * 130}'\n{evidence(100)}") == 100  # a text cannot be broken


@pytest.mark.parametrize("limit", LIMITS)
def test_a_repository_that_is_formatted_stays_so(limit: int) -> None:
    texts = {path: formatted(f"{text}\n\n{evidence(limit)}", limit) for path, text in FILES.items() if text}
    changes = plan_repository({path: text.encode() for path, text in texts.items()}, load()).changes
    assert len(changes) == 6
    for change in changes:
        after = change.after.decode()
        assert after == formatted(after, limit), change.path
