"""Which class is a FLUX model: told by what its forward does with two lists of blocks, not by any name.

A model iterates one list whose elements turn two streams into two, concatenates these, iterates a second list whose
elements turn the joint stream into one, and slices one stream off. That stream is the image. In some, the blocks of the
second list concatenate the streams themselves, and give both back: the image is the one that the result comes from. And
there the first list may be one for each stream, whose elements turn one stream into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.candidates import may_hold_model, may_run_blocks
from chipmunk.rewrite.flow import Scope
from chipmunk.rewrite.handed import work_of
from chipmunk.rewrite.image_tokens import image_parameter
from chipmunk.rewrite.passes import (
    BY_NAME,
    CONCATENATIONS,
    Pass,
    Streams,
    first_names,
    joined,
    joined_inside,
    may_join,
    passes,
)
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository
from chipmunk.rewrite.syntax import (
    argument,
    bind,
    dotted,
    integer,
    is_call,
    last_name,
    self_attribute,
    walk,
)
from chipmunk.rewrite.token_order import Order, order_of


@dataclass(eq=False)
class Block:
    """One of the model's two kinds of block. What the patches make of it is written into the last fields."""

    owner: Class
    forward: Function
    streams: dict[str, str]
    """Parameters of forward that take a stream: name → `image`, `text` or `joint`."""
    receiver: str = ""
    """The block's name in forward: `self`, or what a function that the model hands the block to calls it."""
    attention: bool = False
    mlp: str | None = None
    linear_in: str | None = None
    linear_out: str | None = None
    gated: bool = False
    mlp_first_in: bool = False
    mlp_first_out: bool = False
    mlp_alone: bool = False
    run: str = ""
    """The method that the model calls, where it does not call the block itself."""
    is_handed: bool = field(init=False)
    """Whether the work is done outside the block, by what it is handed to."""

    def __post_init__(self) -> None:
        self.is_handed = bool(self.receiver)
        self.receiver = self.receiver or self.forward.receiver


@dataclass(eq=False)
class Model:
    """A model and the roles of its parts."""

    owner: Class
    forward: Function
    double: str
    """Attribute with the first list of blocks, dotted where it lies in a dictionary (`lists.image`)."""
    single: str
    double_block: Block
    single_block: Block
    image: str
    find_order: Callable[[], Order]

    @property
    def name(self) -> str:
        return self.owner.name

    @cached_property
    def order(self) -> Order:
        """Whether image tokens may be put into another order. Much is read for it, and not before it is asked for."""
        return self.find_order()


@dataclass(frozen=True)
class Lookalike:
    """A class that iterates blocks, but is no model that can be handled."""

    owner: Class
    at: Class | Function
    reason: str


@dataclass(eq=False)
class Roles:
    models: list[Model] = field(default_factory=list)
    lookalikes: list[Lookalike] = field(default_factory=list)


def find_roles(repository: Repository) -> Roles:
    """Every model of the repository, in the order of paths and lines."""
    roles = Roles()
    for path in repository.files_where(may_hold_model):
        module = repository.module(path)
        if module is None:
            continue
        for owner in module.duplicates:
            roles.lookalikes.append(
                Lookalike(owner, owner, f"a later class {owner.name} in the same file replaces this one")
                if any(len(passes(method.scope)) > 1 for method in owner.methods.values())
                else Lookalike(owner, owner, "")
            )
        for owner in module.classes.values():
            methods = sorted(owner.methods.values(), key=lambda method: method.outline.name != "forward")
            for method in methods:
                found = _model(repository, owner, method)
                if isinstance(found, Model):
                    roles.models.append(found)
                    roles.lookalikes += _other_ways(found, methods)
                    break
                if isinstance(found, Lookalike):
                    roles.lookalikes.append(found)
        for function in [f for f in module.functions.values() if may_run_blocks(f.text) and may_join(f.statements)]:
            classes = _given_first(repository, function)
            if len(classes) == 1:  # the model's work in a function that is given the model
                found = _model(repository, classes[0], function)
                if isinstance(found, Model):
                    roles.models.append(found)
            elif classes:
                names = " and ".join(c.name for c in classes)
                reason = f"which of {names} {function.name} in {path} is given is not known: annotate its parameter"
                roles.lookalikes.append(Lookalike(classes[0], classes[0], reason))
    roles.lookalikes = [x for x in roles.lookalikes if x.reason]
    _leave_borrowers(roles)
    return roles


