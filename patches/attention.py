"""Send the joint attention of both kinds of block through Chipmunk.

The call that matters is the one of `scaled_dot_product_attention`, wherever it stands: in the block, in a function that
the block calls, or in a sub-module. It is the joint attention if query, key and value all descend from all of the
block's streams; attention of one stream alone, cross-attention, and the same function called from elsewhere (a VAE,
dead code) stay as they are. The function that holds the call gets one more optional parameter, `chipmunk_layer`; the
block hands itself down in it, as a keyword that is absent while Chipmunk is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, SINGLE, variant
from chipmunk.rewrite.repository import External, Function, Meaning
from chipmunk.rewrite.roles import Block, Model
from chipmunk.rewrite.syntax import argument, bind, dotted, parameters, self_attribute, walk

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


Streams = frozenset[str]


@dataclass(frozen=True)
class _Hop:
    """One call on the way from the block to the attention."""

    function: Function
    """The function that the call stands in."""
    call: cst.Call
    step: Step
    block_name: str | None
    """The name of the block in this function, `self` in its own methods; None where it is out of reach."""


@dataclass(frozen=True)
class _Leaf:
    """An attention call and the way to it."""

    path: tuple[_Hop, ...]
    kind: str
    """`joint`, or why it is something else."""
    done: bool
    at: int = 0
    """Which hop the report is about: the call in the block, or (-1) the attention call itself."""


def rule(context: Context) -> None:
    for model in context.models:
        for block in (model.double_block, model.single_block):
            _patch_block(context, model, block)


def _patch_block(context: Context, model: Model, block: Block) -> None:
    forward = block.forward
    receiver = forward.scope.receiver
    streams = {name: frozenset({stream}) for name, stream in block.streams.items()}
    leaves = list(_Search(context, frozenset(block.streams.values())).leaves(forward, streams, receiver))
    leaves = [_once(leaf, leaves) for leaf in leaves]
    joint = [leaf for leaf in leaves if leaf.kind == "joint"]
    shared = _shared_with(context, model, block)
    for leaf in joint:
        block.attention = True
        _patch(context, block, leaf, shared)
    for leaf in leaves:
        if leaf.kind != "joint":
            hop = leaf.path[leaf.at]
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


@dataclass(frozen=True)
class _Search:
    """The search for attention calls below a block's forward. `wanted`: the streams that the block takes."""

    context: Context
    wanted: Streams

    def leaves(
        self, function: Function, streams: dict[str, Streams], block_name: str | None, path: tuple[_Hop, ...] = ()
    ) -> Iterator[_Leaf]:
        """Attention calls in `function`, and up to DEPTH calls below. `streams`: what its parameters hold of them."""
        for call, step in function.scope.calls:
            hop = _Hop(function, call, step, block_name)
            callee, shift, done = call.func, 0, False
            if self.context.runtime_call(call, function, step) == "attention" and len(call.args) > 2:
                callee, shift, done = call.args[1].value, 2, True
            meaning = self.context.repository.resolve(callee, function, step)
            if not isinstance(meaning, External):
                target, same_object = self._callee(hop, meaning)
                if target is not None:
                    yield from self._below(target, hop, streams, path, same_object=same_object)
            elif meaning.name == SDPA:
                inputs = [argument(call, shift + i, n) for i, n in enumerate(("query", "key", "value"))]
                kind = self._kind([_streams_of(function, x, step, streams) for x in inputs])
                yield _Leaf((*path, hop), kind, done)
            elif meaning.name.split(".")[-1] in OTHERS and _streams_of(function, call, step, streams):
                name = meaning.name.split(".")[-1]
                yield _Leaf(
                    (*path, hop), f"{name} takes its tensors in a layout that Chipmunk does not know", False, -1
                )
            elif call.args and call.args[0].keyword is None and not call.args[0].star:
                # checkpoint(self.mix, q, k, v): the first argument is what runs.
                inner = self.context.repository.resolve(call.args[0].value, function, step)
                if isinstance(inner, Function):
                    yield from self._below(inner, hop, streams, path, first=1, same_object=True)

    def _below(
        self,
        inner: Function,
        hop: _Hop,
        streams: dict[str, Streams],
        path: tuple[_Hop, ...],
        *,
        first: int = 0,
        same_object: bool,
    ) -> Iterator[_Leaf]:
        if len(path) >= DEPTH or any(h.function is inner for h in (*path, hop)):
            return
        given = bind(inner.node, hop.call, skip=inner.receivers, first=first)
        taken = {n: s for n, v in given.items() if (s := _streams_of(hop.function, v, hop.step, streams))}
        if not taken:
            return
        block_name = None
        if hop.block_name is not None:
            block_name = next((name for name, value in given.items() if dotted(value) == hop.block_name), None)
            if block_name is None and same_object and inner.receivers:
                block_name = inner.scope.receiver
        yield from self.leaves(inner, taken, block_name, (*path, hop))

    def _callee(self, hop: _Hop, meaning: Meaning | None) -> tuple[Function | None, bool]:
        """The repository's function that a call runs, and whether it is a method of the block itself."""
        function, callee = hop.function, hop.call.func
        if isinstance(meaning, Function):
            return meaning, dotted(callee) == f"{hop.block_name}.{meaning.node.name.value}"
        if meaning is not None or function.owner is None:
            return None, False
        attribute, method = self_attribute(callee, function.scope.receiver), "forward"
        if attribute is None and isinstance(callee, cst.Attribute):
            attribute, method = self_attribute(callee.value, function.scope.receiver), callee.attr.value
        for owner in self.context.repository.classes_in(function.owner, attribute) if attribute is not None else ():
            found = self.context.repository.method(owner, method)
            if found is None and method == "forward":
                found = self.context.repository.method(owner, "__call__")
            if found is not None:
                return found, False
        return None, False

    def _kind(self, found: list[Streams]) -> str:
        if all(streams == self.wanted for streams in found):
            return "joint"
        if found[0] and not (found[1] and found[2]):
            return "cross-attention: key and value do not come from the block's streams"
        return "not the joint attention: query, key and value do not all come from all streams of the block"


