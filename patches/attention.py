"""Send the joint attention of both kinds of block through Chipmunk.

The call that matters is the one of `scaled_dot_product_attention`, wherever it stands: in the block, in a function that the
block calls, or in a sub-module. It is the joint attention if query, key and value all descend from all of the block's
streams; attention of one stream alone, cross-attention, and the same function called from elsewhere (a VAE, dead code)
stay as they are. The function that holds the call gets one more optional parameter, `chipmunk_layer`; the block hands itself
down in it, as a keyword that is absent while Chipmunk is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, SINGLE, variant
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.repository import Class, External, Function
from chipmunk.rewrite.roles import Block, Model
from chipmunk.rewrite.syntax import argument, bind, dotted, parameters, self_attribute

NAME = "attention"
API = 1
VERSION = "1"

PARAMETER = "chipmunk_layer"
DEPTH = 3
SDPA = "torch.nn.functional.scaled_dot_product_attention"
# Fast attention of other libraries, in other layouts: known, so that the report can say so.
OTHERS = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "memory_efficient_attention",
    "sageattn",
    "dispatch_attention_fn",
)


@dataclass(frozen=True)
class _Hop:
    """One call on the way from the block to the attention."""

    function: Function
    """The function that the call stands in."""
    call: cst.Call
    step: Step
    block_name: str | None
    """The name of the block in this function, `self` in its own methods; None where it is out of reach."""
    direct: bool = True
    """False for `checkpoint(self._forward, …)`, where the call's arguments are not only the callee's."""


@dataclass(frozen=True)
class _Leaf:
    """An attention call and the way to it."""

    path: tuple[_Hop, ...]
    kind: str
    """`joint`, or why it is something else."""
    done: bool


def rule(context: Context) -> None:
    for model in context.models:
        for block in (model.double_block, model.single_block):
            _patch_block(context, model, block)


def _patch_block(context: Context, model: Model, block: Block) -> None:
    forward = block.forward
    receiver = forward.scope.receiver
    streams = {name: frozenset({stream}) for name, stream in block.streams.items()}
    leaves = list(_leaves(context, forward, streams, receiver, (), frozenset(block.streams.values())))
    joint = [leaf for leaf in leaves if leaf.kind == "joint"]
    shared = _shared_with(context, model, block)
    for leaf in joint:
        block.attention = True
        _patch(context, block, leaf, shared)
    for leaf in leaves:
        if leaf.kind != "joint":
            hop = leaf.path[-1]
            context.left_dense(hop.function.source, hop.call, leaf.kind)
    if not joint:
        reason = "no scaled_dot_product_attention on the joint stream was found in it, or up to three calls down"
        context.left_dense(forward.source, forward.node.name, reason, matched=forward.name)


def _shared_with(context: Context, model: Model, block: Block) -> str:
    """A clause for the report if other models use the block's class too."""
    others = [found.owner.name for found in context.roles.lookalikes if found.owner.name != model.name]
    users = [name for name in dict.fromkeys(others) if _uses(context, name, block)]
    return f"; {' and '.join(users)} shares the class and stays dense, as its blocks get no state" if users else ""


def _uses(context: Context, owner: str, block: Block) -> bool:
    found = next(x.owner for x in context.roles.lookalikes if x.owner.name == owner)
    meanings = [context.repository.resolve(name, found.module) for name in found.module.imports]
    return block.owner in meanings or block.owner.module is found.module


# Finding


def _leaves(
    context: Context,
    function: Function,
    streams: dict[str, frozenset[str]],
    block_name: str | None,
    path: tuple[_Hop, ...],
    wanted: frozenset[str],
) -> Iterator[_Leaf]:
    """Attention calls in `function` and up to DEPTH calls below; `streams`: which of the block's streams each parameter holds."""
    scope = function.scope

    def streams_of(value: cst.CSTNode | None, step: Step) -> frozenset[str]:
        roots = scope.roots(value, step) if value is not None else frozenset()
        return frozenset().union(*(streams.get(root, frozenset()) for root in roots))

    for call, step in scope.calls:
        hop = _Hop(function, call, step, block_name)
        callee, shift, done = call.func, 0, False
        if context.runtime_call(call, function, step) == "attention" and len(call.args) > 2:
            callee, shift, done = call.args[1].value, 2, True
        meaning = context.repository.resolve(callee, function, step)
        if isinstance(meaning, External):
            name = meaning.name.split(".")[-1]
            if meaning.name == SDPA or (name == SDPA.split(".")[-1] and meaning.name.startswith("torch.")):
                inputs = [argument(call, shift + i, n) for i, n in enumerate(("query", "key", "value"))]
                yield _Leaf((*path, hop), _kind([streams_of(x, step) for x in inputs], wanted), done)
            elif name in OTHERS and streams_of(call, step):
                yield _Leaf((*path, hop), f"{name} takes its tensors in a layout that Chipmunk does not know", False)
            elif call.args and call.args[0].keyword is None and call.args[0].star == "":
                # checkpoint(self._forward, img, txt): the first argument is what runs.
                inner = context.repository.resolve(call.args[0].value, function, step)
                if isinstance(inner, Function):
                    handed = _Hop(function, call, step, block_name, direct=False)
                    yield from _below(context, inner, handed, streams_of, path, wanted, first=1)
            continue
        target, names_block = _callee(context, function, call, step, meaning, block_name)
        if target is not None:
            yield from _below(context, target, hop, streams_of, path, wanted, same_object=names_block)


