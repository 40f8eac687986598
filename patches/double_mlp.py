"""Send the image MLP of the double blocks through Chipmunk.

The MLP is the attribute that is built as Linear, activation, Linear (GELU, or SwiGLU: the first linear makes a gate and
a value), be it a Sequential or a class of the repository's own, whose forward is read; and whose result flows into the
image stream that the block returns, and not into the text stream. It may be called in the block's forward, in a method
or helper, or in a processor object that is given the block. Only the call changes, never the arithmetic around it. The
text MLP stays dense: it is small. An MLP that sees only some of the tokens stays dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.layers import Mlp, mlp_built
from chipmunk.rewrite.minimal import DOUBLE, variant
from chipmunk.rewrite.reach import Attribute, Reached, reached_from
from chipmunk.rewrite.roles import Block
from chipmunk.rewrite.syntax import dotted, integer, is_call, walk

NAME = "double-mlp"
API = 1
VERSION = "2"


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.double_block)


@dataclass
class _Call:
    """A call of such an MLP. `problem`: why it must stay dense."""

    call: cst.Call
    step: Step
    where: Reached
    attribute: Attribute
    mlp: Mlp
    done: bool
    problem: str = ""


def _patch_block(context: Context, block: Block) -> None:
    image = [found for where in reached_from(context.repository, block) for found in _calls(context, where)]
    if not image:
        reason = "no Linear, GELU or SwiGLU, Linear was found on the image stream alone"
        context.left_dense(block.forward.source, block.forward.node.name, reason, matched=block.forward.name)
    for found in image:
        source = found.where.function.source
        if found.problem:
            context.left_dense(source, found.call, found.problem)
            continue
        block.mlp, block.gated = found.attribute.path, found.mlp.gated
        if found.done:
            context.already(source, found.call, "the image MLP is Chipmunk's")
        else:
            _patch(context, found)
            kind = "SwiGLU" if found.mlp.gated else "GELU"
            context.patched(source, found.call, f"the image MLP: Linear, {kind}, Linear on the whole image stream")


def _patch(context: Context, found: _Call) -> None:
    source, layer = found.where.function.source, found.where.layer
    callee = source.code(found.call.func)
    assert layer is not None
    context.replace(source, found.call.func, f"{context.runtime(source)}.mlp")
    context.prepend_arguments(source, found.call, [layer, callee], drop_keyword=True)
    if found.mlp.parts:
        given = found.call.args[0]
        separator = ",\n" + source.indentation(given) if source.starts_line(given) else ", "
        options = [f'parts="{found.mlp.parts}"', *([f'of="{found.mlp.of}"'] if found.mlp.of else [])]
        context.append_argument(source, found.call, separator.join(options))


def _calls(context: Context, where: Reached) -> list[_Call]:
    """Calls of attributes that are such MLPs, and whose result becomes part of the image."""
    found: list[_Call] = []
    scope = where.function.scope
    for call, step in scope.calls:
        done = context.runtime_call(call, where.function, step) == "mlp" and len(call.args) >= 3
        callee = call.args[1].value if done else call.func
        attribute = where.attribute(context.repository, callee)
        mlp = None if attribute is None else mlp_built(context.repository, attribute.owner, attribute.name)
        if attribute is None or mlp is None or where.stream_of(call) != "image":
            continue
        found.append(_Call(call, step, where, attribute, mlp, done))
    for each in found:
        if not each.done:
            each.problem = _problem(each, found)
    return found


def _problem(found: _Call, others: list[_Call]) -> str:
    """Why the call must stay dense; empty if it may be sparse."""
    scope, args = found.where.function.scope, found.call.args
    if len(args) != 1 or args[0].star:
        return "the MLP is called with more than its input"
    if any(isinstance(node, (cst.For, cst.While)) for node, branch in found.step.chain if branch == "body"):
        return "the MLP is called piece by piece, in a loop"
    if _is_gathered(scope, args[0].value, found.step, set(found.where.streams)):
        return "the MLP sees only some of the tokens"
    for other in others:
        apart = other.step.excludes(found.step) or found.step.excludes(other.step)
        if other is not found and other.attribute == found.attribute and not apart:
            return "the MLP is called at several places in one call of the block"
    return ""


def _is_gathered(scope: Scope, value: cst.CSTNode, step: Step, streams: set[str]) -> bool:
    """Whether the input is picked out of a stream by an index or a mask."""
    for node in walk(value):
        if isinstance(node, cst.Subscript) and _selects(node) and scope.roots(node.value, step) & streams:
            return True
        if is_call(node, "index_select", "gather", "masked_select", "take_along_dim"):
            return True
    temporaries = [name for name in value_names(value) if name not in streams and "." not in name]
    return any(
        _is_gathered(scope, binding.value, binding.step, streams)
        for name in temporaries
        for binding in scope.reaching(name, step)
        if binding.value is not None and not binding.path
    )


def _selects(node: cst.Subscript) -> bool:
    """Whether `x[…]` leaves something out; `x[:, None]` does not, and `x[0]` is one of several tensors."""
    if len(node.slice) == 1 and integer(getattr(node.slice[0].slice, "value", None)) is not None:
        return False
    for part in node.slice:
        if isinstance(part.slice, cst.Slice):
            whole = part.slice.lower is None and part.slice.upper is None and part.slice.step is None
        else:
            assert isinstance(part.slice, cst.Index)
            value = part.slice.value
            whole = isinstance(value, cst.Ellipsis) or dotted(value) == "None"
        if not whole:
            return True
    return False


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

EXAMPLES = (
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
        "an MLP of the repository's own class: its parts are named",
        "flow/double.py",
        _OWN,
        variant(
            _OWN,
            _IMPORT,
            (
                _CALL,
                'chipmunk.mlp(self, self.image_mlp, self.image_norm(image), parts="up, gelu_tanh, down", of="Feed")',
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