def _once(leaf: _Leaf, leaves: list[_Leaf]) -> _Leaf:
    """The leaf, or one that must stay dense if a call of the block may run joint attention more than once."""
    if leaf.kind != "joint":
        return leaf
    if any(_in_loop(hop) for hop in leaf.path):
        return _Leaf(leaf.path, "the joint attention is computed piece by piece, in a loop", leaf.done, -1)
    for other in leaves:
        if other is leaf or other.kind != "joint":
            continue
        first, second = next((a, b) for a, b in zip(leaf.path, other.path, strict=False) if a.call is not b.call)
        if not (first.step.excludes(second.step) or second.step.excludes(first.step)):
            return _Leaf(leaf.path, "the block computes joint attention at several places in one call", leaf.done)
    return leaf


def _in_loop(hop: _Hop) -> bool:
    if any(isinstance(node, (cst.For, cst.While)) for node, branch in hop.step.chain if branch == "body"):
        return True
    return any(
        isinstance(node, (cst.BaseComp, cst.Lambda)) and any(inner is hop.call for inner in walk(node))
        for expression in hop.step.expressions
        for node in walk(expression)
    )


def _streams_of(function: Function, value: cst.CSTNode | None, step: Step, streams: dict[str, Streams]) -> Streams:
    roots = function.scope.roots(value, step) if value is not None else frozenset()
    return frozenset().union(*(streams.get(root, frozenset()) for root in roots))


# Changing


def _patch(context: Context, block: Block, leaf: _Leaf, shared: str) -> None:
    """Hand the block down from the last place that knows it to the attention call."""
    path = leaf.path
    known = max(i for i, hop in enumerate(path) if hop.block_name is not None)
    last = path[-1]
    changed = set() if leaf.done else {len(path) - 1}
    if not leaf.done:
        runtime = context.runtime(last.function.source)
        if known == len(path) - 1:
            layer = f'{runtime}.layer({last.block_name}).get("{PARAMETER}")'
        else:
            layer = PARAMETER
        callee = last.function.source.code(last.call.func)
        context.replace(last.function.source, last.call.func, f"{runtime}.attention")
        context.prepend_arguments(last.function.source, last.call, [layer, callee])
    changed |= {index for index in range(known + 1, len(path)) if _add_parameter(context, path[index].function)}
    changed |= {
        index for index in range(known, len(path) - 1) if _hand_down(context, path[index], first=index == known)
    }
    top = path[known]
    what = "joint attention: query, key and value descend from the same streams"
    if last is not top:
        # each end says for itself whether it changes: one of them may have been patched by hand
        report = context.patched if len(path) - 1 in changed else context.already
        report(last.function.source, last.call, f"the attention call itself, reached from {block.forward.name}")
        changed.discard(len(path) - 1)
    if changed:
        context.patched(top.function.source, top.call, what + shared)
    else:
        context.already(top.function.source, top.call, what)


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
