"""The image's tokens: which parameters hold them and their positions, and what forbids another order of them."""

from __future__ import annotations

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, mentions, value_names
from chipmunk.rewrite.passes import CONCATENATIONS, Pass, first_names
from chipmunk.rewrite.repository import Function
from chipmunk.rewrite.syntax import dotted, elements, is_call, parameters, walk


def image_parameter(scope: Scope, image: str, double: Pass) -> tuple[str | None, set[str]]:
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


def ids_parameter(
    scope: Scope, passes: tuple[Pass, Pass], place: int | None, streams: set[str]
) -> tuple[str | None, str]:
    """The parameter with the image tokens' positions: concatenated with the text's on the way to the blocks."""
    for found in passes if place is not None else ():
        joined: list[tuple[int, str]] = []
        for arg in found.given:
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


def other_spatial(
    method: Function, double: Pass, single: Pass, image: str, streams: set[str], others: set[str]
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
                and first_names(value)[:1] != [binding.name]  # more tokens behind the image's: a reference image
            ):
                found.append(frozenset({name}))
    names = frozenset().union(*found)
    optional = {p.name.value for p in parameters(method.node) if p.default is not None}
    if names <= optional:
        return "", tuple(name for name in scope.parameters if name in names)
    # What the blocks are given beside the streams is in what they compute: what is left says more.
    given = [arg.value for arg in double.given if dotted(arg.value) not in streams]
    listed = ", ".join(sorted(names - {image}.union(*(scope.roots(each, double.step) for each in given)) or names))
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
