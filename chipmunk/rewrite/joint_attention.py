"""Attention calls below a block's forward, and whether they are the joint attention of its streams.

A call is looked for wherever the block's streams go: in the block, in a function that it calls, in a sub-module, in a
processor object. It is the joint attention if query, key and value all descend from all of the streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.objects import Held, held_by
from chipmunk.rewrite.repository import External, Function, Meaning
from chipmunk.rewrite.roles import CONCATENATIONS, Block
from chipmunk.rewrite.syntax import argument, bind, dotted, elements, is_call, parameters, self_attribute

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

CROSS = "cross-attention: key and value do not come from the block's streams"
ALONE = "not the joint attention: query, key and value do not all come from all streams of the block"

Streams = frozenset[str]

_SAME, _BELOW = "same", "below"


@dataclass(frozen=True)
class Hop:
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
class Leaf:
    """An attention call and the way to it."""

    path: tuple[Hop, ...]
    kind: str
    """`joint`, or why it is something else."""
    done: bool
    at: int | None = None
    """Which hop the report is about if it is not the last one that knows the block; -1: the attention call itself."""
    is_part: bool = False
    """Whether query, key and value are all cut out of the joint ones."""


@dataclass(frozen=True)
class Search:
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
        path: tuple[Hop, ...] = (),
        absent: frozenset[str] = frozenset(),
    ) -> Iterator[Leaf]:
        """Attention calls in `function`, and up to DEPTH calls below.

        `streams`: what its parameters hold of them; `absent`: parameters that are not given, and are None.
        """
        for call, step in function.scope.calls:
            hop = Hop(function, call, step, block_name, module_name)
            callee, shift, done = call.func, 0, False
            if self.context.runtime_call(call, function, step) == "attention" and len(call.args) > 2:
                callee, shift, done = call.args[1].value, 2, True
            meaning = self.context.repository.resolve(callee, function, step)
            names = _tensors_of(meaning, call)
            problem = _unfit(meaning)
            if names is not None:
                inputs = [argument(call, shift + i, name) for i, name in enumerate(names)]
                kind, missing = self._kind([streams_of(function, x, step, streams) for x in inputs]), None
                if kind == "joint":
                    missing = _missing(function, inputs[1], step, absent) or _missing(function, inputs[2], step, absent)
                if missing is not None:
                    kind = f"key and value come from {missing} too, which {path[-1].function.name} does not give"
                is_part = all(_is_cut_out(function, x, step) for x in inputs)
                yield Leaf((*path, hop), kind, done, None if missing is None else -1, is_part)
            elif problem is not None:
                if streams_of(function, call, step, streams):
                    yield Leaf((*path, hop), problem, False, -1)
            elif not isinstance(meaning, External):
                yield from self._through(hop, meaning, streams, path)
            elif call.args and call.args[0].keyword is None and not call.args[0].star:
                # checkpoint(self.mix, q, k, v): the first argument is what runs.
                inner = self.context.repository.resolve(call.args[0].value, function, step)
                if isinstance(inner, Function):
                    yield from self._below(inner, hop, streams, path, first=1, receiver=_SAME)

    def _through(
        self, hop: Hop, meaning: Meaning | None, streams: dict[str, Streams], path: tuple[Hop, ...]
    ) -> Iterator[Leaf]:
        """What the repository's functions, methods and objects that a call runs hold of attention calls."""
        function, callee = hop.function, hop.call.func
        if isinstance(meaning, Function):
            own = {f"{name}.{meaning.outline.name}" for name in (hop.block_name, hop.module_name) if name}
            yield from self._below(meaning, hop, streams, path, receiver=_SAME if dotted(callee) in own else "")
            return
        if meaning is not None:
            return
        if isinstance(callee, cst.Attribute) and dotted(callee.value) == hop.block_name != function.receiver:
            inner = self.context.repository.method(self.block.owner, callee.attr.value)
            if inner is not None:  # the block's own method, called by something that was given the block
                yield from self._below(inner, hop, streams, path, receiver=_SAME)
                return
        receiver, held = self._held(hop)
        hop = replace(hop, replaceable=held.replaceable)
        for inner in held.methods:
            yield from self._below(inner, hop, streams, path, receiver=receiver)

    def _held(self, hop: Hop) -> tuple[str, Held]:
        """What the object may be whose attribute is called: `self.attn(…)`, `self.attn.run(…)`, `block.attn(…)`."""
        callee, function = hop.call.func, hop.function
        for name, owner in ((hop.block_name, self.block.owner), (function.receiver, function.owner)):
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
        hop: Hop,
        streams: dict[str, Streams],
        path: tuple[Hop, ...],
        *,
        first: int = 0,
        receiver: str,
    ) -> Iterator[Leaf]:
        """`receiver`: what the receiver of `inner` is, the same object as the caller's, or a module below the block."""
        if len(path) >= DEPTH or any(h.function is inner for h in (*path, hop)):
            return
        given = bind(inner.outline, hop.call, skip=inner.receivers, first=first)
        taken = {n: s for n, v in given.items() if (s := streams_of(hop.function, v, hop.step, streams))}
        if not taken:
            return
        own = inner.receiver if inner.receivers else None
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
            return CROSS
        return ALONE


def _tensors_of(meaning: Meaning | None, call: cst.Call) -> tuple[str, ...] | None:
    """The names of query, key and value if this is a call of an attention function that the runtime knows."""
    name = meaning.name.split(".")[-1] if isinstance(meaning, External) else ""
    if isinstance(meaning, Function):
        given = tuple(meaning.parameters)
        if given[:5] in HEADS and HEADS_OPTION in given:
            return given[:3]
        name = meaning.outline.name
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


def streams_of(function: Function, value: cst.CSTNode | None, step: Step, streams: dict[str, Streams]) -> Streams:
    roots = function.scope.roots(value, step) if value is not None else frozenset()
    return frozenset().union(*(streams.get(root, frozenset()) for root in roots))
