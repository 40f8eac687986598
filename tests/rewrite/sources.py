"""A small FLUX repository in many disguises: the same program, written otherwise.

Each disguise keeps what the program does; so the rules must find the same places in it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st

from chipmunk.rewrite import Plan
from chipmunk.rewrite.minimal import ATTENTION, FILES

Files = dict[str, str]

NAMES = [
    "PairBlock",
    "JointBlock",
    "Painter",
    "pairs",
    "joints",
    "image_qkv",
    "image_out",
    "image_norm",
    "image_mlp",
    "text_mlp",
    "image",
    "text",
    "image_ids",
    "text_ids",
    "rotation",
    "rotate",
    "enter",
    "leave",
    "act",
    "hidden",
    "mixed",
    "attend",
    "sample",
    "velocity",
    "load_painter",
    "block",
    "qkv",
    "width",
    "heads",
    "q",
    "k",
    "v",
    "x",
    "model",
    "times",
    "now",
    "then",
    "main",
]


@dataclass(frozen=True)
class Rewrite:
    """One other way of writing something: in `path`, `old` becomes `new`."""

    path: str
    old: str
    new: str


REWRITES = (
    # Imports
    Rewrite("flow/double.py", "from flow.attention import attend", "from .attention import attend"),
    Rewrite(
        "flow/single.py",
        "from flow.attention import attend\n",
        "from flow import attention as kernels\n\nattend = kernels.attend\n",
    ),
    Rewrite(
        "flow/model.py",
        "from flow.double import PairBlock",
        "from .double import PairBlock as Pair\n\nPairBlock = Pair",
    ),
    Rewrite("flow/__init__.py", "", "from .model import Painter as Painter\n"),
    Rewrite(
        "flow/loading.py",
        "from flow.model import Painter\n\n\n",
        "import flow.model\n\nPainter = flow.model.Painter\n\n\n",
    ),
    Rewrite("flow/attention.py", "import torch\n", "import torch\nimport torch.nn.functional as F\n"),
    Rewrite(
        "flow/sampling.py", "import torch\n\n", "try:\n    import torch\nexcept ImportError:\n    torch = None\n\n"
    ),
    Rewrite(
        "flow/double.py",
        "import torch\n",
        '"""Blocks."""\nfrom __future__ import annotations\n\nimport math\n\nimport torch\n',
    ),
    # Layout
    Rewrite(
        "flow/double.py",
        "attend(q, k, v, rotation)",
        "attend(\n            q,\n            k,\n            v,  # as it is\n            rotation,\n        )",
    ),
    Rewrite(
        "flow/single.py",
        "attend(q, k, v, rotation)",
        "attend(q,\n                       k, v,\n                       rotation=rotation)",
    ),
    Rewrite(
        "flow/attention.py",
        "def attend(q, k, v, rotation):",
        "def attend(\n    q,\n    k,\n    v,\n    rotation,  # of the positions\n):",
    ),
    Rewrite(
        "flow/attention.py",
        "def attend(q, k, v, rotation):",
        "def attend(q, k, v, rotation, *unused, scale=None, **others):",
    ),
    Rewrite(
        "flow/attention.py",
        "torch.nn.functional.scaled_dot_product_attention(q, k, v)",
        "torch.nn.functional.scaled_dot_product_attention(\n        query=q,\n        key=k,\n        value=v\n    )",
    ),
    Rewrite(
        "flow/double.py",
        "self.image_mlp(self.image_norm(image))",
        "self.image_mlp(\n            self.image_norm(image)\n        )",
    ),
    Rewrite("flow/sampling.py", "def sample(", "@torch.no_grad()\ndef sample("),
    Rewrite("flow/model.py", "    def forward(self", "    @torch.no_grad()\n    def forward(self"),
    Rewrite("flow/double.py", "        x = attend(", "        # mixing\t\n\n        x = attend("),
    # Order
    Rewrite(
        "flow/double.py",
        "        q = torch.cat((text_q, image_q), dim=2)\n        k = torch.cat((text_k, image_k), dim=2)\n",
        "        k = torch.concat([text_k, image_k], dim=2)\n        q = torch.concat([text_q, image_q], dim=2)\n",
    ),
    Rewrite(
        "flow/double.py",
        "        image = image + self.image_mlp(self.image_norm(image))\n        text = text + self.text_out(text_x)\n",
        "        text = text + self.text_out(text_x)\n        image = image + self.image_mlp(self.image_norm(image))\n",
    ),
    Rewrite(
        "flow/double.py",
        "image = image + self.image_mlp(self.image_norm(image))",
        "image += self.image_mlp(self.image_norm(image))",
    ),
    # Other names for the attention call
    Rewrite(
        "flow/attention.py",
        ATTENTION,
        ATTENTION.replace("torch.nn.f", "layers.f").replace("import torch\n", "from torch import nn as layers\n"),
    ),
    Rewrite(
        "flow/attention.py",
        ATTENTION,
        ATTENTION.replace("torch.nn.functional.", "").replace(
            "import torch\n",
            "from torch.nn.functional import *\nfrom torch.nn.functional import scaled_dot_product_attention\n",
        ),
    ),
    Rewrite(
        "flow/attention.py",
        ATTENTION,
        ATTENTION.replace("torch.nn.functional.scaled_dot_product_attention(", "sdpa(").replace(
            "import torch\n", "from torch.nn import functional\n\nsdpa = functional.scaled_dot_product_attention\n"
        ),
    ),
    # Branches and loops
    Rewrite(
        "flow/model.py",
        "        for block in self.pairs:\n            image, text = block(image, text, rotation)\n",
        "        if text.shape[1] > 0:\n            with torch.no_grad():\n                for block in self.pairs:\n"
        "                    (image, text) = block(image=image, text=text, rotation=rotation)\n",
    ),
    Rewrite("flow/model.py", "for block in self.pairs:", "for i, block in enumerate(self.pairs):"),
    Rewrite(
        "flow/model.py",
        "            x = block(x, rotation)\n",
        "            if block is not None:\n                x = block(x, rotation=rotation)\n",
    ),
    Rewrite(
        "flow/model.py",
        "            x = block(x, rotation)\n",
        "            x = torch.utils.checkpoint.checkpoint(block, x, rotation)\n",
    ),
    Rewrite(
        "flow/model.py",
        "        self.joints = nn.ModuleList([JointBlock(width, heads) for _ in range(joints)])\n",
        "        self.joints = nn.ModuleList()\n        for _ in range(joints):\n"
        "            self.joints.append(JointBlock(width, heads))\n",
    ),
    Rewrite("flow/sampling.py", "in zip(times[:-1], times[1:]):", "in list(zip(times[:-1], times[1:])):"),
    Rewrite(
        "flow/sampling.py", "        velocity = model(", "        with torch.no_grad():\n            velocity = model("
    ),
    Rewrite("flow/sampling.py", "model: Painter, ", "model, "),
    Rewrite(
        "flow/single.py",
        "torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)",
        "self.enter(x).split((3 * self.width, 4 * self.width), -1)",
    ),
    Rewrite(
        "flow/single.py",
        "self.leave(torch.cat((mixed, self.act(hidden)), 2))",
        "self.leave(\n            torch.cat([mixed, self.act(hidden)], dim=-1)\n        )",
    ),
    Rewrite(
        "flow/command.py",
        "    model = load_painter(name)\n",
        '    if steps > 2:\n        model = load_painter(name)\n    else:\n        model = load_painter("tiny")\n',
    ),
    Rewrite(
        "flow/command.py",
        '(name: str = "small", steps: int = 4)',
        '(\n    name: str = "small",\n    steps: int = 4,\n)',
    ),
)


def rewrite(files: Files, chosen: list[Rewrite]) -> Files:
    """`files` with those rewrites that still apply, one after the other."""
    files = dict(files)
    for change in chosen:
        text = files[change.path]
        if change.old in text:
            files[change.path] = text.replace(change.old, change.new) if change.old else text + change.new
    return files


def rename(files: Files, names: dict[str, str]) -> Files:
    """`files` with every identifier in `names` called otherwise, file names left alone."""
    if not names:
        return files
    pattern = re.compile(
        r"(?<![\w\"'])(?<!flow\.)(?<!from \.)(?:" + "|".join(sorted(names, key=len, reverse=True)) + r")(?![\w\"'])"
    )
    return {path: pattern.sub(lambda m: names[m.group()], text) for path, text in files.items()}


def encode(files: Files, *, crlf: bool, bom: bool, tabs: bool, no_final_newline: bool, latin: bool) -> dict[str, bytes]:
    """The files' bytes, in an unusual form."""
    encoded: dict[str, bytes] = {}
    for path, text in files.items():
        if tabs:
            text = re.sub(r"^( {4})+", lambda m: "\t" * (len(m.group()) // 4), text, flags=re.MULTILINE)
        if no_final_newline:
            text = text.rstrip("\n")
        if latin and not bom:
            text = "# -*- coding: latin-1 -*-\n# déjà vu\n" + text
        if crlf:
            text = text.replace("\n", "\r\n")
        encoded[path] = (b"\xef\xbb\xbf" if bom else b"") + text.encode("latin-1" if latin and not bom else "utf-8")
    return encoded


def fresh_names() -> st.SearchStrategy[dict[str, str]]:
    """Other names for some identifiers, all different."""
    return st.lists(st.sampled_from(NAMES), unique=True).map(
        lambda chosen: {name: f"{name[0]}z{i}_" for i, name in enumerate(chosen)}
    )


def disguises() -> st.SearchStrategy[dict[str, bytes]]:
    """The minimal repository, rewritten, renamed and encoded at random."""
    flags = {name: st.booleans() for name in ("crlf", "bom", "tabs", "no_final_newline", "latin")}
    return st.builds(
        lambda changes, names, form: encode(rename(rewrite(FILES, changes), names), **form),
        st.lists(st.sampled_from(REWRITES), unique=True, max_size=8),
        fresh_names(),
        st.fixed_dictionaries(flags),
    )


def found(plan: Plan) -> Counter[tuple[str, str, str]]:
    """What the plan found, lines and words left out: (file, patch, status) → how often."""
    return Counter((site.file, site.patch, site.status.value) for site in plan.sites)
