"""Which class is a FLUX model: told by what its forward does with two lists of blocks, not by any name.

A model iterates one list whose elements turn two streams into two, concatenates these, iterates a second list whose
elements turn the joint stream into one, and slices one stream off. That stream is the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, mentions, value_names
from chipmunk.rewrite.repository import Class, Function, Module, Repository
from chipmunk.rewrite.syntax import bind, dotted, elements, is_call, last_name, self_attribute, target_names, walk

CONCATENATIONS = ("cat", "concat", "concatenate")
_LOOP_OVER_ATTRIBUTE = re.compile(rb"\bin\b[\s(]*(?:[\w.]+\([\s(]*)*self\s*\.\s*(\w+)")
_LAST_WORD = re.compile(rb"(\w+)[\s)]*\Z")


@dataclass(eq=False)
class Block:
    """One of the model's two kinds of block. What the patches make of it is written into the last fields."""

    owner: Class
    forward: Function
    streams: dict[str, str]
    """Parameters of forward that take a stream: name → `image`, `text` or `joint`."""
    attention: bool = False
    mlp: str | None = None
    linear_in: str | None = None
    linear_out: str | None = None
    gated: bool = False
    mlp_first_in: bool = False
    mlp_first_out: bool = False


@dataclass(eq=False)
class Model:
    """A model and the roles of its parts."""

    owner: Class
    forward: Function
    double: str
    single: str
    double_block: Block
    single_block: Block
    image: str
    ids: str | None
    order_off: str
    """Why token order stays off; empty when it is on."""

    @property
    def name(self) -> str:
        return self.owner.name


@dataclass(frozen=True)
class Lookalike:
    """A class that iterates blocks, but is no model that can be handled."""

    owner: Class
    node: cst.CSTNode
    reason: str


@dataclass(eq=False)
class Roles:
    models: list[Model] = field(default_factory=list)
    lookalikes: list[Lookalike] = field(default_factory=list)


def may_hold_model(content: bytes) -> bool:
    """The cheap test before a file is parsed: loops over two attributes, one of whose elements gives two streams."""
    if b"class " not in content or not any(name.encode() + b"(" in content for name in CONCATENATIONS):
        return False
    loops = list(_LOOP_OVER_ATTRIBUTE.finditer(content))
    if len({loop.group(1) for loop in loops}) < 2:
        return False
    targets = [_LAST_WORD.search(content[max(loop.start() - 100, 0) : loop.start()]) for loop in loops]
    elements = b"|".join(sorted({target.group(1) for target in targets if target is not None}))
    return re.search(rb"\w\s*,\s*\w+[\s),]*=\s*(?:[\w.]+\(\s*)*(?:" + elements + rb")\s*[.(,]", content) is not None


def find_roles(repository: Repository) -> Roles:
    """Every model of the repository, in the order of paths and lines."""
    roles = Roles()
    for path in sorted(repository.files):
        if not may_hold_model(repository.files[path]):
            continue
        module = repository.module(path)
        if module is None:
            continue
        for owner in module.duplicates:
            roles.lookalikes.append(
                Lookalike(owner, owner.node.name, f"a later class {owner.name} in the same file replaces this one")
                if any(len(_passes(method.scope)) > 1 for method in owner.methods.values())
                else Lookalike(owner, owner.node.name, "")
            )
        for owner in module.classes.values():
            for method in owner.methods.values():
                found = _model(repository, owner, method)
                if isinstance(found, Model):
                    roles.models.append(found)
                    break
                if isinstance(found, Lookalike):
                    roles.lookalikes.append(found)
    roles.lookalikes = [x for x in roles.lookalikes if x.reason]
    return roles


@dataclass(frozen=True)
class _Pass:
    """A loop over `self.<attribute>` whose element is called on streams, and what the call's result is bound to."""

    attribute: str
    loop: cst.For
    call: cst.Call
    first: int
    """Leading arguments that are not the block's: 1 for `checkpoint(block, …)`."""
    step: Step
    results: list[str]


