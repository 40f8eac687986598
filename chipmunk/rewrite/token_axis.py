"""What single expressions do along the axis of tokens, and where a statement stores what: told by their form alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import libcst as cst

from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.syntax import dotted, elements, integer, is_call, last_name, self_attribute, text_of_string, walk

_SHAPES = ("reshape", "view", "unflatten")
_EINOPS = ("rearrange", "reduce", "repeat")
_STORING = ("append", "extend", "update", "insert")
_FILLED = ("zeros", "ones", "empty", "randn", "rand", "full", "normal")


def takes_apart(name: str, call: cst.Call) -> bool:
    """Whether a call of a function of that name makes rows and columns of the tokens' axis."""
    return (name in _EINOPS and _splits_tokens(call)) or (name in _SHAPES and _makes_grid(call))


def _makes_grid(call: cst.Call) -> bool:
    """Whether a shape has rows and columns: `x.reshape(batch, h, w, -1)`, or `x.view(side, side)`."""
    sizes = [size for arg in call.args for size in (elements(arg.value) or [arg.value])]
    names = [(dotted(size) or "").rpartition(".")[2].lower() for size in sizes]
    return any(_are_sides(first, second) for first, second in pairwise(names) if first)


def _are_sides(first: str, second: str) -> bool:
    if first == second or (first.replace("height", "width"), first.replace("row", "col")).count(second) == 1:
        return True
    return any(first[:at] + "w" + first[at + 1 :] == second for at, letter in enumerate(first) if letter == "h")


def is_for_maps(step: Step) -> bool:
    """Whether it runs where there are rows and columns already, no tokens: `if input_ndim == 4:`."""
    tests = [node.test for node, branch in step.chain if isinstance(node, cst.If) and branch == "body"]
    compared = [(test.left, test.comparisons) for test in tests if isinstance(test, cst.Comparison)]
    return any((dotted(left) or "").endswith("ndim") and integer(right[0].comparator) == 4 for left, right in compared)


def is_torch_function(name: str | None) -> bool:
    """`torch.ones`, and not a layer or a cast: its name begins small."""
    return name is not None and name.startswith("torch.") and name.count(".") == 1 and name[6:7].islower()


def own_attribute(node: cst.CSTNode, receiver: str) -> str | None:
    """`table` of `self.table`, `self.table[:, :n]` and `self.table.to(x)`."""
    while True:
        name = self_attribute(node, receiver)
        if name is not None:
            return name
        if isinstance(node, cst.Subscript):
            node = node.value
        elif isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
            node = node.func.value
        else:
            return None


def is_alike_for_all(table: cst.BaseExpression) -> bool:
    """Whether a table is made with one row at most, or with one number for each channel."""
    for call in walk(table):
        if isinstance(call, cst.Call) and last_name(call.func) in _FILLED and call.args:
            sizes = [arg.value for arg in call.args if arg.keyword is None]
            sizes = elements(sizes[0]) or sizes if sizes else []
            return len(sizes) < 2 or integer(sizes[-2]) == 1
        if isinstance(call, cst.Call) and last_name(call.func) in ("tensor", "as_tensor") and call.args:
            return elements(call.args[0].value) is None
    return False


def along_tokens(axes: cst.BaseExpression | None, call: cst.Call) -> bool:
    """Whether an axis, or one of several, may be the tokens'."""
    given = [axes] if axes is not None else []
    if last_name(call.func) == "flip" and axes is not None:
        given = [arg.value for arg in call.args if integer(arg.value) is not None or elements(arg.value) is not None]
        given = given or [axes]
    for each in given:
        for axis in elements(each) or [each]:
            if integer(axis) not in (0, -1, 3):
                return True
    return not given


def is_fixed_slice(node: cst.Subscript) -> bool:
    """Whether it cuts the tokens' axis at a number that is written out: `x[:, :512]`, `keys[:, :, 512:, :]`."""
    parts = node.slice
    if any(isinstance(p.slice, cst.Index) and isinstance(p.slice.value, cst.Ellipsis) for p in parts[:3]):
        return False
    for place in {2: (1,), 3: (1,), 4: (1, 2)}.get(len(parts), ()):
        cut = parts[place].slice
        if isinstance(cut, cst.Slice) and any(integer(end) for end in (cut.lower, cut.upper, cut.step)):
            return True
    return False


def _splits_tokens(call: cst.Call) -> bool:
    """Whether the axis before the last is taken apart: `b (h w) c -> …`, `b c (h w) d -> …`."""
    pattern = text_of_string(call.args[1].value) if len(call.args) > 1 else None
    if pattern is None or "->" not in pattern:
        return False
    axes = re.findall(r"\([^)]*\)|\S+", pattern.partition("->")[0])
    inner = axes[-2] if len(axes) > 2 else ""
    return inner.startswith("(") and len(inner.strip("()").split()) > 1


def stored(step: Step) -> Iterator[tuple[cst.BaseExpression, frozenset[str], cst.BaseExpression]]:
    """What the statement stores last, and where: the innermost thing that is no element of another, and the keys."""
    if isinstance(step.node, cst.Expr) and is_call(step.node.value, *_STORING):
        function = step.node.value.func
        if isinstance(function, cst.Attribute):
            yield from ((holder(function.value), keys_in(function.value), arg.value) for arg in step.node.value.args)
    for target in step.node.targets if isinstance(step.node, cst.Assign) else ():
        assert isinstance(step.node, cst.Assign)
        places = elements(target.target) or [target.target]
        values = elements(step.node.value) or [step.node.value] * len(places)
        for place, value in zip(places, values, strict=False):
            if not isinstance(place, cst.Name):
                yield holder(place), keys_in(place), value


def holder(node: cst.BaseExpression) -> cst.BaseExpression:
    """What a chain of subscripts begins with: `info` of `info["keys"][name]`."""
    while isinstance(node, cst.Subscript):
        node = node.value
    return node


def keys_in(node: cst.BaseExpression) -> frozenset[str]:
    """The keys of a chain of subscripts that are written out: `keys` of `info["keys"][name]`."""
    found: set[str] = set()
    while isinstance(node, cst.Subscript):
        written = [text_of_string(part.slice.value) for part in node.slice if isinstance(part.slice, cst.Index)]
        found.update(key for key in written if key is not None)
        node = node.value
    return frozenset(found)


def elements_read(step: Step) -> Iterator[frozenset[str]]:
    """Of each element that the statement reads, the keys that are written out; where there are none, what it is of."""
    parts: list[cst.CSTNode] = [part for part in step.expressions if not isinstance(part, cst.AssignTarget)]
    if (
        isinstance(step.node, cst.Expr)
        and isinstance(step.node.value, cst.Call)
        and is_call(step.node.value, *_STORING)
    ):
        parts = list(step.node.value.args)
    for part in parts:
        for node in walk(part):
            if isinstance(node, cst.Subscript):
                yield keys_in(node) or frozenset({dotted(holder(node)) or ""})
            elif isinstance(node, cst.Call) and is_call(node, "get", "pop", "popitem") and node.args:
                yield frozenset({text_of_string(node.args[0].value) or ""})
