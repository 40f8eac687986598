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

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.minimal import ATTENTION, DOUBLE, SINGLE, variant
from chipmunk.rewrite.objects import Held, held_by
from chipmunk.rewrite.repository import External, Function, Meaning
from chipmunk.rewrite.roles import CONCATENATIONS, Block, Model
from chipmunk.rewrite.syntax import argument, bind, dotted, elements, is_call, parameters, self_attribute, walk

NAME = "attention"
API = 1
VERSION = "1"

PARAMETER = "chipmunk_layer"
DEPTH = 4
SDPA = "torch.nn.functional.scaled_dot_product_attention"
# Attention functions whose layout and options the runtime knows: name → how their signature begins.
KNOWN = {
    "flash_attn_func": ("q", "k", "v", "dropout_p"),
    "memory_efficient_attention": ("query", "key", "value", "attn_bias"),
    "sageattn": ("q", "k", "v", "tensor_layout"),
    "dispatch_attention_fn": ("query", "key", "value", "attn_mask"),
}
# A repository's own function over several of these: it is told the number of heads, and whether they are apart.
HEADS = (("q", "k", "v", "heads", "mask"), ("query", "key", "value", "heads", "mask"))
HEADS_OPTION = "skip_reshape"
# Known, by the name or by all of it, but not handled: why.
OTHERS = {
    "flash_attn_varlen_func": "takes several sequences in one",
    "sageattn_varlen": "takes several sequences in one",
    "flash_attn_interface.flash_attn_func": "may return more than the attention's output",
    "flash_attn.cute.flash_attn_func": "may return more than the attention's output",
    "flex_attention": "takes its mask as a program",
}


_CROSS = "cross-attention: key and value do not come from the block's streams"
_ALONE = "not the joint attention: query, key and value do not all come from all streams of the block"

Streams = frozenset[str]

_SAME, _BELOW = "same", "below"


@dataclass(frozen=True)
class _Hop:
    """One call on the way from the block to the attention."""

    function: Function
    """The function that the call stands in."""
    call: cst.Call
    step: Step
    block_name: str | None
    """The name of the block in this function, `self` in its own methods; None where it is out of reach."""
    module_name: str | None
    """The name of a module right below the block."""
    replaceable: bool = False
    """Whether users may put something else in place of what is called."""


@dataclass(frozen=True)
class _Leaf:
    """An attention call and the way to it."""

    path: tuple[_Hop, ...]
    kind: str
    """`joint`, or why it is something else."""
    done: bool
    at: int | None = None
    """Which hop the report is about if it is not the last one that knows the block; -1: the attention call itself."""
    is_part: bool = False
    """Whether query, key and value are all cut out of the joint ones."""


def rule(context: Context) -> None:
    for model in context.models:
        for block in (model.double_block, model.single_block):
            _patch_block(context, model, block)