def _passes(scope: Scope) -> list[_Pass]:
    found: list[_Pass] = []
    for step in scope.steps:
        if not isinstance(step.node, (cst.Assign, cst.AnnAssign)):
            continue
        for loop in reversed(step.loops):
            attribute = _iterated(loop.iter, scope.receiver)
            names = {name for name, _ in target_names(loop.target)}
            hit = _block_call(step.node.value, names) if attribute is not None else None
            if attribute is None or hit is None:
                continue
            target = step.node.targets[0].target if isinstance(step.node, cst.Assign) else step.node.target
            results = [name for name, path in target_names(target) if len(path) <= 1]
            found.append(_Pass(attribute, loop, hit[0], hit[1], step, results))
            break
    return found


def _iterated(iterable: cst.BaseExpression, receiver: str) -> str | None:
    """`blocks` for `self.blocks`, `enumerate(self.blocks)`, `tqdm(zip(self.blocks, …))`, `self.blocks[a:b]`."""
    while True:
        attribute = self_attribute(iterable, receiver)
        if attribute is not None:
            return attribute
        if isinstance(iterable, cst.Call) and iterable.args:
            iterable = iterable.args[0].value
        elif isinstance(iterable, cst.Subscript):
            iterable = iterable.value
        else:
            return None


def _block_call(value: cst.CSTNode | None, names: set[str]) -> tuple[cst.Call, int] | None:
    """The call of a block: `block(...)`, `block.method(...)`, or `checkpoint(block, ...)`."""
    if not isinstance(value, cst.Call):
        return None
    if isinstance(value.func, cst.Name) and value.func.value in names:
        return value, 0
    if isinstance(value.func, cst.Attribute) and dotted(value.func.value) in names:
        return value, 0
    first = value.args[0] if value.args else None
    if first is not None and first.keyword is None and isinstance(first.value, cst.Name) and first.value.value in names:
        return value, 1
    return None


def _model(repository: Repository, owner: Class, method: Function) -> Model | Lookalike | None:
    scope = method.scope
    passes = _passes(scope)
    attributes = list(dict.fromkeys(p.attribute for p in passes))
    if len(attributes) < 2:
        return None
    for double in passes:
        for single in passes:
            if single.attribute != double.attribute and single.step.index > double.step.index:
                joined = _joined(scope, double, single)
                if joined is not None:
                    return _with_roles(repository, owner, method, double, single, *joined)
    return None


def _joined(scope: Scope, double: _Pass, single: _Pass) -> tuple[str, str, int, str] | None:
    """(image variable, text variable, place of the image in the concatenation, joint variable) of two passes."""
    if len(double.results) < 2:
        return None
    for step in scope.steps[double.step.index + 1 : single.step.index]:
        if double.loop in step.loops:
            continue
        for expression in step.expressions:
            for call in walk(expression):
                if not is_call(call, *CONCATENATIONS) or not call.args:
                    continue
                parts = elements(call.args[0].value) or []
                names = [dotted(p) or "" for p in parts]
                if len(names) != 2 or any(n not in double.results for n in names):
                    continue
                joint = single.results[0] if single.results else ""
                place = _sliced_off(scope, single, {joint, *_bound_names(step)})
                if place is None:
                    place = -1
                return names[place], names[1 - place] if place >= 0 else names[0], place, joint
    # Concatenated inside the single block's own call.
    for arg in single.call.args:
        if is_call(arg.value, *CONCATENATIONS):
            return None
    return None


def _bound_names(step: Step) -> list[str]:
    if isinstance(step.node, cst.Assign):
        return [name for target in step.node.targets for name, _ in target_names(target.target)]
    return []


def _sliced_off(scope: Scope, single: _Pass, joint: set[str]) -> int | None:
    """Which end of the joint stream is kept after the second loop: 1 the tail (`[:, n:]`), 0 the head (`[:, :n]`)."""
    for step in scope.steps[single.step.index + 1 :]:
        if single.loop in step.loops:
            continue
        for expression in step.expressions:
            for node in walk(expression):
                if isinstance(node, cst.Subscript) and dotted(node.value) in joint:
                    place = _end_of(node)
                    if place is not None:
                        return place
    return None


