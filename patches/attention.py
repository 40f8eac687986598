"""Send the joint attention of both kinds of block through Chipmunk.

The call that matters is the one of `scaled_dot_product_attention`, or of another library's function for the same
(FlashAttention, xFormers, SageAttention, diffusers' dispatcher, a repository's own that takes the number of heads),
wherever it stands: in the block, in a function that the block calls, in a sub-module or in a processor object. It is
the joint attention if query, key and value all descend from all of the block's streams; attention of one stream alone,
cross-attention, and the same function called from elsewhere (a VAE, dead code) stay as they are. The function that
holds the call gets one more optional parameter, `chipmunk_layer`; the block hands itself down in it, as a keyword that
is absent while Chipmunk is off. A processor object, which users may replace by one of their own, is handed nothing: it
finds the layer through the module that it is given.
"""

from __future__ import annotations

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.joint_attention import ALONE, CROSS, DEPTH, Hop, Leaf, Search, Streams, streams_of
from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, SINGLE, variant
from chipmunk.rewrite.repository import External, Function
from chipmunk.rewrite.roles import Block, Model
from chipmunk.rewrite.syntax import parameters, self_attribute, walk

NAME = "attention"
API = 1
VERSION = "1"

PARAMETER = "chipmunk_layer"


def rule(context: Context) -> None:
    for model in context.models:
        for block in (model.double_block, model.single_block):
            _patch_block(context, model, block)


def _patch_block(context: Context, model: Model, block: Block) -> None:
    forward = block.forward
    streams = {name: frozenset({stream}) for name, stream in block.streams.items()}
    leaves = list(
        Search(context, block, frozenset(block.streams.values())).leaves(forward, streams, block.receiver, None)
    )
    leaves = [_within_reach(_once(leaf, leaves)) for leaf in leaves]
    joint = [leaf for leaf in leaves if leaf.kind == "joint"]
    shared = _shared_with(context, model, block)
    for leaf in joint:
        block.attention = True
        _patch(context, block, leaf, shared)
    for leaf in leaves:
        if leaf.kind != "joint":
            knows = [i for i, hop in enumerate(leaf.path) if hop.block_name or hop.module_name]
            hop = leaf.path[knows[-1] if leaf.at is None else leaf.at]
            context.left_dense(hop.function.source, hop.call, leaf.kind)
    if not joint and all(leaf.kind in (CROSS, ALONE) for leaf in leaves):  # else it was found, and is not fit
        reason = _outside(context, block, streams)
        reason = (
            reason or f"no attention function that is known was found on the joint stream, up to {DEPTH} calls down"
        )
        context.left_dense(forward.source, forward.node.name, reason, matched=forward.name)


def _outside(context: Context, block: Block, streams: dict[str, Streams]) -> str | None:
    """Where the attention is if a module of another package gets all streams, and its class is called after it."""
    scope, wanted = block.forward.scope, frozenset(block.streams.values())
    for call, step in scope.calls:
        attribute = self_attribute(call.func, block.receiver)
        if attribute is None or streams_of(block.forward, call, step, streams) != wanted:
            continue
        for value, method, at in context.repository.values_of(block.owner, attribute):
            made = context.repository.resolve(value.func, method, at) if isinstance(value, cst.Call) else None
            package, _, name = made.name.partition(".") if isinstance(made, External) else ("", "", "")
            if "atten" in name.rpartition(".")[2].lower():
                last = name.rpartition(".")[2]
                return f"it lies in {last} of {package}, outside this repository, or in what processor that is given"
    return None


def _shared_with(context: Context, model: Model, block: Block) -> str:
    """A clause for the report if other models use the block's class too."""
    others = [found.owner.name for found in context.roles.lookalikes if found.owner.name != model.name]
    users = [name for name in dict.fromkeys(others) if _uses(context, name, block)]
    if len(users) > 1:
        return f"; {' and '.join(users)} share the class and stay dense, as their blocks get no state"
    return f"; {users[0]} shares the class and stays dense, as its blocks get no state" if users else ""


def _uses(context: Context, owner: str, block: Block) -> bool:
    found = next(x.owner for x in context.roles.lookalikes if x.owner.name == owner)
    meanings = [context.repository.resolve(name, found.module) for name in found.module.imports]
    return block.owner in meanings or block.owner.module is found.module


def _once(leaf: Leaf, leaves: list[Leaf]) -> Leaf:
    """The leaf, or one that must stay dense if a call of the block may run joint attention more than once."""
    if leaf.kind != "joint":
        return leaf
    if any(_in_loop(hop) for hop in leaf.path):
        return Leaf(leaf.path, "the joint attention is computed piece by piece, in a loop", leaf.done, -1)
    for other in leaves:
        if other is leaf or other.kind != "joint":
            continue
        pairs = zip(leaf.path, other.path, strict=False)
        first, second = next((a, b) for a, b in pairs if a.call is not b.call or a.function is not b.function)
        if other.is_part and not leaf.is_part:
            continue
        # Two objects that may be called at one place are called one at a time.
        if first.function is second.function and not (
            first.step.excludes(second.step)
            or second.step.excludes(first.step)
            or _if_it_fails(first.step, second.step)
        ):
            place = next(i for i, hop in enumerate(leaf.path) if hop is first)
            reason = "the block computes joint attention at several places in one call"
            if leaf.is_part and not other.is_part:
                reason = "attention among some of the tokens, beside that of the others"
            return Leaf(leaf.path, reason, leaf.done, place)
    return leaf


