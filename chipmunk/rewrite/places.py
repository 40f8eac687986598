"""What a model does to image tokens by where they lie, and what its blocks keep: no other order, no skipped steps.

Attention, norms and linear layers treat all tokens alike. A convolution over the image, a roll, a positional table of
the model's own or a mask that it makes do not; nor do features that a block keeps on itself for a later call, which
may have another order. What blocks keep for later, there or in a dictionary, would be missing had they been skipped.
The functions that the model's forward and its blocks run are read for these.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.flow import Step, value_names
from chipmunk.rewrite.objects import held_by
from chipmunk.rewrite.processors import set_later
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository
from chipmunk.rewrite.syntax import (
    argument,
    bind,
    dotted,
    integer,
    is_call,
    last_name,
    self_attribute,
    text_of_string,
    walk,
)
from chipmunk.rewrite.token_axis import (
    along_tokens,
    elements_read,
    is_alike_for_all,
    is_fixed_slice,
    is_for_maps,
    is_torch_function,
    own_attribute,
    stored,
    takes_apart,
)

_DEPTH = 6
_NEIGHBOURS = re.compile(
    r"(Lazy)?(Conv(Transpose)?|(Adaptive)?(Avg|Max)Pool|LPPool|(Reflection|Replication|Zero|Constant|Circular)Pad)[123]d"
    r"|Upsample(NearestBilinear)?(2d)?|Pixel(Uns|S)huffle|Unfold|Fold"
)
"""Layers of torch that mix neighbours."""
_MOVES = {"roll": "dims", "flip": "dims", "cumsum": "dim", "cumprod": "dim", "logcumsumexp": "dim", "cummax": "dim"}
"""Functions that go along an axis, and what the axis is called."""
_MIXES = re.compile(r"(conv(_transpose)?|(adaptive_)?(avg|max)_pool)[123]d|interpolate|unfold|fold|pixel_(un)?shuffle")
_PARTS = ("chunk", "tensor_split")
_TABLES = ("Parameter", "Buffer")
_REDUCED = ("max", "amax", "min", "mean", "sum", "norm", "std", "item", "len")
_MASKS = ("attn_mask", "attn_bias", "mask", "attention_mask")


@dataclass(frozen=True)
class Entry:
    """A function that gets image tokens. `objects`: parameters of which the class is known."""

    function: Function
    tokens: frozenset[str]
    objects: tuple[tuple[str, Class], ...] = ()
    made: frozenset[str] = frozenset()
    """Parameters that get what the model makes of nothing that it is given: a mask, say."""
    numbers: frozenset[str] = frozenset()
    """Parameters that may get a number of tokens other than that of the text: one written out, or the model's own."""


@dataclass(frozen=True)
class Found:
    """Something that a function does to tokens, in words."""

    reason: str
    by_place: bool = True
    """Whether it goes by where tokens lie."""
    keeps: bool = False
    """Whether it keeps them for later calls."""
    given: frozenset[str] = frozenset()
    """Where it keeps them in something that it was given: the name, and the keys. Others may read them there."""