def _other_ways(model: Model, methods: list[Function]) -> Iterator[Lookalike]:
    """The methods of a model's class that go through its blocks too: the one that is marked must do all of a call."""
    for method in methods[methods.index(model.forward) + 1 :]:
        says = may_run_blocks(method.text) and {model.double.split(".")[0], model.single.split(".")[0]} <= method.words
        if says and {model.double, model.single} <= {p.attribute for p in passes(method.scope)}:
            reason = f"{method.name} runs the blocks too: only the calls of {model.forward.name} are sparse"
            yield Lookalike(model.owner, method, reason)


def _given_first(repository: Repository, function: Function) -> list[Class]:
    """The class of what a function is given first: its annotation, or the file's classes with the lists it iterates."""
    first = function.signature[:1]
    annotation = first[0].annotation if first else None
    if annotation is not None:
        meaning = repository.resolve(ast_nodes.dotted(annotation), function.module)
        if isinstance(meaning, Class):
            return [meaning]
    lists = {found.attribute.split(".")[0] for found in passes(function.scope)} if first else set()
    if len(lists) < 2:
        return []
    known = (repository.resolve(name, function.module) for name in (*function.module.classes, *function.module.imports))
    classes = dict.fromkeys(found for found in known if isinstance(found, Class))
    return [found for found in classes if all(repository.classes_in(found, name) for name in lists)]


def _leave_borrowers(roles: Roles) -> None:
    """Of models that share a class of block, only those nearest to it are the class's own: others stay dense."""
    for model in list(roles.models):
        for block in (model.double_block, model.single_block):
            owner = min(
                (m for m in roles.models if block.owner in (m.double_block.owner, m.single_block.owner)),
                key=lambda m: _distance(m.owner.module.path, block.owner.module.path),
            )
            if _distance(owner.owner.module.path, block.owner.module.path) < _distance(
                model.owner.module.path, block.owner.module.path
            ):
                reason = f"it borrows the class {block.owner.name} from {owner.name}, and stays dense"
                roles.lookalikes.append(Lookalike(model.owner, model.forward, reason))
                roles.models.remove(model)
                break


def _distance(path: str, other: str) -> int:
    """How many folders lie between two files; 0 for one and the same."""
    first, second = path.split("/"), other.split("/")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return len(first) + len(second) - 2 * shared


def _model(repository: Repository, owner: Class, method: Function) -> Model | Lookalike | None:
    if not may_run_blocks(method.text) or not may_join(method.statements):
        return None
    scope = method.scope
    found = passes(scope)
    attributes = list(dict.fromkeys(p.attribute for p in found))
    if len(attributes) < 2:
        return None
    for find in (joined, joined_inside):
        for double in found:
            for single in found:
                if single.attribute != double.attribute and single.step.index > double.step.index:
                    streams = find(scope, double, single)
                    if streams is not None:
                        return _with_roles(repository, owner, method, double, single, streams)
    for double in found:
        taken = {dotted(arg.value) for arg in double.given}
        later = [p for p in found if p.attribute != double.attribute and _is_made_between(scope, double, p)]
        if later and len(double.results) == 2 and taken.issuperset(double.results):
            lists = f"self.{double.attribute}, and then through self.{later[0].attribute}"
            reason = f"it goes through {lists}; how the streams are joined, or which is the image, is not understood"
            return Lookalike(owner, method, reason)
    return None


