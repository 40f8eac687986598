"""The two loops over blocks in a model's forward, and where the image stream leaves them: what skipped steps leave out.

The image stream leaves as it is, or is cut off the joint one: in one place, or in each arm of an `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step
from chipmunk.rewrite.syntax import dotted, self_list, target_names, walk

if TYPE_CHECKING:
    from chipmunk.rewrite.context import Context
    from chipmunk.rewrite.roles import Model


class DoesNotFit(Exception):
    """Why the forward is left alone, and where that shows."""

    def __init__(self, reason: str, node: cst.CSTNode | None = None) -> None:
        super().__init__(reason)
        self.reason = f"steps are not cached: {reason}"
        self.node = node


@dataclass(frozen=True)
class BlockLoop:
    """A loop over one of the model's lists of blocks."""

    step: Step
    node: cst.For
    blocks: cst.BaseExpression
    """`self.double_blocks` in what it iterates, with the runtime's call around it if there is one."""
    done: bool


@dataclass(frozen=True)
class Exit:
    """One place where the image stream leaves the loops."""

    step: Step
    """The statement that holds it, or before which it has to be asked for."""
    cut: cst.BaseExpression | None
    """`img[:, txt.shape[1] :]`; None where the blocks return the streams apart."""
    done: bool


@dataclass(frozen=True)
class Hidden:
    """The image stream after the loops."""

    name: str
    exits: tuple[Exit, ...]
    """In the order of the text."""
    tests: tuple[Step, ...] = ()
    """The heads of the `if` (and its `elif`s) that chooses among several."""

    @property
    def first(self) -> Step:
        return self.exits[0].step

    def cut_at(self, step: Step) -> cst.BaseExpression | None:
        """What is cut off in this statement."""
        return next((way.cut for way in self.exits if way.step is step), None)


def block_loops(context: Context, model: Model, attribute: str) -> list[BlockLoop]:
    """The loops over `self.<attribute>` that run its blocks, in the order of the text."""
    scope = model.forward.scope
    found: list[BlockLoop] = []
    for step in scope.steps:
        if not isinstance(step.node, cst.For) or not _runs_blocks(scope, step.node):
            continue
        parts = list(walk(step.node.iter))
        for node in parts:
            if not isinstance(node, cst.BaseExpression) or self_list(node, scope.receiver) != attribute:
                continue
            if any(isinstance(parent, cst.Attribute) and parent.value is node for parent in parts):
                raise DoesNotFit(f"what the loop over self.{attribute} iterates is not understood", step.node)
            calls = [p for p in parts if isinstance(p, cst.Call) and p.args and p.args[0].value is node]
            done = any(context.runtime_call(call, model.forward, step) == "blocks" for call in calls)
            found.append(BlockLoop(step, step.node, node, done))
    if not found:
        raise DoesNotFit(f"the loop over self.{attribute} was not found")
    if not _always_comes_to_one(found):
        raise DoesNotFit(f"the forward has a way around self.{attribute}", found[0].node)
    return found


def _always_comes_to_one(loops: list[BlockLoop]) -> bool:
    """Whether each call of the forward goes through one of the loops: no other arm does something in their place.

    A forward that leaves its blocks out itself, as caches do, would be told of a step that it never comes to.
    """
    chains = {tuple((n, b) for n, b in loop.step.chain if not isinstance(n, (cst.With, cst.Try))) for loop in loops}
    for chain in sorted(chains, key=len, reverse=True):
        while chain and isinstance(chain[-1][0], cst.If):
            *around, (node, branch) = chain
            other = (*around, (node, "orelse" if branch == "body" else "body"))
            if other not in chains and (branch == "orelse" or getattr(node, "orelse", None) is not None):
                break
            chain = tuple(around)
            chains.add(chain)
    return () in chains


def _runs_blocks(scope: Scope, loop: cst.For) -> bool:
    """Whether its body calls what the loop iterates: `block(…)`, `block.run(…)`, `run(block, …)`, `run(x=block)`."""
    names = {name for name, _ in target_names(loop.target)}
    for call, step in scope.calls:
        if loop in step.loops:
            named = [arg.value for arg in call.args if arg.keyword is not None and isinstance(arg.value, cst.Name)]
            parts = [call.func, *(arg.value for arg in call.args[:1]), *named]
            if any((dotted(part) or "").partition(".")[0] in names for part in parts):
                return True
    return False


