"""Which class is a FLUX model: told by what its forward does with two lists of blocks, not by any name.

A model iterates one list whose elements turn two streams into two, concatenates these, iterates a second list whose
elements turn the joint stream into one, and slices one stream off. That stream is the image. In some, the blocks of the
second list concatenate the streams themselves, and give both back: the image is the one that the result comes from. And
there the first list may be one for each stream, whose elements turn one stream into one.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, mentions, value_names
from chipmunk.rewrite.repository import Class, External, Function, Module, Repository
from chipmunk.rewrite.syntax import (
    bind,
    dotted,
    elements,
    is_call,
    last_name,
    parameters,
    self_attribute,
    target_names,
    text_of_string,
    walk,
)

CONCATENATIONS = ("cat", "concat", "concatenate")
_LOOP_OVER_ATTRIBUTE = re.compile(rb"\bin\b[\s(]*(?:[\w.]+\([\s(]*)*(\w+)\s*\.\s*(\w+)")
_CALL = 800  # bytes in which the streams are among a call's arguments
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
    """Attribute with the first list of blocks, dotted where it lies in a dictionary (`lists.image`)."""
    single: str
    double_block: Block
    single_block: Block
    image: str
    ids: str | None
    order_off: str
    """Why token order stays off; empty when it is on."""
    per_token: tuple[str, ...] = ()
    """Optional parameters that are added to the image stream: where one is given, tokens keep their order."""

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
    """The cheap test before a file is parsed: loops over two attributes, one of whose elements turns two into two."""
    if not any(name.encode() + b"(" in content for name in CONCATENATIONS):
        return False
    loops = list(_LOOP_OVER_ATTRIBUTE.finditer(content))
    lists = Counter(receiver for receiver, _ in {loop.groups() for loop in loops})
    loops = [loop for loop in loops if lists[loop.group(1)] > 1]
    targets = [_LAST_WORD.search(content[max(loop.start() - 100, 0) : loop.start()]) for loop in loops]
    elements = b"|".join(sorted({target.group(1) for target in targets if target is not None}))
    if not elements:
        return False
    calls = re.finditer(rb"(\w+)\s*,\s*(\w+)[\s),]*=\s*(?:[\w.]*\(\s*)*(?:" + elements + rb")\s*[.(,]", content)
    return any(_takes(content[call.end() : call.end() + _CALL], *call.groups()) for call in calls)


def _takes(arguments: bytes, *streams: bytes) -> bool:
    """Whether a call's arguments name all streams, or may hold them."""
    named = all(re.search(rb"\b" + stream + rb"\b", arguments) for stream in streams)
    return named or arguments.lstrip().startswith(b"*")


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
        for function in module.functions.values():
            classes = _given_first(repository, function)
            if len(classes) == 1:  # the model's work in a function that is given the model
                found = _model(repository, classes[0], function)
                if isinstance(found, Model):
                    roles.models.append(found)
            elif classes:
                names = " and ".join(c.name for c in classes)
                reason = f"which of {names} {function.name} in {path} is given is not known: annotate its parameter"
                roles.lookalikes.append(Lookalike(classes[0], classes[0].node.name, reason))
    roles.lookalikes = [x for x in roles.lookalikes if x.reason]
    _leave_borrowers(roles)
    return roles


def _given_first(repository: Repository, function: Function) -> list[Class]:
    """The class of what a function is given first: its annotation, or the file's classes with the lists it iterates."""
    first = parameters(function.node)[:1]
    annotation = first[0].annotation if first else None
    if annotation is not None:
        meaning = repository.resolve(annotation.annotation, function.module)
        if isinstance(meaning, Class):
            return [meaning]
    lists = {found.attribute.split(".")[0] for found in _passes(function.scope)} if first else set()
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
                roles.lookalikes.append(Lookalike(model.owner, model.forward.node.name, reason))
                roles.models.remove(model)
                break


def _distance(path: str, other: str) -> int:
    """How many folders lie between two files; 0 for one and the same."""
    first, second = path.split("/"), other.split("/")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return len(first) + len(second) - 2 * shared


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
        if any(isinstance(node, cst.FunctionDef) for node, _ in step.chain):
            continue  # a function inside it, which wraps a block for others to call
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
    # Where a loop calls the block itself, and hands it to something else (for checkpointing), the call tells more.
    direct = {id(p.loop) for p in found if not p.first}
    return [p for p in found if not p.first or id(p.loop) not in direct]