def _end_of(node: cst.Subscript) -> int | None:
    if len(node.slice) < 2 or not isinstance(node.slice[1].slice, cst.Slice):
        return None
    cut = node.slice[1].slice
    if cut.lower is not None and cut.upper is None:
        return 1
    if cut.upper is not None and cut.lower is None:
        return 0
    return None


def _with_roles(
    repository: Repository,
    owner: Class,
    method: Function,
    double: _Pass,
    single: _Pass,
    image: str,
    text: str,
    place: int,
    joint: str,
) -> Model | Lookalike:
    scope = method.scope
    if place < 0:
        return Lookalike(
            owner,
            method.node.name,
            "it runs both kinds of block, but slices no image stream off at the end (a ControlNet, perhaps)",
        )
    blocks: list[Block] = []
    roles = {image: "image", text: "text"}
    for found, streams in ((double, roles), (single, {name: "joint" for name in _joint_names(single, scope, joint)})):
        classes = repository.classes_in(owner, found.attribute)
        if not classes:
            reason = f"the class of the blocks in self.{found.attribute} was not found"
            if repository.unreadable:
                reason += f"; it may be in a file that could not be read: {', '.join(sorted(repository.unreadable))}"
            return Lookalike(owner, method.node.name, reason)
        if len(classes) > 1:
            names = " and ".join(c.name for c in classes)
            return Lookalike(
                owner, method.node.name, f"self.{found.attribute} may hold blocks of several classes: {names}"
            )
        name = (
            last_name(found.call.func) if isinstance(found.call.func, cst.Attribute) and not found.first else "forward"
        )
        forward = repository.method(classes[0], name) or repository.method(classes[0], "forward")
        if forward is None:
            return Lookalike(owner, method.node.name, f"{classes[0].name} has no forward")
        given = bind(forward.node, found.call, skip=1, first=found.first)
        taken = {p: streams[n] for p, value in given.items() if (n := _stream_of(value, streams)) is not None}
        blocks.append(Block(classes[0], *_followed(repository, classes[0], forward, taken)))
    if len(blocks[0].streams) < 2:
        return Lookalike(owner, method.node.name, f"{blocks[0].owner.name} does not take both streams")
    if not blocks[1].streams:
        return Lookalike(owner, method.node.name, f"{blocks[1].owner.name} does not take the joint stream")
    image_parameter, others = _image_parameter(scope, image, double)
    if image_parameter is None:
        return Lookalike(owner, method.node.name, "the image stream does not come from a parameter of this method")
    ids, why = _ids_parameter(scope, double, place, set(roles))
    order_off = (
        why if ids is None else _other_spatial(scope, double, single, {image, joint, *_result_names(single)}, others)
    )
    return Model(
        owner, method, double.attribute, single.attribute, blocks[0], blocks[1],
        image_parameter, None if order_off else ids, order_off,
    )  # fmt: skip


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
            given = bind(inner.node, call, skip=inner.receivers, first=first)
            taken = {p: streams[n] for p, value in given.items() if (n := dotted(value) or "") in streams}
            if set(taken.values()) == set(streams.values()):
                return inner, taken
    return forward, streams


def _result_names(found: _Pass) -> list[str]:
    return found.results[:1]


def _joint_names(single: _Pass, scope: Scope, joint: str) -> set[str]:
    """Names that hold the joint stream when the single block is called."""
    names = {joint}
    for step in scope.steps:
        if isinstance(step.node, cst.Assign) and is_call(step.node.value, *CONCATENATIONS):
            names.update(_bound_names(step))
    return names


def _stream_of(value: cst.BaseExpression, streams: dict[str, str]) -> str | None:
    name = dotted(value)
    if name in streams:
        return name
    if is_call(value, *CONCATENATIONS) and len(streams) == 1:
        return next(iter(streams))
    return None


