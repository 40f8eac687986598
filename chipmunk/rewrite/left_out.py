"""Whether the loops over a model's blocks can be left out on a step: nothing else may be missing, or wrong, then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.block_loops import BlockLoop, DoesNotFit, Hidden, bound, is_inside, is_made_by
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.syntax import dotted, walk

if TYPE_CHECKING:
    from chipmunk.rewrite.roles import Model


def check_left_out(model: Model, loops: list[BlockLoop], hidden: Hidden) -> None:
    """Raise DoesNotFit if anything but the hidden state is missing, or wrong, where the loops iterate nothing."""
    first = hidden.first
    own = [test.node for test in hidden.tests]
    branches = [node for node, _ in first.chain if isinstance(node, cst.If) and node not in own]
    if any(node is branch for loop in loops for node, _ in loop.step.chain for branch in branches):
        raise DoesNotFit("the forward has a way around its blocks", first.node)
    if branches:
        raise DoesNotFit("where the image stream is cut off hangs on a condition", first.node)
    scope = model.forward.scope
    nodes = [loop.node for loop in loops]
    start = min(loop.step.index for loop in loops)
    made = set(bound(scope, nodes))
    between = {b.name for name in scope.bindings for b in scope.bindings[name] if start < b.step.index < first.index}
    for name in sorted(made | between):
        if name.startswith(f"{scope.receiver}."):
            raise DoesNotFit(f"{name} is assigned between the blocks")
    for step in scope.steps:
        if start < step.index < first.index and isinstance(step.node, cst.Return) and not _nested(step):
            raise DoesNotFit("the forward returns from between the blocks", step.node)
        if step.index <= start or is_inside(step, nodes):
            continue
        for name in {node.value for e in _read(step) for node in walk(e) if isinstance(node, cst.Name)} & made:
            before = [b for b in scope.reaching(name, step) if not is_made_by(b.step, nodes)]
            if not before and name not in scope.parameters:
                raise DoesNotFit(f"{name} is known only once a block has run", step.node)
    for step in scope.steps:
        if start < step.index < first.index and not _nested(step):
            _check_kept(model, step, nodes, made)
    grown = set(_grown(scope, nodes, start, first.index))
    for test in hidden.tests:
        if _from_blocks(scope, (name for e in _read(test) for name in value_names(e)), test, nodes, grown, hidden):
            raise DoesNotFit("where the image stream is cut off hangs on what the blocks compute", test.node)
    for step in scope.steps:
        if step.index < first.index or is_inside(step, nodes) or isinstance(step.node, cst.Del):
            continue
        used: Counter[str] = Counter(name for e in _read(step) for name in value_names(e))
        if (cut := hidden.cut_at(step)) is not None:
            used -= Counter(value_names(cut))
        found = _from_blocks(scope, used, step, nodes, grown, hidden)
        if found is not None:
            raise DoesNotFit(f"{found} comes out of the blocks too, and is used after them", step.node)
    if model.order.kept:
        raise DoesNotFit(model.order.kept)


def _check_kept(model: Model, step: Step, loops: list[cst.For], made: set[str]) -> None:
    """Raise DoesNotFit where what the blocks compute is kept or handed on, elsewhere than to the hidden state.

    A list or dictionary that the forward makes itself counts where it is used after the blocks (`_grown`).
    """
    scope = model.forward.scope

    def holds(node: cst.CSTNode) -> bool:
        """Whether the value is the blocks', on the way to the hidden state."""
        names = set(value_names(node)) & made
        return any(is_made_by(b.step, loops) for name in names for b in scope.reaching(name, step)) and (
            model.image in scope.roots(node, step)
        )

    def is_local(node: cst.BaseExpression) -> bool:
        name = dotted(node)
        if name in made:  # the stream itself
            return True
        if name is None or "." in name or name in scope.parameters:
            return False
        values = [binding.value for binding in scope.reaching(name, step)]
        return all(isinstance(value, (cst.List, cst.Dict)) for value in values if value is not None)

    if isinstance(step.node, cst.Assign):
        for target in step.node.targets:
            place: cst.BaseExpression = target.target
            while isinstance(place, cst.Subscript):
                place = place.value
            if place is not target.target and not is_local(place) and holds(step.node.value):
                raise DoesNotFit(f"what the blocks compute is kept in {dotted(place)}", step.node)
    if isinstance(step.node, cst.Expr) and isinstance(step.node.value, cst.Call):
        call = step.node.value
        subject = call.func.value if isinstance(call.func, cst.Attribute) else None
        told = dotted(call.func) or ""
        if (
            told != "print"
            and (subject is None or not is_local(subject))
            and any(holds(arg.value) for arg in call.args)
        ):
            raise DoesNotFit(f"what the blocks compute is given to {told}", step.node)


def _nested(step: Step) -> bool:
    return any(isinstance(node, cst.FunctionDef) for node, _ in step.chain)


def _from_blocks(
    scope: Scope, used: Iterable[str], step: Step, loops: list[cst.For], grown: set[str], hidden: Hidden
) -> str | None:
    """The first of the names whose value may be made by the blocks other than through the hidden state."""
    pending = [(name, step) for name in used]
    seen: set[tuple[str, int]] = set()
    while pending:
        name, at = pending.pop()
        if (name, at.index) in seen:
            continue
        seen.add((name, at.index))
        first = hidden.first
        asked = hidden.cut_at(first) is None and name == hidden.name and at.index >= first.index
        if asked and not any(first.index <= b.step.index < at.index for b in scope.bindings.get(name, ())):
            continue  # asked for in a statement of its own before this one
        if name in grown and not _renewed(scope, name, at, hidden):
            return name
        for binding in scope.reaching(name, at):
            if is_made_by(binding.step, loops):
                return name
            cut = hidden.cut_at(binding.step)
            if cut is not None:
                inner = Counter(value_names(binding.value)) if binding.value is not None else Counter[str]()
                pending += [(other, binding.step) for other in inner - Counter(value_names(cut))]
            elif binding.value is not None:
                pending += [(other, binding.step) for other in value_names(binding.value)]
    return None


def _renewed(scope: Scope, name: str, at: Step, hidden: Hidden) -> bool:
    """Whether a name has another value by then: `x[:, n:] += y` among the blocks is gone after `x = x[:, n:]`."""
    bindings = scope.reaching(name, at)
    later = all(binding.step.index >= hidden.first.index and not binding.augmented for binding in bindings)
    return later and scope.is_definite(bindings, at)


def _grown(scope: Scope, loops: list[cst.For], start: int, end: int) -> Iterator[str]:
    """Local names whose value is changed in place while the blocks run: `features.append(img)`, `features[i] = img`."""
    for step in scope.steps:
        if not start < step.index < end:
            continue
        if isinstance(step.node, cst.Expr) and isinstance(step.node.value, cst.Call):
            function = step.node.value.func
            changed = dotted(function.value) if isinstance(function, cst.Attribute) else None
            if changed is not None and changed != scope.receiver and not changed.startswith(f"{scope.receiver}."):
                yield changed
        for target in step.node.targets if isinstance(step.node, cst.Assign) else ():
            if isinstance(target.target, cst.Subscript):
                changed = dotted(target.target.value)
                if changed is not None and not changed.startswith(f"{scope.receiver}."):
                    yield changed


def _read(step: Step) -> tuple[cst.CSTNode, ...]:
    """The expressions of a statement whose values it uses: all but the names that an assignment gives a value to."""
    if isinstance(step.node, (cst.Assign, cst.AnnAssign)):
        return () if step.node.value is None else (step.node.value,)
    return step.expressions
