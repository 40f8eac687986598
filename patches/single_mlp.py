"""Send the MLP of the single blocks, which is fused into their two linear layers, through Chipmunk.

The first linear's output is cut into [query, key, value | MLP], by a split or by slices, at once or after it was held
in a variable; or a linear of its own makes the MLP's input. Then comes the activation (GELU, or SwiGLU), a module or a
function, and the second linear takes the attention's output beside the activated part, in either order. All these calls
change, as what passes between them is left uncomputed on a sparse step: so if anything else reads it, all stay as they
are. They may stand in the block's forward, in a method, or in a processor object.

A SwiGLU may also be written out, `silu(gate) * value`, of the halves of one linear's output, of two of the parts that
it is cut into, or of two linears. One method of the block may begin the work and another one end it. A
single block may also have an MLP beside the attention, Linear, activation, Linear, that it calls on the joint stream:
then that call changes alone.
"""

from __future__ import annotations

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import SINGLE, variant
from chipmunk.rewrite.mlps.editing import patch_pieces
from chipmunk.rewrite.mlps.finding import Finder
from chipmunk.rewrite.mlps.whole import patch_whole, whole_mlps
from chipmunk.rewrite.reach import reached_from
from chipmunk.rewrite.roles import Block

NAME = "single-mlp"
API = 1
VERSION = "2"


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.single_block)


def _patch_block(context: Context, block: Block) -> None:
    streams = ({"joint"}, {"image", "text"}, {"image"})
    finders = [Finder(context, where, *streams) for where in reached_from(context.repository, block)]
    found = [mlp for finder in finders for mlp in finder.found()]
    whole = [] if found else whole_mlps(context, block, *streams)
    for module in whole:
        patch_whole(context, block, module, "joint")
    if not found and not whole:
        source, node = block.forward.source, block.forward.node
        missing = "cat(attention, activation(MLP)) into a second linear is missing"
        if any(finder.several for finder in finders):
            missing = "what makes its input has another form in each branch"
        elif any(finder.seconds for finder in finders):
            missing = "its output's split into [query, key, value | MLP] is missing, or something comes between"
        elif any(finder.apart for finder in finders):
            missing = "the second linear and the concatenation that it takes are in different branches or `with` blocks"
        context.left_dense(source, node.name, f"no fused MLP was found: {missing}", matched=block.forward.name)
    patch_pieces(context, block, found)


_SPLIT = "torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)"
_JOIN = "self.leave(torch.cat((mixed, self.act(hidden)), 2))"
_METHOD = variant(SINGLE, (_SPLIT, "self.enter(x).split((3 * self.width, 4 * self.width), dim=2)"))
_IMPORT = ("import torch\nfrom", "import chipmunk\nimport torch\nfrom")
_BOTH = (
    (_SPLIT, "chipmunk.split_linear(self, self.enter, x, [3 * self.width, 4 * self.width])"),
    (_JOIN, "chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden)"),
)
_LINE = "        "
_HELD = variant(
    SINGLE,
    (
        f"qkv, hidden = {_SPLIT}",
        f"both = self.enter(x)\n{_LINE}qkv, hidden = both[..., : 3 * self.width], both[..., 3 * self.width :]",
    ),
    (
        f"return x + {_JOIN}",
        f'hidden = nn.functional.gelu(hidden, approximate="tanh")\n{_LINE}both = torch.cat([mixed, hidden], dim=-1)\n'
        f"{_LINE}return x + self.leave(both)",
    ),
)
_APART = variant(
    SINGLE,
    ("nn.Linear(width, 3 * width + 4 * width)", "nn.Linear(width, 3 * width)"),
    ("self.act =", f"self.widen = nn.Linear(width, 4 * width)\n{_LINE}self.act ="),
    (f"qkv, hidden = {_SPLIT}", f"qkv = self.enter(x)\n{_LINE}hidden = self.act(self.widen(x))"),
    ("(mixed, self.act(hidden))", "(hidden, mixed)"),
)
_GATED = variant(
    SINGLE,
    ('nn.GELU(approximate="tanh")', "Gate()"),
    ("3 * width + 4 * width", "3 * width + 8 * width"),
    ("3 * self.width, 4 * self.width", "3 * self.width, 8 * self.width"),
    (
        "class JointBlock",
        """class Gate(nn.Module):
    def forward(self, x):
        half = x.shape[-1] // 2
        return nn.functional.silu(x[..., :half]) * x[..., half:]


class JointBlock""",
    ),
)