@dataclass(eq=False)
class _Reader:
    repository: Repository
    builder: Module
    seen: set[Entry] = field(default_factory=set)

    def read(self, entry: Entry, depth: int = 0) -> Iterator[Found]:
        if entry in self.seen or depth > _DEPTH:
            return
        self.seen.add(entry)
        function = entry.function
        objects = dict(entry.objects)
        grown: set[str] = set()
        for step in function.scope.steps:
            yield from self._kept(entry, step, grown)
            for expression in step.expressions:
                for node in walk(expression):
                    if isinstance(node, cst.BinaryOperation):
                        yield from self._table(entry, node, step)
                    elif (
                        isinstance(node, cst.Subscript)
                        and is_fixed_slice(node)
                        and self._holds(entry, node.value, step)
                    ):
                        yield Found(f"{function.name} goes by where tokens lie (a slice at a fixed place)")
                    elif isinstance(node, cst.Subscript) and (number := self._cut_at(entry, node, step)) is not None:
                        yield Found(
                            f"{function.name} goes by where tokens lie (a slice at {number}, which it is given)"
                        )
        for call, step in function.scope.calls:
            yield from self._by_name(entry, call, step)
            yield from self._through(entry, call, step, objects, depth)

    # What stands here

    def _holds(self, entry: Entry, node: cst.CSTNode | None, step: Step) -> bool:
        return node is not None and bool(entry.function.scope.roots(node, step) & entry.tokens)

    def _cut_at(self, entry: Entry, node: cst.Subscript, step: Step) -> str | None:
        """The number that is given to the function and at which it cuts the tokens' axis: `keys[:, :, start:end]`."""
        parts = [part.slice for part in node.slice[1:3]] if entry.numbers else []
        for cut in [part for part in parts if isinstance(part, cst.Slice)]:
            for edge in (cut.lower, cut.upper):
                given = _plain_roots(entry, edge, step) & entry.numbers
                if given and self._holds(entry, node.value, step):
                    return min(given)
        return None

    def _by_name(self, entry: Entry, call: cst.Call, step: Step) -> Iterator[Found]:
        name, function = last_name(call.func), entry.function
        subject: cst.BaseExpression | None = call.func.value if isinstance(call.func, cst.Attribute) else None
        shift = 0
        if subject is None or not self._holds(entry, subject, step):
            subject, shift = (call.args[0].value if call.args else None), 1
        where = f"{function.name} goes by where tokens lie"
        if name in _MOVES and self._holds(entry, subject, step):
            place = shift + (1 if name == "roll" else 0)
            if along_tokens(argument(call, place, _MOVES[name]), call):
                yield Found(f"{where} ({name})")
        elif name in _PARTS and self._holds(entry, subject, step):
            if integer(argument(call, shift + 1, "dim")) in (1, -2) and integer(argument(call, shift, "chunks")):
                yield Found(f"{where} ({name})")
        elif _MIXES.fullmatch(name) and self._holds(entry, subject, step):
            meaning = self.repository.resolve(call.func, function, step)
            if shift == 0 or isinstance(meaning, External):
                yield Found(f"{where} ({name})")
        elif takes_apart(name, call) and not is_for_maps(step) and self._holds(entry, subject, step):
            yield Found(f"{where} ({name})")
        elif self._makes_mask(entry, call, step):
            yield Found(f"{function.name} computes attention with a mask of the model's own")

    def _makes_mask(self, entry: Entry, call: cst.Call, step: Step) -> bool:
        masks = [arg.value for arg in call.args if arg.keyword is not None and arg.keyword.value in _MASKS]
        meaning = self.repository.resolve(call.func, entry.function, step) if masks or len(call.args) > 3 else None
        if not isinstance(meaning, External) or "attention" not in meaning.name.lower():
            return False
        given = call.args[2:] if meaning.name == "chipmunk.attention" else call.args
        masks += [arg.value for arg in given[3:4] if arg.keyword is None and not arg.star]
        if not any(self._holds(entry, arg.value, step) for arg in given[:3]):
            return False
        return any(self.is_made(entry, mask, step) for mask in masks)

    def is_made(self, entry: Entry, node: cst.BaseExpression, step: Step) -> bool:
        """Whether a value is a tensor that comes from nothing that the model is given."""
        scope = entry.function.scope
        roots = scope.roots(node, step)
        if roots & entry.made:
            return True
        others = roots - {scope.receiver} if entry.function.receivers else roots
        if others or dotted(node) in ("None", "True", "False") or isinstance(node, cst.SimpleString):
            return False
        if any(is_torch_function(dotted(call.func)) for call, _ in scope.calls_behind(node, step)):
            return True
        owner = entry.function.owner
        names = [name for name in _names_behind(entry, node, step) if name is not None]
        return owner is not None and any(self._is_tensor(owner, name) for name in names)

    def _is_tensor(self, owner: Class, attribute: str) -> bool:
        made = self._callees(owner, attribute)
        return any(
            is_torch_function(ast_nodes.dotted(callee)) or ast_nodes.last_name(callee) in _TABLES for callee in made
        ) or bool(list(self._registered(owner, attribute)))

    def _callees(self, owner: Class, attribute: str) -> list[ast.expr]:
        """What is called in the expressions that are assigned to an attribute; told without their trees."""
        return [callee for value, *_ in self.repository.assigned(owner, attribute) for callee in _called(value)]

    def _table(self, entry: Entry, node: cst.BinaryOperation, step: Step) -> Iterator[Found]:
        """`image + self.positions`: a tensor of the model's own, with a row for each token."""
        owner = entry.function.owner
        if owner is None or not isinstance(node.operator, (cst.Add, cst.Subtract, cst.Multiply)):
            return
        for own, other in ((node.left, node.right), (node.right, node.left)):
            name = own_attribute(own, entry.function.scope.receiver)
            if name is not None and self._has_rows(owner, name) and self._holds(entry, other, step):
                own_name = f"{entry.function.scope.receiver}.{name}"
                yield Found(f"{entry.function.name} adds {own_name} to the tokens, row by row")

    def _has_rows(self, owner: Class, attribute: str) -> bool:
        """Whether the attribute is a parameter or buffer of which the last axis but one may be the tokens'."""
        tables = [*self._registered(owner, attribute)]
        if any(ast_nodes.last_name(callee) in _TABLES for callee in self._callees(owner, attribute)):
            values = [value for value, *_ in self.repository.values_of(owner, attribute)]
            tables += [call.args[0].value for call in values if is_call(call, *_TABLES) and call.args]
        return any(not is_alike_for_all(table) for table in tables)

    def _registered(self, owner: Class, attribute: str) -> Iterator[cst.BaseExpression]:
        for current in self.repository.bases(owner):
            for method in current.methods.values():
                if "register_buffer" in method.words or "register_parameter" in method.words:
                    for call, _ in method.scope.calls:
                        named = is_call(call, "register_buffer", "register_parameter") and len(call.args) > 1
                        if named and text_of_string(call.args[0].value) == attribute:
                            yield call.args[1].value

    def _kept(self, entry: Entry, step: Step, grown: set[str]) -> Iterator[Found]:
        """`self.bank = keys`, `info["keys"].append(keys)`: what a later call may read.

        grown: names of the function's own dictionaries and lists that tokens were put into before.
        """
        for place, keys, value in stored(step):
            held = self._holds(entry, value, step) or not grown.isdisjoint(value_names(value))
            if not held or _is_number(entry, value, step):
                continue
            name = dotted(place) or ""
            if self._is_own(entry, place):
                yield Found(f"{entry.function.name} keeps what it computes in {name}", keeps=True)
            elif self._is_given(entry, name, step):
                reason = f"{entry.function.name} keeps what it computes in {name}"
                yield Found(reason, by_place=False, keeps=True, given=keys | {name})
            elif name and self._is_foreign(entry, name):
                reason = f"{entry.function.name} keeps what it computes in {name}, which is not its own"
                yield Found(reason, keeps=True)
            elif isinstance(place, cst.Name):
                grown.add(name)

    def _is_given(self, entry: Entry, name: str, step: Step) -> bool:
        """Whether it is something that the function was given, no tensor: `info`, or `kwargs["info"]`."""
        scope = entry.function.scope
        star = scope.function.params.star_kwarg
        seen: set[str] = set()
        pending = [name.partition(".")[0]]
        while pending:
            each = pending.pop()
            if each in seen or each in entry.tokens:
                continue
            seen.add(each)
            bindings = scope.reaching(each, step)
            values = [binding.value for binding in bindings if not binding.path]
            # `hidden_states = []` is another thing under a parameter's name
            is_new = scope.is_definite(bindings, step) and all(_is_made_here(value) for value in values)
            if each in scope.parameters[entry.function.receivers :] and not is_new:
                return True
            if star is not None and each == star.name.value:
                return True
            pending += [
                n.value
                for v in values
                if v is not None and not self._makes_tokens(entry, v, step)
                for n in walk(v)
                if isinstance(n, cst.Name)
            ]
        return False

    def _is_foreign(self, entry: Entry, name: str) -> bool:
        """Whether it is none of the function's variables: a list of the file's, say, or an attribute of a class."""
        scope, first = entry.function.scope, name.partition(".")[0]
        star = scope.function.params.star_kwarg
        return not (
            first in scope.bindings or first in scope.parameters or (star is not None and first == star.name.value)
        )

    def is_read_back(self, given: frozenset[str]) -> bool:
        """Whether a function beside those that were read takes out what they keep, by one of these names and keys."""
        modules = dict.fromkeys(entry.function.module for entry in self.seen)
        words = [name.encode() for name in given]
        functions = (f for module in modules for f in module.all_functions() if any(word in f.text for word in words))
        return any(
            not given.isdisjoint(keys) for f in functions for step in f.scope.steps for keys in elements_read(step)
        )

    def _makes_tokens(self, entry: Entry, value: cst.CSTNode, step: Step) -> bool:
        """Whether a value is what a call makes of tokens: another tensor, nothing that was given."""
        if not isinstance(value, cst.Call):
            return False
        subject = [value.func.value] if isinstance(value.func, cst.Attribute) else []  # a method of the tensor
        return any(self._holds(entry, part, step) for part in (*subject, *(arg.value for arg in value.args)))

    def _is_own(self, entry: Entry, node: cst.BaseExpression) -> bool:
        """Whether it is an attribute of the function's own object, or of a module that it is given."""
        own = {name for name, _ in entry.objects} | (
            {entry.function.scope.receiver} if entry.function.receivers else set()
        )
        return isinstance(node, cst.Attribute) and (dotted(node) or "").partition(".")[0] in own

    # What is called

    def _through(
        self, entry: Entry, call: cst.Call, step: Step, objects: dict[str, Class], depth: int
    ) -> Iterator[Found]:
        if not any(self._holds(entry, arg.value, step) for arg in call.args):
            return
        for first, callee in enumerate([call.func, *(arg.value for arg in call.args[:1] if arg.keyword is None)]):
            if first and (isinstance(callee, cst.Call) or last_name(call.func) != "checkpoint"):
                continue
            for inner, own in self._run(entry, callee, step, objects):
                if isinstance(inner, str):
                    yield Found(f"{entry.function.name} mixes neighbours ({inner})")
                    continue
                given = bind(inner.outline, call, skip=inner.receivers, first=first)
                tokens = frozenset(n for n, value in given.items() if self._holds(entry, value, step))
                if not tokens:
                    continue
                made = frozenset(n for n, value in given.items() if self.is_made(entry, value, step))
                known = {n: objects[name] for n, v in given.items() if (name := dotted(v)) in objects}
                if inner.receivers and own is not None:
                    known[inner.receiver] = own
                numbers = frozenset(n for n, v in given.items() if is_number(entry, v, step, entry.numbers))
                below = Entry(inner, tokens, tuple(sorted(known.items(), key=_first)), made, numbers)
                yield from self.read(below, depth + 1)

    def _run(
        self, entry: Entry, callee: cst.BaseExpression, step: Step, objects: dict[str, Class]
    ) -> Iterator[tuple[Function | str, Class | None]]:
        """The functions that a call runs, each with its receiver's class; the name of a layer that mixes neighbours."""
        function, repository = entry.function, self.repository
        meaning = repository.resolve(callee, function, step)
        if isinstance(meaning, Function):
            yield meaning, meaning.owner
            return
        if meaning is not None or not isinstance(callee, cst.Attribute):
            return
        for name, owner in objects.items():
            attribute, run = self_attribute(callee, name), None
            if attribute is None:
                attribute, run = self_attribute(callee.value, name), callee.attr.value
            if attribute is None:
                continue
            method = repository.method(owner, attribute) if run is None else None
            if method is not None:
                yield method, owner
                continue
            for made in self._callees(owner, attribute):
                if _NEIGHBOURS.fullmatch(ast_nodes.last_name(made)):
                    yield ast_nodes.last_name(made), None
            for inner in held_by(repository, owner, attribute, run, self.builder).methods:
                yield inner, inner.owner
            for inner in set_later(repository, owner, attribute) if run is None else ():
                yield inner, inner.owner


