"""Send the image MLP of the double blocks through Chipmunk.

The MLP is the attribute that is built as Linear, activation, Linear (GELU, or SwiGLU: the first linear makes a gate and
a value), be it a Sequential or a class of the repository's own, whose forward is read; and whose result flows into the
image stream that the block returns, and not into the text stream. It may be called in the block's forward, in a method
or helper, or in a processor object that is given the block; or the block calls the linears itself. Only the calls
change, never the arithmetic around them. The text MLP stays dense: it is small. An MLP that sees only some of the
tokens stays dense.
"""

from __future__ import annotations

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import DOUBLE, variant
from chipmunk.rewrite.mlps.editing import patch_pieces
from chipmunk.rewrite.mlps.finding import Finder
from chipmunk.rewrite.mlps.pieces import Pieces
from chipmunk.rewrite.mlps.whole import patch_whole, whole_mlps
from chipmunk.rewrite.reach import reached_from
from chipmunk.rewrite.roles import Block

NAME = "double-mlp"
API = 1
VERSION = "2"


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.double_block)


def _patch_block(context: Context, block: Block) -> None:
    found = whole_mlps(context, block, {"image"})
    pieces: list[Pieces] = []
    if not found:
        for where in reached_from(context.repository, block):
            pieces += [mlp for mlp in Finder(context, where, {"image"}).found() if mlp.second.alone]
    patch_pieces(context, block, pieces)
    if not found and not pieces:
        reason = "no Linear, GELU or SwiGLU, Linear was found on the image stream alone"
        context.left_dense(block.forward.source, block.forward.node.name, reason, matched=block.forward.name)
    for mlp in found:
        patch_whole(context, block, mlp, "image")


_CALL = "self.image_mlp(self.image_norm(image))"
_IMPORT = ("import torch\nfrom", "import chipmunk\nimport torch\nfrom")
_BUILT = """nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )"""
_OWN = variant(
    DOUBLE,
    (f"self.image_mlp = {_BUILT}", "self.image_mlp = Feed(width)"),
    (
        "class PairBlock",
        """class Feed(nn.Module):
    def __init__(self, width, drop=0.0):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = nn.functional.gelu(self.up(x), approximate="tanh")
        return self.down(self.drop(x))


class PairBlock""",
    ),
)
_GATED = variant(
    DOUBLE,
    (_BUILT, "nn.Sequential(nn.Linear(width, 8 * width, bias=False), Gate(), nn.Linear(4 * width, width, bias=False))"),
    (
        "class PairBlock",
        """class Gate(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * nn.functional.silu(gate)


class PairBlock""",
    ),
)

_MADE = variant(
    DOUBLE,
    (f"self.image_mlp = {_BUILT}", "self.image_mlp = feed(width)"),
    (
        "class PairBlock",
        """def feed(width, times=4, plain=False):
    if plain:
        return nn.Linear(width, width)
    hidden = times * width
    made = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
    return made


class PairBlock""",
    ),
)

EXAMPLES = (
    Example(
        "an MLP that a function makes, in one form or another",
        "flow/double.py",
        variant(_MADE, ("feed(width)\n", "feed(width, plain=heads > 4)\n")),
        None,
    ),
    Example(
        "an MLP with another activation",
        "flow/double.py",
        variant(DOUBLE, ('nn.GELU(approximate="tanh")', "nn.SiLU()")),
        None,
    ),
    Example(
        "an MLP of the repository's own class, with something in between",
        "flow/double.py",
        variant(_OWN, ("self.down(self.drop(x))", "self.down(x / x.norm(dim=-1, keepdim=True))")),
        None,
    ),
    Example(
        "a gate by another function",
        "flow/double.py",
        variant(_GATED, ("nn.functional.silu(gate)", "nn.functional.sigmoid(gate)")),
        None,
    ),
    Example(
        "an MLP that sees only some of the tokens",
        "flow/double.py",
        variant(DOUBLE, (_CALL, "self.image_mlp(self.image_norm(image)[:, ::2]).repeat_interleave(2, dim=1)")),
        None,
    ),
    Example(
        "an MLP that is called twice",
        "flow/double.py",
        variant(DOUBLE, (_CALL, f"self.image_mlp(image) + {_CALL}")),
        None,
    ),
    Example(
        "the MLP of the image stream; that of the text stays dense",
        "flow/double.py",
        DOUBLE,
        variant(DOUBLE, _IMPORT, (_CALL, "chipmunk.mlp(self, self.image_mlp, self.image_norm(image))")),
    ),
    Example(
        "an MLP that a function makes",
        "flow/double.py",
        _MADE,
        variant(_MADE, _IMPORT, (_CALL, "chipmunk.mlp(self, self.image_mlp, self.image_norm(image))")),
    ),
    Example(
        "an MLP of the repository's own class: its parts are named",
        "flow/double.py",
        _OWN,
        variant(
            _OWN,
            _IMPORT,
            (
                _CALL,
                "chipmunk.mlp(\n            self, self.image_mlp, self.image_norm(image), "
                'parts="up, gelu_tanh, down", of="Feed"\n        )',
            ),
        ),
    ),
    Example(
        "SwiGLU, the value before the gate, and an update in place",
        "flow/double.py",
        variant(_GATED, (f"image = image + {_CALL}", f"image += {_CALL}")),
        variant(
            _GATED,
            _IMPORT,
            (
                f"image = image + {_CALL}",
                "image += chipmunk.mlp(self, self.image_mlp, self.image_norm(image), "
                'parts="0, swiglu_value_first, 2", of="Gate")',
            ),
        ),
    ),
)