def _iterated(iterable: cst.BaseExpression, receiver: str) -> str | None:
    """`blocks` for `self.blocks`, `enumerate(self.blocks)`, `tqdm(zip(self.blocks, …))`, `self.blocks[a:b]`.

    `lists.image` for `self.lists["image"]`.
    """
    key = ""
    while True:
        attribute = self_attribute(iterable, receiver)
        if attribute is not None:
            return attribute + key
        if isinstance(iterable, cst.Call) and iterable.args:
            iterable = iterable.args[0].value
        elif isinstance(iterable, cst.Subscript):
            index = iterable.slice[0].slice
            name = text_of_string(index.value) if isinstance(index, cst.Index) else None
            key = f".{name}" if name is not None and name.isidentifier() else ""
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
    for find in (_joined, _joined_inside):
        for double in passes:
            for single in passes:
                if single.attribute != double.attribute and single.step.index > double.step.index:
                    streams = find(scope, double, single)
                    if streams is not None:
                        return _with_roles(repository, owner, method, double, single, streams)
    return None


@dataclass(frozen=True)
class _Streams:
    """The variables of a model's forward that hold the streams."""

    image: str
    text: str
    """Empty if the first list of blocks has the image alone."""
    place: int | None
    """Of the image in the joint stream; -1: no image is sliced off; None: the second kind of block joins them."""
    inside: dict[str, str]
    """Variables that the second kind of block takes: name → `image`, `text` or `joint`."""


def _joined(scope: Scope, double: _Pass, single: _Pass) -> _Streams | None:
    """The streams of two passes between which they are concatenated."""
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
                inside = {name: "joint" for name in _joint_names(single, scope, joint)}
                image, text = names[place], names[1 - place] if place >= 0 else names[0]
                return _Streams(image, text, place, inside)
    return None


def _joined_inside(scope: Scope, double: _Pass, single: _Pass) -> _Streams | None:
    """The streams of two passes of which the second one takes two streams and gives them back."""
    if len(single.results) != 2 or any(is_call(arg.value, *CONCATENATIONS) for arg in single.call.args):
        return None
    taken = {dotted(arg.value) for arg in single.call.args[single.first :]}
    returned = _returned(scope, single)
    if not taken.issuperset(single.results) or len(returned) != 1:
        return None
    image = next(iter(returned))
    text = next(name for name in single.results if name != image)
    inside = {image: "image", text: "text"}
    if set(double.results) == set(single.results):
        return _Streams(image, text, None, inside)
    # One list for each stream: the image is what every value of the content stream starts from.
    content = scope.reaching(image, next(step for step in scope.steps if step.node is single.loop))
    sources = [_first_names(binding.value) for binding in content]
    if len(double.results) == 1 and sources and all(double.results[0] in source[:1] for source in sources):
        return _Streams(double.results[0], "", None, inside)
    return None


def _first_names(value: cst.CSTNode | None) -> list[str]:
    """The names of a value, or of the tensors that it concatenates, in order."""
    if is_call(value, *CONCATENATIONS) and value.args:
        return [dotted(part) or "" for part in elements(value.args[0].value) or []]
    return [name] if (name := dotted(value)) is not None else []