_WHOLE = variant(
    SINGLE,
    ("3 * width + 4 * width", "3 * width"),
    ("nn.Linear(width + 4 * width, width)", "nn.Linear(width, width)"),
    (
        'self.act = nn.GELU(approximate="tanh")',
        'self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))',
    ),
    (f"qkv, hidden = {_SPLIT}", "qkv = self.enter(x)"),
    (_JOIN, "self.leave(mixed) + self.mlp(x)"),
)

EXAMPLES = (
    Example(
        "an MLP beside the attention that sees only some of the tokens",
        "flow/single.py",
        variant(_WHOLE, ("self.mlp(x)", "self.mlp(x[:, 1:]).mean(1, True)")),
        None,
    ),
    Example(
        "the MLP's input is used in another place too",
        "flow/single.py",
        variant(SINGLE, (_JOIN, f"{_JOIN} + hidden.mean()")),
        None,
    ),
    Example(
        "the concatenation is read by something else",
        "flow/single.py",
        variant(_HELD, ("self.leave(both)", "self.leave(both) + both[..., :1]")),
        None,
    ),
    Example(
        "another activation", "flow/single.py", variant(SINGLE, ('nn.GELU(approximate="tanh")', "nn.SiLU()")), None
    ),
    Example(
        "the two parts the other way round, so that the attention is the MLP's",
        "flow/single.py",
        variant(SINGLE, ("qkv, hidden =", "hidden, qkv ="), ("qkv.unflatten", "hidden.unflatten")),
        None,
    ),
    Example("both linears", "flow/single.py", SINGLE, variant(SINGLE, _IMPORT, *_BOTH)),
    Example(
        "split as a method of the tensor",
        "flow/single.py",
        _METHOD,
        variant(
            _METHOD,
            _IMPORT,
            (
                "self.enter(x).split((3 * self.width, 4 * self.width), dim=2)",
                "chipmunk.split_linear(self, self.enter, x, (3 * self.width, 4 * self.width))",
            ),
            _BOTH[1],
        ),
    ),
    Example(
        "slices of a variable, a functional activation, and the concatenation in a variable",
        "flow/single.py",
        _HELD,
        variant(
            _HELD,
            _IMPORT,
            ("both = self.enter(x)", "both = chipmunk.held_linear(self, self.enter, x)"),
            (
                "both[..., : 3 * self.width], both[..., 3 * self.width :]",
                "chipmunk.split_held(self, both, [3 * self.width, -1])",
            ),
            ('nn.functional.gelu(hidden, approximate="tanh")', 'chipmunk.activate(self, "gelu_tanh", hidden)'),
            ("torch.cat([mixed, hidden], dim=-1)", "chipmunk.cat_linear(self, self.leave, mixed, None, hidden)"),
            ("self.leave(both)", "both"),
        ),
    ),
    Example(
        "a linear of its own, and the MLP before the attention",
        "flow/single.py",
        _APART,
        variant(
            _APART,
            _IMPORT,
            (
                "self.act(self.widen(x))",
                "chipmunk.activate(self, self.act, chipmunk.mlp_linear(self, self.widen, x))",
            ),
            (
                "self.leave(torch.cat((hidden, mixed), 2))",
                "chipmunk.cat_linear(self, self.leave, mixed, None, hidden, mlp_first=True)",
            ),
        ),
    ),
    Example(
        "SwiGLU",
        "flow/single.py",
        _GATED,
        variant(
            _GATED,
            _IMPORT,
            (
                "torch.split(self.enter(x), [3 * self.width, 8 * self.width], dim=-1)",
                "chipmunk.split_linear(self, self.enter, x, [3 * self.width, 8 * self.width])",
            ),
            (
                _JOIN,
                'chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden, kind="swiglu", of="Gate")',
            ),
        ),
    ),
    Example(
        "an MLP beside the attention",
        "flow/single.py",
        _WHOLE,
        variant(_WHOLE, _IMPORT, ("self.mlp(x)", "chipmunk.mlp(self, self.mlp, x)")),
    ),
)