def _below(context, inner, hop, streams_of, path, wanted, *, first=0, same_object=True):  # type: ignore[no-untyped-def]
    if len(path) >= DEPTH or any(h.function is inner for h in (*path, hop)):
        return
    skip = inner.receivers
    given = bind(inner.node, hop.call, skip=skip, first=first)
    streams = {name: found for name, value in given.items() if (found := streams_of(value, hop.step))}
    if not streams:
        return
    block_name = next((n for n, value in given.items() if hop.block_name and dotted(value) == hop.block_name), None)
    if block_name is None and same_object and skip and hop.block_name is not None:
        block_name = inner.scope.receiver
    yield from _leaves(context, inner, streams, block_name, (*path, hop), wanted)


def _callee(
    context: Context, function: Function, call: cst.Call, step: Step, meaning: object, block_name: str | None
) -> tuple[Function | None, bool]:
    """The repository's function that a call runs, and whether it is a method of the very object it is called in."""
    if isinstance(meaning, Function):
        return meaning, meaning.owner is not None and dotted(call.func) == f"{block_name}.{meaning.node.name.value}"
    if isinstance(meaning, Class) or function.owner is None:
        return None, False
    receiver = function.scope.receiver
    attribute, method = self_attribute(call.func, receiver), "forward"
    if attribute is None and isinstance(call.func, cst.Attribute):
        attribute, method = self_attribute(call.func.value, receiver), call.func.attr.value
    if attribute is None:
        return None, False
    for owner in context.repository.classes_in(function.owner, attribute):
        found = context.repository.method(owner, method)
        if found is None and method == "forward":
            found = context.repository.method(owner, "__call__")
        if found is not None:
            return found, False
    return None, False


def _kind(found: list[frozenset[str]], wanted: frozenset[str]) -> str:
    if all(streams == wanted for streams in found):
        return "joint"
    if found[0] and not (found[1] and found[2]):
        return "cross-attention: key and value do not come from the block's streams"
    return "not the joint attention: query, key and value do not all come from all streams of the block"


# Changing


def _patch(context: Context, block: Block, leaf: _Leaf, shared: str) -> None:
    """Hand the block down from the last place that knows it to the attention call."""
    path = leaf.path
    known = max(i for i, hop in enumerate(path) if hop.block_name is not None)
    last = path[-1]
    changed = not leaf.done
    if not leaf.done:
        runtime = context.runtime(last.function.source)
        if known == len(path) - 1:
            layer = f'{runtime}.layer({last.block_name}).get("{PARAMETER}")'
        else:
            layer = PARAMETER
        callee = last.function.source.code(last.call.func)
        context.replace(last.function.source, last.call.func, f"{runtime}.attention")
        context.prepend_arguments(last.function.source, last.call, [layer, callee])
    for index in range(known + 1, len(path)):
        if _add_parameter(context, path[index].function):
            changed = True
    for index in range(known, len(path) - 1):
        if _hand_down(context, path[index], first=index == known):
            changed = True
    top = path[known]
    what = "joint attention: query, key and value descend from the same streams"
    where = f"reached from {block.forward.name}"
    if changed:
        context.patched(top.function.source, top.call, what + shared)
        if last is not top:
            context.patched(last.function.source, last.call, f"the attention call itself, {where}")
    else:
        context.already(top.function.source, top.call, what)
        if last is not top:
            context.already(last.function.source, last.call, f"the attention call itself, {where}")


def _add_parameter(context: Context, function: Function) -> bool:
    if PARAMETER in {p.name.value for p in parameters(function.node)}:
        return False
    context.append_parameter(function.source, function.node, f"{PARAMETER}=None")
    return True


def _hand_down(context: Context, hop: _Hop, *, first: bool) -> bool:
    for arg in hop.call.args:
        if arg.keyword is not None and arg.keyword.value == PARAMETER:
            return False
        if arg.star == "**" and context.runtime_call(arg.value, hop.function, hop.step) == "layer":
            return False
    if first:
        text = f"**{context.runtime(hop.function.source)}.layer({hop.block_name})"
    else:
        text = f"{PARAMETER}={PARAMETER}"
    context.append_argument(hop.function.source, hop.call, text)
    return True


_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_LAYER = ("attend(q, k, v, rotation)", "attend(q, k, v, rotation, **chipmunk.layer(self))")
_CALL = "torch.nn.functional.scaled_dot_product_attention("
_INLINE = variant(DOUBLE, ("attend(q, k, v, rotation)", f"{_CALL}q, k, v).transpose(1, 2).flatten(2)"))

EXAMPLES = (
    Example(
        "attention of the image alone, beside the joint one",
        "flow/double.py",
        variant(DOUBLE, ("attend(q, k, v, rotation)", "attend(image_q, image_k, image_v, rotation)")),
        None,
    ),
    Example(
        "cross-attention to something that is no stream",
        "flow/double.py",
        variant(
            DOUBLE, ("text_q, text_k, text_v = self.split(self.text_qkv(text))", "text_q = text_k = text_v = rotation")
        ),
        None,
    ),
    Example(
        "the attention call",
        "flow/attention.py",
        ATTENTION,
        variant(
            ATTENTION,
            _IMPORT,
            ("v, rotation):", "v, rotation, chipmunk_layer=None):"),
            (f"{_CALL}q", f"chipmunk.attention(chipmunk_layer, {_CALL[:-1]}, q"),
        ),
    ),
    Example("a double block", "flow/double.py", DOUBLE, variant(DOUBLE, _IMPORT, _LAYER)),
    Example("a single block", "flow/single.py", SINGLE, variant(SINGLE, _IMPORT, _LAYER)),
    Example(
        "the call in the block itself",
        "flow/double.py",
        _INLINE,
        variant(
            _INLINE,
            _IMPORT,
            (f"{_CALL}q", f'chipmunk.attention(chipmunk.layer(self).get("chipmunk_layer"), {_CALL[:-1]}, q'),
        ),
    ),
)