def _returned(scope: Scope, found: _Pass) -> set[str]:
    """Which results of a pass the method's result is computed from, once the loop is over."""
    names: set[str] = set()
    seen: set[tuple[str, int]] = set()
    pending = [(s.node.value, s) for s in scope.steps if isinstance(s.node, cst.Return) and s.node.value is not None]
    while pending:
        value, step = pending.pop()
        for name in value_names(value):
            if (name, step.index) in seen:
                continue
            seen.add((name, step.index))
            bindings = scope.reaching(name, step)
            inside = [binding for binding in bindings if found.loop in binding.step.loops]
            if inside and name in found.results:
                names.add(name)
            if inside:
                continue
            pending += [(binding.value, binding.step) for binding in bindings if binding.value is not None]
    return names


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
    repository: Repository, owner: Class, method: Function, double: _Pass, single: _Pass, streams: _Streams
) -> Model | Lookalike:
    scope = method.scope
    if streams.place == -1:
        return Lookalike(
            owner,
            method.node.name,
            "it runs both kinds of block, but slices no image stream off at the end (a ControlNet, perhaps)",
        )
    blocks: list[Block] = []
    outside = {name: role for name, role in ((streams.image, "image"), (streams.text, "text")) if name}
    for found, roles in ((double, outside), (single, streams.inside)):
        classes = repository.classes_in(owner, found.attribute.split(".")[0])
        if not classes:
            elsewhere = _elsewhere(repository, owner, found.attribute.split(".")[0])
            reason = f"the class of the blocks in self.{found.attribute} was not found"
            if elsewhere is not None:
                reason = f"the blocks in self.{found.attribute} are {elsewhere}'s, which is no code of this repository"
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
        given = bind(forward.node, found.call, skip=1, first=_leading(repository, method, found))
        taken = {p: roles[n] for p, value in given.items() if (n := _stream_of(value, roles)) is not None}
        blocks.append(Block(classes[0], *_followed(repository, classes[0], forward, taken)))
    if len(set(blocks[0].streams.values())) < len(outside):
        return Lookalike(owner, method.node.name, f"{blocks[0].owner.name} does not take both streams")
    if not blocks[1].streams:
        return Lookalike(owner, method.node.name, f"{blocks[1].owner.name} does not take the joint stream")
    image_parameter, others = _image_parameter(scope, streams.image, double)
    if image_parameter is None:
        return Lookalike(owner, method.node.name, "the image stream does not come from a parameter of this method")
    if streams.text:  # the text is no property of single image tokens
        others -= {_image_parameter(scope, streams.text, double)[0] or ""}
    place = streams.place if streams.place is not None else _place_inside(blocks[1])
    ids, why = _ids_parameter(scope, (double, single), place, set(outside))
    per_token: tuple[str, ...] = ()
    if ids is not None:
        taken_in = {dotted(arg.value) or "" for arg in single.call.args} & streams.inside.keys()
        mixed = {streams.image, *taken_in, *single.results[:1]} - {streams.text}
        why, per_token = _other_spatial(method, double, single, streams.image, mixed, others)
        if {image_parameter, ids} & set(per_token):
            why = "token order is off: something computed from the image itself is added to its stream"
        chosen = next((told for block in blocks if (told := _chosen_by(block)) is not None), None)
        if chosen is not None:
            why = f"token order is off: which tokens the blocks work on is told by {chosen}"
    return Model(
        owner, method, double.attribute, single.attribute, blocks[0], blocks[1],
        image_parameter, None if why else ids, why, () if why else per_token,
    )  # fmt: skip


def _elsewhere(repository: Repository, owner: Class, attribute: str) -> str | None:
    """The class of another package that a list is made of: `nn.ModuleList([Block(…) for …])`."""
    for value, method, step in repository.values_of(owner, attribute):
        for call in walk(value):
            if is_call(call) and last_name(call.func) not in ("ModuleList", "Sequential", "range"):
                meaning = repository.resolve(call.func, method, step)
                return meaning.name if isinstance(meaning, External) else None
    return None


def _leading(repository: Repository, method: Function, found: _Pass) -> int:
    """Leading arguments of the call that are not the block's: `run(block, flag, x)` where `run(f, flag, *args)`."""
    if not found.first:
        return 0
    wrapper = repository.resolve(found.call.func, method, found.step)
    if isinstance(wrapper, Function) and isinstance(wrapper.node.params.star_arg, cst.Param):
        named = len(wrapper.node.params.posonly_params) + len(wrapper.node.params.params) - wrapper.receivers
        given = next((i for i, arg in enumerate(found.call.args) if arg.keyword is not None), len(found.call.args))
        return min(named, given)
    return found.first


def _place_inside(block: Block) -> int | None:
    """Which of the two streams that the block concatenates is the image: 0 the first, 1 the second."""
    scope = block.forward.scope
    for call, step in scope.calls:
        parts = elements(call.args[0].value) if is_call(call, *CONCATENATIONS) and call.args else None
        if parts is None or len(parts) != 2:
            continue
        found = [{block.streams[root] for root in scope.roots(part, step) & block.streams.keys()} for part in parts]
        if {"image"} in found and {"text"} in found:
            return found.index({"image"})
    return None


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
            others = [value for p, value in given.items() if p not in taken]
            if any(forward.scope.roots(value, step) & streams.keys() for value in others):
                continue  # it is given what was made of the streams here: `return self.gate(x, self.leave(mixed))`
            if set(taken.values()) == set(streams.values()):
                return inner, taken
    return forward, streams


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