def _is_made_between(scope: Scope, double: Pass, single: Pass) -> bool:
    """Whether the second loop's blocks are given something that is made after the first loop: the joint stream."""
    between = range(double.step.index + 1, single.step.index)
    names = [dotted(arg.value) or "" for arg in single.given]
    made = [b.step for name in names for b in scope.bindings.get(name, ()) if b.step.index in between]
    return any(double.loop not in step.loops and step.node is not single.loop for step in made)


def _with_roles(
    repository: Repository, owner: Class, method: Function, double: Pass, single: Pass, streams: Streams
) -> Model | Lookalike:
    scope = method.scope
    if streams.place == -1:
        reason = "it runs both kinds of block, but slices no image stream off at the end (a ControlNet, perhaps)"
        if _joins_first_axis(scope, streams):
            reason = "its tokens lie along the first axis, (L, B, C): not handled"
        return Lookalike(owner, method, reason)
    blocks: list[Block] = []
    outside = {name: role for name, role in ((streams.image, "image"), (streams.text, "text")) if name}
    for found, roles in ((double, outside), (single, streams.inside)):
        is_method = isinstance(found.call.func, cst.Attribute) and not found.first
        name = last_name(found.call.func) if is_method else "forward"
        classes = repository.classes_in(owner, found.attribute.split(".")[0], name)
        if not classes:
            elsewhere = _elsewhere(repository, owner, found.attribute.split(".")[0])
            reason = f"the class of the blocks in self.{found.attribute} was not found"
            if isinstance(elsewhere, Class):
                reason = f"the blocks in self.{found.attribute} are {elsewhere.name}'s, which has no {name}"
            elif elsewhere is not None:
                reason = f"the blocks in self.{found.attribute} are {elsewhere}'s, which is no code of this repository"
            if repository.unreadable:
                reason += f"; it may be in a file that could not be read: {', '.join(sorted(repository.unreadable))}"
            return Lookalike(owner, method, reason)
        if len(classes) > 1:
            names = " and ".join(c.name for c in classes)
            return Lookalike(owner, method, f"self.{found.attribute} may hold blocks of several classes: {names}")
        if found.first == BY_NAME:
            work = work_of(repository, classes[0], method, found, roles)
            if work is None:
                does = f"{dotted(found.call.func)} does the work of the blocks in self.{found.attribute}"
                return Lookalike(owner, method, f"{does}: it is not followed")
            if work[0] is repository.method(classes[0], "forward"):
                work = (*_followed(repository, classes[0], *work[:2]), "")
            blocks.append(Block(classes[0], *work))
            continue
        forward = repository.method(classes[0], name) or repository.method(classes[0], "forward")
        if forward is None:
            return Lookalike(owner, method, f"{classes[0].name} has no forward")
        given = bind(forward.outline, found.call, skip=1, first=_leading(repository, method, found))
        taken = {p: roles[n] for p, value in given.items() if (n := _stream_of(value, roles)) is not None}
        run = forward.outline.name if is_method else ""
        blocks.append(Block(classes[0], *_followed(repository, classes[0], forward, taken), run=run))
    if len(set(blocks[0].streams.values())) < len(outside):
        starred = [arg.value for arg in double.call.args if arg.star == "*" and dotted(arg.value) is not None]
        reason = f"{blocks[0].owner.name} does not take both streams"
        if starred:
            reason = f"what {blocks[0].owner.name} is given, *{dotted(starred[0])}, is not followed"
        return Lookalike(owner, method, _several(scope, double) or reason)
    if not blocks[1].streams:
        reason = f"{blocks[1].owner.name} does not take the joint stream"
        return Lookalike(owner, method, _several(scope, single) or reason)
    image, others = image_parameter(scope, streams.image, double)
    if image is None:
        return Lookalike(owner, method, "the image stream does not come from a parameter of this method")
    if streams.text:  # the text is no property of single image tokens
        others -= {image_parameter(scope, streams.text, double)[0] or ""}
    order = partial(order_of, repository, method, image, others, blocks, (double, single), streams)
    return Model(owner, method, double.attribute, single.attribute, blocks[0], blocks[1], image, order)