def _if_it_fails(first: Step, second: Step) -> bool:
    """Whether one of them stands where the other's failure is handled: the same is done again, with the same caches."""
    for (node, branch), (other, other_branch) in zip(first.chain, second.chain, strict=False):
        if node is not other:
            return False
        if branch != other_branch:
            handled = [b for b in (branch, other_branch) if b.startswith("handlers")]
            return isinstance(node, cst.Try) and bool(handled) and "finalbody" not in (branch, other_branch)
    return False


def _within_reach(leaf: Leaf) -> Leaf:
    """The leaf, or one that must stay dense if nothing in the functions on the way tells which layer it is."""
    if leaf.kind != "joint" or _named(leaf.path) is not None:
        return leaf
    return Leaf(leaf.path, "what is called may be replaced by something that takes no further keyword", leaf.done)


def _named(path: tuple[Hop, ...]) -> tuple[int, str] | None:
    """The last place on the way that has a name for the block, or for a module of it, from where it is handed down."""
    place, name = max((i, hop.block_name) for i, hop in enumerate(path) if hop.block_name is not None)
    replaceable = [i for i, hop in enumerate(path) if hop.replaceable and i >= place]
    if replaceable:
        modules = [(i, hop.module_name) for i, hop in enumerate(path) if hop.module_name and i > replaceable[-1]]
        return max(modules, default=None)
    return place, name


def _in_loop(hop: Hop) -> bool:
    if any(isinstance(node, (cst.For, cst.While)) for node, branch in hop.step.chain if branch == "body"):
        return True
    return any(
        isinstance(node, (cst.BaseComp, cst.Lambda)) and any(inner is hop.call for inner in walk(node))
        for expression in hop.step.expressions
        for node in walk(expression)
    )


def _patch(context: Context, block: Block, leaf: Leaf, shared: str) -> None:
    """Hand the block down from the last place that knows it to the attention call."""
    path, named = leaf.path, _named(leaf.path)
    assert named is not None
    known, name = named
    last = path[-1]
    changed = set() if leaf.done else {len(path) - 1}
    if not leaf.done:
        runtime = context.runtime(last.function.source)
        if known == len(path) - 1:
            layer = f'{runtime}.layer({name}).get("{PARAMETER}")'
        else:
            layer = PARAMETER
        callee = last.function.source.code(last.call.func)
        context.replace(last.function.source, last.call.func, f"{runtime}.attention")
        context.prepend_arguments(last.function.source, last.call, [layer, callee])
    changed |= {index for index in range(known + 1, len(path)) if _add_parameter(context, path[index].function)}
    changed |= {
        index
        for index in range(known, len(path) - 1)
        if _hand_down(context, path[index], name if index == known else None)
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


def _hand_down(context: Context, hop: Hop, name: str | None) -> bool:
    """`name`: of the block, or the module below it, where it is handed down first."""
    for arg in hop.call.args:
        if arg.keyword is not None and arg.keyword.value == PARAMETER:
            return False
        if arg.star == "**" and context.runtime_call(arg.value, hop.function, hop.step) == "layer":
            return False
    if name is not None:
        text = f"**{context.runtime(hop.function.source)}.layer({name})"
    else:
        text = f"{PARAMETER}={PARAMETER}"
    context.append_argument(hop.function.source, hop.call, text)
    return True


_IMPORT = ("import torch\n", "import chipmunk\nimport torch\n")
_LAYER = ("attend(q, k, v, rotation)", "attend(q, k, v, rotation, **chipmunk.layer(self))")
_CALL = "torch.nn.functional.scaled_dot_product_attention("
_INLINE = variant(DOUBLE, ("attend(q, k, v, rotation)", f"{_CALL}q, k, v).transpose(1, 2).flatten(2)"))

_TRIED = variant(
    ATTENTION,
    ("    x = torch", "    try:\n        x = torch"),
    ("attention(q, k, v)\n", "attention(q, k, v)\n    except RuntimeError:\n"
     "        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)\n"),
)  # fmt: skip

EXAMPLES = (
    Example(
        "tried, and then done again all the same",
        "flow/attention.py",
        variant(_TRIED, ("except RuntimeError", "finally")),
        None,
    ),
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
    Example(
        "another way if the first one fails",
        "flow/attention.py",
        _TRIED,
        variant(
            _TRIED,
            _IMPORT,
            ("v, rotation):", "v, rotation, chipmunk_layer=None):"),
            (f"{_CALL}q, k, v)", f"chipmunk.attention(chipmunk_layer, {_CALL[:-1]}, q, k, v)"),
            (f"{_CALL}q, k, v, d", f"chipmunk.attention(chipmunk_layer, {_CALL[:-1]}, q, k, v, d"),
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
            (
                f"{_CALL}q, k, v).transpose",
                f'chipmunk.attention(\n            chipmunk.layer(self).get("chipmunk_layer"), {_CALL[:-1]}, q, k, v\n'
                "        ).transpose",
            ),
        ),
    ),
)