def _image_parameter(scope: Scope, image: str, double: _Pass) -> tuple[str | None, set[str]]:
    """The parameter that the image stream comes from, and other parameters that are mixed into it."""
    loop_step = next(step for step in scope.steps if step.node is double.loop)
    roots: set[str] = set(scope.roots(cst.Name(image), loop_step)) - {scope.receiver}
    if not roots:
        return None, set()
    # The stream proper is what the first assignment starts from; what is added later is something else.
    chosen = image if image in roots else None
    name, step = image, loop_step
    while chosen is None:
        bindings = scope.reaching(name, step)
        if not bindings or bindings[-1].value is None:
            break
        step = bindings[-1].step
        ordered = [n for n in value_names(bindings[-1].value) if n in roots or scope.reaching(n, step)]
        if not ordered:
            break
        first = next((n for n in ordered if scope.roots(cst.Name(n), step) & roots), None)
        if first is None:
            break
        if first in roots and not scope.reaching(first, step):
            chosen = first
        name = first
    chosen = chosen or min(roots, key=scope.parameters.index)
    return chosen, roots - {chosen}


def _ids_parameter(scope: Scope, double: _Pass, place: int, streams: set[str]) -> tuple[str | None, str]:
    """The parameter with the image tokens' positions: concatenated with the text's on the way to the blocks."""
    for arg in double.call.args[double.first :]:
        if dotted(arg.value) in streams:
            continue
        for call, step in scope.calls_behind(arg.value, double.step):
            parts = elements(call.args[0].value) if is_call(call, *CONCATENATIONS) and call.args else None
            if parts is None or len(parts) < 2:
                continue
            found = [scope.roots(part, step) - {scope.receiver} for part in parts]
            if len(parts) == 2 and all(len(r) == 1 for r in found) and found[0] != found[1]:
                return next(iter(found[place])), ""
    return None, "token order is off: no concatenation of text and image positions was found on the way to the blocks"


def _other_spatial(scope: Scope, double: _Pass, single: _Pass, streams: set[str], others: set[str]) -> str:
    """Why image tokens must not be reordered: something else with one row a token is added to the stream."""
    last = single.step.index
    for name in sorted(streams):
        for binding in scope.bindings.get(name, ()):
            if binding.step.index > last and single.loop not in binding.step.loops:
                continue
            if binding.value is None or binding.step in (double.step, single.step) or binding.path:
                continue
            if not isinstance(binding.value, cst.BinaryOperation) and not binding.augmented:
                continue
            for operand in _added(binding.value, streams):
                roots = scope.roots(operand, binding.step) - {scope.receiver}
                if roots and not _is_broadcast(operand):
                    names = ", ".join(sorted(roots))
                    return f"token order is off: {names} may hold one row for each image token, and is not reordered"
    for name in sorted(others):
        for binding in (b for stream in streams for b in scope.bindings.get(stream, ())):
            value = binding.value
            if (
                value is not None
                and is_call(value)
                and binding.step.index < double.step.index
                and mentions(value, name)
            ):
                return f"token order is off: {name} may hold one row for each image token, and is not reordered"
    return ""


def _added(value: cst.BaseExpression, streams: set[str]) -> list[cst.BaseExpression]:
    """What a sum adds to the stream, or multiplies it by; terms computed from the stream itself are left out."""
    if isinstance(value, cst.BinaryOperation):
        if isinstance(value.operator, (cst.Add, cst.Subtract)):
            return [*_added(value.left, streams), *_added(value.right, streams)]
        for stream, factor in ((value.left, value.right), (value.right, value.left)):
            if dotted(stream) in streams:
                return [factor]
    return [] if any(mentions(value, stream) for stream in streams) else [value]


def _is_broadcast(operand: cst.BaseExpression) -> bool:
    """`vec[:, None]` and `vec.unsqueeze(1)` are the same for every token."""
    for node in walk(operand):
        if is_call(node, "unsqueeze"):
            return True
        if isinstance(node, cst.Subscript):
            for part in node.slice:
                if isinstance(part.slice, cst.Index) and dotted(part.slice.value) == "None":
                    return True
    return False


__all__ = ["Block", "Lookalike", "Model", "Module", "Roles", "find_roles", "may_hold_model"]
