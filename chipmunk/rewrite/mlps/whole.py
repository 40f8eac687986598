"""Finding and changing calls of a whole MLP: an attribute that is built as Linear, activation, Linear."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.layers import Mlp, mlp_built
from chipmunk.rewrite.reach import Attribute, Reached, reached_from
from chipmunk.rewrite.roles import Block
from chipmunk.rewrite.syntax import dotted, integer, is_call, walk


@dataclass(eq=False)
class WholeMlp:
    """A call of such an MLP. `problem`: why it must stay dense."""

    call: cst.Call
    step: Step
    where: Reached
    attribute: Attribute
    mlp: Mlp
    done: bool
    problem: str = ""


def whole_mlps(context: Context, block: Block, *streams: set[str]) -> list[WholeMlp]:
    """Calls of whole MLPs in the block, whose result becomes part of exactly one of these sets of its streams."""
    return [found for where in reached_from(context.repository, block) for found in _calls(context, where, streams)]


def patch_whole(context: Context, block: Block, found: WholeMlp, stream: str) -> None:
    """Change the call, or leave it dense for its reason. `stream`: what the MLP works on, in words."""
    source = found.where.function.source
    if found.problem:
        context.left_dense(source, found.call, found.problem)
        return
    name = "the image MLP" if stream == "image" else "the block's MLP"
    block.mlp, block.gated = found.attribute.path, found.mlp.gated
    gate, plus, value = found.mlp.parts.partition(",")[0].partition(" + ")
    if plus:
        path = f"{found.attribute.path}."
        block.linear_in, block.linear_out = f"{path}{gate}, {path}{value}", path + found.mlp.parts.rpartition(", ")[2]
        block.mlp_alone = True
    if found.done:
        context.already(source, found.call, f"{name} is Chipmunk's")
        return
    _patch(context, found)
    kind = "SwiGLU" if found.mlp.gated else "GELU"
    context.patched(source, found.call, f"{name}: Linear, {kind}, Linear on the whole {stream} stream")


def _patch(context: Context, found: WholeMlp) -> None:
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


def _calls(context: Context, where: Reached, streams: tuple[set[str], ...]) -> list[WholeMlp]:
    """Calls of attributes that are such MLPs, and whose result becomes part of these streams."""
    found: list[WholeMlp] = []
    scope = where.function.scope
    for call, step in scope.calls:
        done = context.runtime_call(call, where.function, step) == "mlp" and len(call.args) >= 3
        callee = call.args[1].value if done else call.func
        attribute = where.attribute(context.repository, callee)
        mlp = None if attribute is None else mlp_built(context.repository, attribute.owner, attribute.name)
        if attribute is None or mlp is None or where.streams_of(call) not in streams:
            continue
        found.append(WholeMlp(call, step, where, attribute, mlp, done))
    for each in found:
        if not each.done:
            each.problem = _problem(each, found)
    return found


def _problem(found: WholeMlp, others: list[WholeMlp]) -> str:
    """Why the call must stay dense; empty if it may be sparse."""
    scope, args = found.where.function.scope, found.call.args
    if len(args) != 1 or args[0].star:
        return "the MLP is called with more than its input"
    if any(isinstance(node, (cst.For, cst.While)) for node, branch in found.step.chain if branch == "body"):
        return "the MLP is called piece by piece, in a loop"
    if is_gathered(scope, args[0].value, found.step, set(found.where.streams)):
        return "the MLP sees only some of the tokens"
    for other in others:
        apart = other.step.excludes(found.step) or found.step.excludes(other.step)
        if other is found or apart:
            continue
        if other.attribute == found.attribute:
            return "the MLP is called at several places in one call of the block"
        if others.index(other) < others.index(found) and not other.problem:
            return "the block has another MLP on these tokens, which is sparse: a block keeps the caches of one"
    return ""


def is_gathered(scope: Scope, value: cst.CSTNode, step: Step, streams: set[str]) -> bool:
    """Whether the input is picked out of a stream by an index or a mask."""
    for node in walk(value):
        if isinstance(node, cst.Subscript) and _selects(node) and scope.roots(node.value, step) & streams:
            return True
        if is_call(node, "index_select", "gather", "masked_select", "take_along_dim"):
            return True
    temporaries = [name for name in value_names(value) if name not in streams and "." not in name]
    return any(
        is_gathered(scope, binding.value, binding.step, streams)
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