def _ids_parameter(
    scope: Scope, passes: tuple[_Pass, _Pass], place: int | None, streams: set[str]
) -> tuple[str | None, str]:
    """The parameter with the image tokens' positions: concatenated with the text's on the way to the blocks."""
    for found in passes if place is not None else ():
        joined: list[tuple[int, str]] = []
        for arg in found.call.args[found.first :]:
            if dotted(arg.value) in streams:
                continue
            for call, step in scope.calls_behind(arg.value, found.step):
                parts = elements(call.args[0].value) if is_call(call, *CONCATENATIONS) and call.args else None
                if parts is None or len(parts) != 2:
                    continue
                names = [_single_root(scope, part, step) for part in parts]
                if names[0] is not None and names[1] is not None and names[0] != names[1]:
                    joined.append((step.index, names[place or 0] or ""))
        if joined:  # the nearest: what is further away (timestep and guidance, say) makes other inputs
            return max(joined)[1], ""
    return None, "token order is off: no concatenation of text and image positions was found on the way to the blocks"


def _single_root(scope: Scope, part: cst.BaseExpression, step: Step) -> str | None:
    """The one parameter that a value comes from; a parameter that may have been bound anew is still that one."""
    name = dotted(part)
    if name in scope.parameters and not scope.is_definite(scope.reaching(name, step), step):
        return name
    roots = scope.roots(part, step) - {scope.receiver}
    return next(iter(roots)) if len(roots) == 1 else None


def _chosen_by(block: Block) -> str | None:
    """The parameter of a block, no stream, that says where tokens lie: `keys[:, :, info["places"]] = image_keys`."""
    scope = block.forward.scope
    others = set(scope.parameters) - block.streams.keys() - {scope.receiver}
    for step in scope.steps:
        for expression in step.expressions:
            for node in walk(expression):
                if not isinstance(node, cst.Subscript) or len(node.slice) < 2:
                    continue
                for part in node.slice[1:]:
                    if isinstance(part.slice, cst.Index) and (found := scope.roots(part.slice.value, step) & others):
                        return min(found)
    return None


def _other_spatial(
    method: Function, double: _Pass, single: _Pass, image: str, streams: set[str], others: set[str]
) -> tuple[str, tuple[str, ...]]:
    """Why image tokens must not be reordered, and the optional parameters that forbid it where they are given.

    Something else with one row a token is added to the stream: a ControlNet's residual, or a mask.
    """
    scope, last = method.scope, single.step.index
    found: list[frozenset[str]] = []
    for name in sorted(streams):
        for binding in scope.bindings.get(name, ()):
            if binding.step.index > last and single.loop not in binding.step.loops:
                continue
            if binding.value is None or binding.step in (double.step, single.step) or binding.path:
                continue
            if not isinstance(binding.value, cst.BinaryOperation) and not binding.augmented:
                continue
            found += _spatial_roots(scope, binding.value, binding.step, streams)
    for step in scope.steps[: last + 1] + [s for s in scope.steps[last + 1 :] if single.loop in s.loops]:
        target = _target(step.node)
        if isinstance(target, cst.Subscript) and dotted(target.value) in streams:  # stream[:, :n] += residual
            found += _spatial_roots(scope, step.node.value, step, streams)  # type: ignore[attr-defined]
    for name in sorted(others):
        for binding in scope.bindings.get(image, ()):
            value = binding.value
            if (
                value is not None
                and is_call(value)
                and binding.step.index < double.step.index
                and mentions(value, name)
                and _first_names(value)[:1] != [binding.name]  # more tokens behind the image's: a reference image
            ):
                found.append(frozenset({name}))
    names = frozenset().union(*found)
    optional = {p.name.value for p in parameters(method.node) if p.default is not None}
    if names <= optional:
        return "", tuple(name for name in scope.parameters if name in names)
    listed = ", ".join(sorted(names))
    return f"token order is off: {listed} may hold one row for each image token, and is not reordered", ()


def _target(node: cst.CSTNode) -> cst.BaseExpression | None:
    if isinstance(node, cst.Assign):
        return node.targets[0].target
    return node.target if isinstance(node, cst.AugAssign) else None


def _spatial_roots(scope: Scope, value: cst.BaseExpression, step: Step, streams: set[str]) -> list[frozenset[str]]:
    """The parameters behind each operand that may differ from token to token."""
    operands = [operand for operand in _added(value, streams) if not _is_broadcast(operand)]
    return [roots for operand in operands if (roots := scope.roots(operand, step) - {scope.receiver})]


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