def read(repository: Repository, whole: Entry, blocks: Iterable[Entry], builder: Module) -> tuple[str, str]:
    """What goes by where tokens lie, in the model's forward and in what it runs; what its blocks keep for later.

    Both empty if nothing is known to. builder: the file of the blocks.
    """
    reader = _Reader(repository, builder)
    found = list(reader.read(whole))
    below = [each for entry in blocks for each in reader.read(entry)]
    placed = next((each.reason for each in (*found, *below) if each.by_place), "")
    if not placed:
        seen = (each.reason for each in below if each.given and not reader.is_read_back(each.given))
        placed = next((f"{reason}, which others may read" for reason in seen), "")
    return placed, next((each.reason for each in below if each.keeps), "")


def _is_number(entry: Entry, value: cst.CSTNode, step: Step) -> bool:
    """Whether a value is computed from one number for all tokens: `x.abs().max()`."""
    calls = [call for call, _ in entry.function.scope.calls_behind(value, step) if last_name(call.func) in _REDUCED]
    return any(len(call.args) == (0 if _is_method(call) else 1) for call in calls)


def _is_method(call: cst.Call) -> bool:
    return isinstance(call.func, cst.Attribute) and dotted(call.func.value) not in ("torch", "np", "numpy", "math")


def _is_made_here(value: cst.CSTNode | None) -> bool:
    """Whether a value is a display of a list or a dictionary, or what a function of torch gives."""
    if isinstance(value, cst.Call):
        return is_torch_function(dotted(value.func))
    return isinstance(value, (cst.List, cst.Dict))