def _joins_first_axis(scope: Scope, streams: Streams) -> bool:
    """Whether image and text are concatenated along the first axis."""
    joined = [call for call, _ in scope.calls if is_call(call, *CONCATENATIONS) and call.args]
    return any(
        {streams.image, streams.text} == set(first_names(call)) and integer(argument(call, 1, "dim")) == 0
        for call in joined
    )


def _several(scope: Scope, found: Pass) -> str:
    """In words, that a round of the loop calls its block more than once; else empty."""
    others = [p for p in passes(scope) if p.loop is found.loop and p.step is not found.step]
    if all(p.step.excludes(found.step) or found.step.excludes(p.step) for p in others):
        return ""
    return f"each block in self.{found.attribute} is called at several places, one after the other"


def _elsewhere(repository: Repository, owner: Class, attribute: str) -> Class | str | None:
    """The class that a list's elements are of, `nn.ModuleList([Block(…) for …])`; one of another package by its name.

    Where the list is made in a class of another package that the owner inherits from, that class.
    """
    for value, method, step in repository.values_of(owner, attribute):
        for call in walk(value):
            if is_call(call) and last_name(call.func) not in ("ModuleList", "Sequential", "range"):
                meaning = repository.resolve(call.func, method, step)
                if isinstance(meaning, (Class, External)):
                    return meaning if isinstance(meaning, Class) else meaning.name
    if not repository.values_of(owner, attribute):
        bases = [base for c in repository.bases(owner) for base in c.outline.bases]
        above = [repository.resolve(ast_nodes.dotted(base), owner.module) for base in bases]
        inherited = [m.name for m in above if isinstance(m, External) and not m.name.startswith("torch")]
        return inherited[0] if inherited else None
    return None


def _leading(repository: Repository, method: Function, found: Pass) -> int:
    """Leading arguments of the call that are not the block's: `run(block, flag, x)` where `run(f, flag, *args)`."""
    if not found.first:
        return 0
    wrapper = repository.resolve(found.call.func, method, found.step)
    if isinstance(wrapper, Function) and wrapper.outline.args.vararg is not None:
        named = len(wrapper.outline.args.posonlyargs) + len(wrapper.outline.args.args) - wrapper.receivers
        given = next((i for i, arg in enumerate(found.call.args) if arg.keyword is not None), len(found.call.args))
        return min(named, given)
    return found.first


def _followed(
    repository: Repository, owner: Class, forward: Function, streams: dict[str, str]
) -> tuple[Function, dict[str, str]]:
    """The method that does the block's work, where forward hands on to it: `return checkpoint(self._forward, x)`."""
    for step in forward.scope.steps:
        if not isinstance(step.node, cst.Return) or not isinstance(step.node.value, cst.Call):
            continue
        call = step.node.value
        for first, callee in enumerate([call.func, *(arg.value for arg in call.args[:1])]):
            name = self_attribute(callee, forward.scope.receiver)
            inner = repository.method(owner, name) if name is not None else None
            if inner is None or inner is forward:
                continue
            given = bind(inner.outline, call, skip=inner.receivers, first=first)
            taken = {p: streams[n] for p, value in given.items() if (n := dotted(value) or "") in streams}
            others = [value for p, value in given.items() if p not in taken]
            if any(forward.scope.roots(value, step) & streams.keys() for value in others):
                continue  # it is given what was made of the streams here: `return self.gate(x, self.leave(mixed))`
            if set(taken.values()) == set(streams.values()):
                return inner, taken
    return forward, streams


def _stream_of(value: cst.BaseExpression, streams: dict[str, str]) -> str | None:
    name = dotted(value)
    if name in streams:
        return name
    if is_call(value, *CONCATENATIONS) and len(streams) == 1:
        return next(iter(streams))
    return None


__all__ = ["CONCATENATIONS", "Block", "Lookalike", "Model", "Module", "Roles", "find_roles", "may_hold_model"]