def _patch_block(context: Context, model: Model, block: Block) -> None:
    forward = block.forward
    streams = {name: frozenset({stream}) for name, stream in block.streams.items()}
    leaves = list(
        _Search(context, block, frozenset(block.streams.values())).leaves(forward, streams, block.receiver, None)
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
    if not joint and all(leaf.kind in (_CROSS, _ALONE) for leaf in leaves):  # else it was found, and is not fit
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
        if attribute is None or _streams_of(block.forward, call, step, streams) != wanted:
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


# Finding


@dataclass(frozen=True)
class _Search:
    """The search for attention calls below a block's forward. `wanted`: the streams that the block takes."""

    context: Context
    block: Block
    wanted: Streams
    known: dict[tuple[int, str, str | None], Held] = field(default_factory=dict)
    """What was found out of attributes: class (`id`), attribute and method."""

    def leaves(
        self,
        function: Function,
        streams: dict[str, Streams],
        block_name: str | None,
        module_name: str | None,
        path: tuple[_Hop, ...] = (),
        absent: frozenset[str] = frozenset(),
    ) -> Iterator[_Leaf]:
        """Attention calls in `function`, and up to DEPTH calls below.

        `streams`: what its parameters hold of them; `absent`: parameters that are not given, and are None.
        """
        for call, step in function.scope.calls:
            hop = _Hop(function, call, step, block_name, module_name)
            callee, shift, done = call.func, 0, False
            if self.context.runtime_call(call, function, step) == "attention" and len(call.args) > 2:
                callee, shift, done = call.args[1].value, 2, True
            meaning = self.context.repository.resolve(callee, function, step)
            names = _tensors_of(meaning, call)
            problem = _unfit(meaning)
            if names is not None:
                inputs = [argument(call, shift + i, name) for i, name in enumerate(names)]
                kind, missing = self._kind([_streams_of(function, x, step, streams) for x in inputs]), None
                if kind == "joint":
                    missing = _missing(function, inputs[1], step, absent) or _missing(function, inputs[2], step, absent)
                if missing is not None:
                    kind = f"key and value come from {missing} too, which {path[-1].function.name} does not give"
                is_part = all(_is_cut_out(function, x, step) for x in inputs)
                yield _Leaf((*path, hop), kind, done, None if missing is None else -1, is_part)
            elif problem is not None:
                if _streams_of(function, call, step, streams):
                    yield _Leaf((*path, hop), problem, False, -1)
            elif not isinstance(meaning, External):
                yield from self._through(hop, meaning, streams, path)
            elif call.args and call.args[0].keyword is None and not call.args[0].star:
                # checkpoint(self.mix, q, k, v): the first argument is what runs.
                inner = self.context.repository.resolve(call.args[0].value, function, step)
                if isinstance(inner, Function):
                    yield from self._below(inner, hop, streams, path, first=1, receiver=_SAME)

    def _through(
        self, hop: _Hop, meaning: Meaning | None, streams: dict[str, Streams], path: tuple[_Hop, ...]
    ) -> Iterator[_Leaf]:
        """What the repository's functions, methods and objects that a call runs hold of attention calls."""
        function, callee = hop.function, hop.call.func
        if isinstance(meaning, Function):
            own = {f"{name}.{meaning.node.name.value}" for name in (hop.block_name, hop.module_name) if name}
            yield from self._below(meaning, hop, streams, path, receiver=_SAME if dotted(callee) in own else "")
            return
        if meaning is not None:
            return
        if isinstance(callee, cst.Attribute) and dotted(callee.value) == hop.block_name != function.scope.receiver:
            inner = self.context.repository.method(self.block.owner, callee.attr.value)
            if inner is not None:  # the block's own method, called by something that was given the block
                yield from self._below(inner, hop, streams, path, receiver=_SAME)
                return
        receiver, held = self._held(hop)
        hop = replace(hop, replaceable=held.replaceable)
        for inner in held.methods:
            yield from self._below(inner, hop, streams, path, receiver=receiver)

    def _held(self, hop: _Hop) -> tuple[str, Held]:
        """What the object may be whose attribute is called: `self.attn(…)`, `self.attn.run(…)`, `block.attn(…)`."""
        callee, function = hop.call.func, hop.function
        for name, owner in ((hop.block_name, self.block.owner), (function.scope.receiver, function.owner)):
            if name is None or owner is None or not isinstance(callee, cst.Attribute):
                continue
            attribute, method = self_attribute(callee, name), None
            if attribute is None:
                attribute, method = self_attribute(callee.value, name), callee.attr.value
            if attribute is None:
                continue
            key = (id(owner), attribute, method)
            if key not in self.known:
                self.known[key] = held_by(self.context.repository, owner, attribute, method, self.block.owner.module)
            return _BELOW if name == hop.block_name else "", self.known[key]
        return "", Held()

    def _below(
        self,
        inner: Function,
        hop: _Hop,
        streams: dict[str, Streams],
        path: tuple[_Hop, ...],
        *,
        first: int = 0,
        receiver: str,
    ) -> Iterator[_Leaf]:
        """`receiver`: what the receiver of `inner` is, the same object as the caller's, or a module below the block."""
        if len(path) >= DEPTH or any(h.function is inner for h in (*path, hop)):
            return
        given = bind(inner.node, hop.call, skip=inner.receivers, first=first)
        taken = {n: s for n, v in given.items() if (s := _streams_of(hop.function, v, hop.step, streams))}
        if not taken:
            return
        own = inner.scope.receiver if inner.receivers else None
        names: list[str | None] = []
        for known in (hop.block_name, hop.module_name):
            name = next((n for n, value in given.items() if known is not None and dotted(value) == known), None)
            names.append(name or (own if known is not None and receiver == _SAME else None))
        if receiver == _BELOW:
            names[1] = own
        optional = {p.name.value for p in parameters(inner.node) if dotted(p.default) == "None"} - given.keys()
        starred = [arg.value for arg in hop.call.args if arg.star]
        known_stars = [self.context.runtime_call(value, hop.function, hop.step) == "layer" for value in starred]
        absent = frozenset(optional) if all(known_stars) else frozenset()
        yield from self.leaves(inner, taken, names[0], names[1], (*path, hop), absent)

    def _kind(self, found: list[Streams]) -> str:
        if all(streams == self.wanted for streams in found):
            return "joint"
        if found[0] and not (found[1] and found[2]):
            return _CROSS
        return _ALONE


def _tensors_of(meaning: Meaning | None, call: cst.Call) -> tuple[str, ...] | None:
    """The names of query, key and value if this is a call of an attention function that the runtime knows."""
    name = meaning.name.split(".")[-1] if isinstance(meaning, External) else ""
    if isinstance(meaning, Function):
        given = tuple(p.name.value for p in parameters(meaning.node))
        if given[:5] in HEADS and HEADS_OPTION in given:
            return given[:3]
        name = meaning.node.name.value
        return given[:3] if name in KNOWN and given[:4] == KNOWN[name] else None
    if isinstance(meaning, External) and meaning.name == SDPA:
        return ("query", "key", "value")
    if name in KNOWN:
        return KNOWN[name][:3] if _unfit(meaning) is None else None
    keywords = {arg.keyword.value for arg in call.args if arg.keyword is not None}
    return HEADS[0][:3] if HEADS_OPTION in keywords else None


def _missing(function: Function, value: cst.BaseExpression | None, step: Step, absent: frozenset[str]) -> str | None:
    """The parameter that a part of a concatenated value comes from, though it is not given on this way."""
    scope = function.scope
    for call, at in scope.calls_behind(value, step) if value is not None and absent else ():
        if _needs(at, absent) and not _needs(step, absent):
            continue  # it is not concatenated on this way
        parts = elements(call.args[0].value) if is_call(call, *CONCATENATIONS) and call.args else None
        for part in parts or []:
            roots = scope.roots(part, at)
            if roots and roots <= absent:
                return min(roots)
    return None


def _needs(step: Step, absent: frozenset[str]) -> bool:
    """Whether the step runs only where one of these parameters is given: `if keys is not None:`, or `if keys:`."""
    for node, branch in step.chain:
        test, given = node.test if isinstance(node, cst.If) else None, "body"
        if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
            test, given = test.expression, "orelse"
        if isinstance(test, cst.Comparison) and dotted(test.comparisons[0].comparator) == "None":
            given = "body" if isinstance(test.comparisons[0].operator, (cst.IsNot, cst.NotEqual)) else "orelse"
            test = test.left
        if branch == given and dotted(test) in absent:
            return True
    return False


def _is_cut_out(function: Function, value: cst.BaseExpression | None, step: Step) -> bool:
    """Whether the value is `x[:, :, a:b]`, or a variable with that."""
    known = function.scope.reaching(value.value, step) if isinstance(value, cst.Name) else []
    if len(known) == 1 and not known[0].path and known[0].value is not None:
        value = known[0].value
    parts = [part.slice for part in value.slice[1:3]] if isinstance(value, cst.Subscript) else []
    return any(isinstance(part, cst.Slice) and (part.lower or part.upper) is not None for part in parts)


def _unfit(meaning: Meaning | None) -> str | None:
    """Why a function that is known to be attention is not handled."""
    if not isinstance(meaning, External):
        return None
    name = meaning.name.split(".")[-1]
    why = OTHERS.get(meaning.name) or OTHERS.get(name)
    return None if why is None else f"{name} {why}"


def _once(leaf: _Leaf, leaves: list[_Leaf]) -> _Leaf:
    """The leaf, or one that must stay dense if a call of the block may run joint attention more than once."""
    if leaf.kind != "joint":
        return leaf
    if any(_in_loop(hop) for hop in leaf.path):
        return _Leaf(leaf.path, "the joint attention is computed piece by piece, in a loop", leaf.done, -1)
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
            return _Leaf(leaf.path, reason, leaf.done, place)
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


def _within_reach(leaf: _Leaf) -> _Leaf:
    """The leaf, or one that must stay dense if nothing in the functions on the way tells which layer it is."""
    if leaf.kind != "joint" or _named(leaf.path) is not None:
        return leaf
    return _Leaf(leaf.path, "what is called may be replaced by something that takes no further keyword", leaf.done)


def _named(path: tuple[_Hop, ...]) -> tuple[int, str] | None:
    """The last place on the way that has a name for the block, or for a module of it, from where it is handed down."""
    place, name = max((i, hop.block_name) for i, hop in enumerate(path) if hop.block_name is not None)
    replaceable = [i for i, hop in enumerate(path) if hop.replaceable and i >= place]
    if replaceable:
        modules = [(i, hop.module_name) for i, hop in enumerate(path) if hop.module_name and i > replaceable[-1]]
        return max(modules, default=None)
    return place, name


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


def _hand_down(context: Context, hop: _Hop, name: str | None) -> bool:
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