def is_made(repository: Repository, entry: Entry, node: cst.BaseExpression, step: Step) -> bool:
    """Whether an argument is made of nothing that the model is given."""
    return _Reader(repository, entry.function.module).is_made(entry, node, step)


def is_number(entry: Entry, node: cst.BaseExpression, step: Step, numbers: frozenset[str]) -> bool:
    """Whether an argument may be a number of tokens: one that is written out, or comes from one of `numbers`."""
    return bool(integer(node)) or bool(_plain_roots(entry, node, step) & numbers)


def _plain_roots(entry: Entry, node: cst.CSTNode | None, step: Step) -> frozenset[str]:
    """The parameters that a value is, or is added up from: `start` and `count` behind `end = start + count`."""
    scope, found = entry.function.scope, set[str]()
    if isinstance(node, cst.BinaryOperation):
        return _plain_roots(entry, node.left, step) | _plain_roots(entry, node.right, step)
    if isinstance(node, cst.Name):
        bindings = scope.reaching(node.value, step)
        for binding in [binding for binding in bindings if not binding.path]:
            found |= _plain_roots(entry, binding.value, binding.step)
        if node.value in scope.parameters and not scope.is_definite(bindings, step):
            found.add(node.value)
    return frozenset(found)


def _called(node: ast.AST) -> Iterator[ast.expr]:
    """What is called in an expression, in the order of the text."""
    if isinstance(node, ast.Call):
        yield node.func
    for part in ast.iter_child_nodes(node):
        yield from _called(part)


def _first(item: tuple[str, Class]) -> str:
    return item[0]


def _names_behind(entry: Entry, node: cst.CSTNode, step: Step) -> Iterator[str | None]:
    scope = entry.function.scope
    for name in value_names(node):
        yield _attribute_of(name, scope.receiver)
        for binding in scope.reaching(name, step):
            if binding.value is not None and not binding.path:
                yield from (_attribute_of(n, scope.receiver) for n in value_names(binding.value))


def _attribute_of(name: str, receiver: str) -> str | None:
    head, _, rest = name.partition(".")
    return rest if head == receiver and rest and "." not in rest else None
