"""Where `import chipmunk` goes, and what it is called."""

from __future__ import annotations

import pytest

from chipmunk.rewrite.imports import import_edit, runtime_name
from chipmunk.rewrite.source import Source

OWN = {"flow", "layers"}


def imported(text: str) -> str:
    source = Source("x.py", text.encode())
    name, done = runtime_name(source)
    assert not done
    return source.apply({import_edit(source, name, OWN)}).decode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Leading `try:` blocks stay first, and nothing goes inside them.
        ("try:\n    import xformers\nexcept ImportError:\n    xformers = None\nimport torch\n", "*import torch\n"),
        (
            "try:\n    import xformers\nexcept ImportError:\n    xformers = None\n\nx = 1\n",
            "    xformers = None\n\n*\nx = 1\n",
        ),
        # Nothing comes before a docstring, `__future__`, an encoding cookie or a licence.
        ('"""Doc."""\nfrom __future__ import annotations\n\nx = 1\n', "import annotations\n\n*\nx = 1\n"),
        ('#!/usr/bin/env python\n# Licence.\n"""Doc."""\n\nx = 1\n', '"""Doc."""\n\n*\nx = 1\n'),
        ("# -*- coding: utf-8 -*-\n# Licence.\nimport torch\n", "# Licence.\n*import torch\n"),
        # Among the third-party imports, in order where there is one.
        ("import math\n\nimport torch\n", "import math\n\n*import torch\n"),
        ("import math\n\nimport accelerate\nimport torch\n", "import accelerate\n*import torch\n"),
        ("import math\n\nfrom einops import rearrange\n", "import math\n\n*from einops import rearrange\n"),
        ("import torch\nfrom flow import layers\n", "*import torch\nfrom flow import layers\n"),
        ("import os\n# Heavy ones.\nimport torch\nx = 1\n", "# Heavy ones.\nimport torch\n*x = 1\n"),
        # Without third-party imports: after the standard library, before the repository's own.
        ("import math\n\nfrom .layers import x\n", "import math\n\n*\nfrom .layers import x\n"),
        ("from flow import layers\n", "*\nfrom flow import layers\n"),
        ("from . import layers\n", "*\nfrom . import layers\n"),
        # Without any.
        ("x = 1\n", "*\nx = 1\n"),
        ("", "*"),
        # A statement over several lines, and one without a final newline.
        ("import os\nfrom math import (\n    pi,\n)\n\nx = 1\n", "    pi,\n)\n\n*\nx = 1\n"),
        ("import math", "import math\n\nimport chipmunk"),
    ],
)
def test_place(before: str, after: str) -> None:
    """`*` stands for the inserted line."""
    result = imported(before)
    line = after.replace("*", "import chipmunk\n")
    assert line in result
    assert result.count("import chipmunk") == 1
    kept = result.replace("import chipmunk\n", "", 1) if before.endswith("\n") or not before else before
    assert kept.replace("\n", "") == before.replace("\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "chipmunk = 3\n",
        "def chipmunk():\n    pass\n",
        "def f(chipmunk):\n    return chipmunk\n",
        "from animals import chipmunk\n",
        "import animals as chipmunk\n",
        "for chipmunk in ():\n    pass\n",
        "with open('x') as chipmunk:\n    pass\n",
        "import chipmunk.extra\n",
    ],
)
def test_a_name_that_is_taken_gives_an_alias(text: str) -> None:
    assert "import chipmunk as chipmunk_runtime\n" in imported(text)


@pytest.mark.parametrize("text", ["# chipmunk\n", "x = 'chipmunk'\n", "x.chipmunk = 3\n", "f(chipmunk=3)\n"])
def test_a_name_that_is_only_mentioned_is_free(text: str) -> None:
    assert "import chipmunk\n" in imported(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import chipmunk\n", "chipmunk"),
        ("import chipmunk as c\n", "c"),
        ("try:\n    import chipmunk\nexcept ImportError:\n    chipmunk = None\n", "chipmunk"),
    ],
)
def test_an_import_that_is_there_is_used(text: str, name: str) -> None:
    assert runtime_name(Source("x.py", text.encode())) == (name, True)
