"""The two loops over a model's blocks, and the streams that go through them: what makes a class a FLUX model."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.statements import Statements
from chipmunk.rewrite.syntax import dotted, elements, is_call, self_list, target_names, walk

BY_NAME = -1
CONCATENATIONS = ("cat", "concat", "concatenate")


@dataclass(frozen=True)
class Pass:
    """A loop over `self.<attribute>` whose element is called on streams, and what the call's result is bound to."""

    attribute: str
    loop: cst.For
    call: cst.Call
    first: int
    """Leading arguments that are not the block's: 1 for `checkpoint(block, …)`; BY_NAME for `run(…, block=block)`."""
    step: Step
    results: list[str]

    @property
    def given(self) -> Sequence[cst.Arg]:
        """The arguments that are the block's, or those of what does its work."""
        return self.call.args[max(self.first, 0) :]


def passes(scope: Scope) -> list[Pass]:
    found: list[Pass] = []
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
            found.append(Pass(attribute, loop, hit[0], hit[1], step, results))
            break
    # Where a loop calls the block itself, and hands it to something else (for checkpointing), the call tells more.
    direct = {id(p.loop) for p in found if not p.first}
    return [p for p in found if not p.first or id(p.loop) not in direct]


def _iterated(iterable: cst.BaseExpression, receiver: str) -> str | None:
    """`blocks` for `self.blocks`, `enumerate(self.blocks)`, `tqdm(zip(self.blocks, …))`, `self.blocks[a:b]`.

    `lists.image` for `self.lists["image"]`.
    """
    while True:
        attribute = self_list(iterable, receiver)
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
    if any(
        arg.keyword is not None and isinstance(arg.value, cst.Name) and arg.value.value in names for arg in value.args
    ):
        return value, BY_NAME
    return None


def may_join(statements: Statements) -> bool:
    """Whether a function may have two streams come out of a loop and be joined; told without its tree.

    The answer may be yes too often, never no where `joined` or `joined_inside` finds streams, nor where a pass gives
    back the two streams that it takes.
    """
    pairs: list[set[str]] = []
    for node in [step.node for step in statements.steps if step.in_loop]:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Call):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        names = [ast_nodes.dotted(part) for part in target.elts] if isinstance(target, (ast.Tuple, ast.List)) else []
        results = {name for name in names if name is not None}
        if len(results) > 1:
            if results <= {ast_nodes.dotted(arg) for arg in ast_nodes.arguments(node.value)}:
                return True
            pairs.append(results)
    for call, _ in statements.calls if pairs else ():
        given = ast_nodes.arguments(call) if ast_nodes.last_name(call.func) in CONCATENATIONS else []
        parts = {ast_nodes.dotted(part) or "" for part in ast_nodes.elements(given[0]) or []} if given else set()
        if parts and any(parts <= pair for pair in pairs):
            return True
    return False


@dataclass(frozen=True)
class Streams:
    """The variables of a model's forward that hold the streams."""

    image: str
    text: str
    """Empty if the first list of blocks has the image alone."""
    place: int | None
    """Of the image in the joint stream; -1: no image is sliced off; None: the second kind of block joins them."""
    inside: dict[str, str]
    """Variables that the second kind of block takes: name → `image`, `text` or `joint`."""


def joined(scope: Scope, double: Pass, single: Pass) -> Streams | None:
    """The streams of two passes between which they are concatenated."""
    if len(double.results) < 2:
        return None
    for step in scope.steps[double.step.index + 1 : single.step.index]:
        if double.loop in step.loops or any(isinstance(node, cst.FunctionDef) for node, _ in step.chain):
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
                inside = {name: "joint" for name in _joint_names(scope, joint, double.results)}
                image, text = names[place], names[1 - place] if place >= 0 else names[0]
                return Streams(image, text, place, inside)
    return None


def joined_inside(scope: Scope, double: Pass, single: Pass) -> Streams | None:
    """The streams of two passes of which the second one takes two streams and gives them back."""
    if len(single.results) != 2 or any(is_call(arg.value, *CONCATENATIONS) for arg in single.call.args):
        return None
    taken = {dotted(arg.value) for arg in single.given}
    returned = _returned(scope, single)
    if not taken.issuperset(single.results) or len(returned) != 1:
        return None
    image = next(iter(returned))
    text = next(name for name in single.results if name != image)
    inside = {image: "image", text: "text"}
    if set(double.results) == set(single.results):
        return Streams(image, text, None, inside)
    # One list for each stream: the image is what every value of the content stream starts from.
    content = scope.reaching(image, next(step for step in scope.steps if step.node is single.loop))
    sources = [first_names(binding.value) for binding in content]
    if len(double.results) == 1 and sources and all(double.results[0] in source[:1] for source in sources):
        return Streams(double.results[0], "", None, inside)
    return None


def first_names(value: cst.CSTNode | None) -> list[str]:
    """The names of a value, or of the tensors that it concatenates, in order."""
    if is_call(value, *CONCATENATIONS) and value.args:
        return [dotted(part) or "" for part in elements(value.args[0].value) or []]
    return [name] if (name := dotted(value)) is not None else []


def _returned(scope: Scope, found: Pass) -> set[str]:
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


def _sliced_off(scope: Scope, single: Pass, joint: set[str]) -> int | None:
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


def _joint_names(scope: Scope, joint: str, parts: Collection[str]) -> set[str]:
    """Names that hold the joint stream when the single block is called: concatenations of it, or of one of `parts`."""
    names, joined = {joint}, {joint, *parts}
    for step in scope.steps:
        if isinstance(step.node, cst.Assign) and is_call(step.node.value, *CONCATENATIONS):
            names.update(_bound_names(step) if not joined.isdisjoint(first_names(step.node.value)) else ())
    return names