def image_name(model: Model, loop: BlockLoop) -> str:
    """The variable with the image stream, which enters the first block and is what it returns."""
    scope = model.forward.scope
    names = {
        name
        for name, bindings in scope.bindings.items()
        if any(loop.node in binding.step.loops and not binding.augmented for binding in bindings)
        and model.image in scope.roots(cst.Name(name), loop.step)
    }
    if model.image in names:
        return model.image
    if len(names) != 1:
        raise DoesNotFit("which variable holds the image stream is not understood", loop.node)
    return names.pop()


def hidden_state(context: Context, model: Model, single: list[BlockLoop], image: str) -> Hidden:
    """Where the image stream leaves the loops: cut off the joint stream, or as it is."""
    scope = model.forward.scope
    loops = [loop.node for loop in single]
    made = set(bound(scope, loops))
    # where they leave apart, a slice of the image stream takes something else off: frames of before, say
    apart = "text" in model.single_block.streams.values() and image in made
    after = [step for step in scope.steps if step.index > single[-1].step.index and not is_inside(step, loops)]

    def found(step: Step) -> tuple[str, Exit] | None:
        """The name of the stream, and where it leaves in this statement."""
        for expression in step.expressions:
            for node in walk(expression):
                done = context.runtime_call(node, model.forward, step) == "hidden"
                cut = node.args[1].value if done and isinstance(node, cst.Call) and len(node.args) == 2 else node
                cuts = isinstance(cut, cst.Subscript) and dotted(cut.value) in made and _is_cut(cut)
                if isinstance(cut, cst.Subscript) and cuts and not (apart and dotted(cut.value) == image):
                    return dotted(cut.value) or "", Exit(step, cut, done)
                if done:
                    return image, Exit(step, None, True)
        return None

    for step in after:
        place = found(step)
        if place is not None:
            return _in_each_arm(after, place[0], single[-1].step, step, found) or Hidden(place[0], (place[1],))
    if image not in made or not after:
        raise DoesNotFit("where the image stream leaves the blocks is not understood", loops[-1])
    first = next((step for step in after if step.chain == single[-1].step.chain), None)
    if first is None or first.statement is single[-1].step.statement:
        raise DoesNotFit("where the image stream leaves the blocks is not understood", loops[-1])
    return Hidden(image, (Exit(first, None, False),))


def _in_each_arm(
    after: list[Step], name: str, loop: Step, first: Step, found: Callable[[Step], tuple[str, Exit] | None]
) -> Hidden | None:
    """The cuts of one stream in an `if` beside the loop, where each arm is nothing but one of them."""
    depth = len(loop.chain)
    if len(first.chain) <= depth or first.chain[:depth] != loop.chain:
        return None
    top = first.chain[depth][0]
    inside = [step for step in after if any(node is top for node, _ in step.chain)]
    tests = [step for step in after if step.node is top or (step in inside and isinstance(step.node, cst.If))]
    places = [(step, found(step)) for step in inside if step not in tests]
    exits = tuple(place[1] for _, place in places if place is not None and place[0] == name)
    arms = {step.chain for step, _ in places}
    if len(exits) < len(places) or len(arms) < len(places) or any(way.cut is None for way in exits):
        return None
    conditions = {node for arm in arms for node, _ in arm[depth:]}
    if any(not isinstance(node, cst.If) or node.orelse is None for node in conditions):
        return None
    return Hidden(name, exits, tuple(tests))


def _is_cut(node: cst.Subscript) -> bool:
    """Whether this is `x[:, a:]` or `x[:, :b]`."""
    if len(node.slice) < 2 or not isinstance(node.slice[1].slice, cst.Slice):
        return False
    cut = node.slice[1].slice
    return (cut.lower is None) != (cut.upper is None)


def bound(scope: Scope, loops: list[cst.For]) -> Iterator[str]:
    """Names that get a value in the loops."""
    for name, bindings in scope.bindings.items():
        if any(is_made_by(binding.step, loops) for binding in bindings):
            yield name


def is_made_by(step: Step, loops: list[cst.For]) -> bool:
    """Whether a value that a name gets here is the loops'."""
    return step.node in loops or is_inside(step, loops)


def is_inside(step: Step, loops: list[cst.For]) -> bool:
    return any(loop in step.loops for loop in loops)
