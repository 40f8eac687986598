"""How the first linear's output becomes the MLP's input: by a split, by slices, at once or held in a variable."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace

import libcst as cst

from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.mlps.looking import Look, has_one_argument, whole_line
from chipmunk.rewrite.mlps.pieces import First, Held, reads
from chipmunk.rewrite.syntax import dotted, elements, integer, is_call, target_names, walk


@dataclass(frozen=True)
class Cuts:
    """The cuts of first linears in one function."""

    look: Look

    def first(
        self, value: cst.BaseExpression, step: Step, path: tuple[int, ...], passed: list[Held]
    ) -> tuple[First, list[Held]] | None:
        """The first linear that an expression is cut from."""
        if isinstance(value, cst.Call) and not path:
            linear = self.look.linear(value.func)
            if linear is not None and has_one_argument(value):
                return First(value, step, False, *linear, "mlp_linear", value), []
            if self.look.runtime(value, step) == "mlp_linear" and len(value.args) == 3:
                linear = self.look.linear(value.args[1].value)
                return None if linear is None else (First(value, step, True, *linear, "mlp_linear"), [])
        if isinstance(value, cst.Subscript) and not path and passed:
            return self._slice(value, step)
        node = step.node
        if not isinstance(node, cst.Assign) or len(node.targets) != 1 or len(path) > 1:
            return None
        names = target_names(node.targets[0].target)
        parts = len(names)
        if parts < 2 or [place for _, place in names] != [(index,) for index in range(parts)]:
            return None
        if isinstance(value, cst.Call) and node.value is value and len(path) == 1 and path[0] in (0, parts - 1):
            return self._split(value, step, parts, path[0] == 0)
        return None

    def pair(self, value: cst.BaseExpression, step: Step, places: tuple[int, int]) -> tuple[First, list[Held]] | None:
        """The first linear whose output is cut into more than two parts, of which a gate and a value are two.

        They must be the last two or the first two: `qkv, gate, value = torch.split(…, [3 * c, f, f], dim=-1)`.
        """
        node = step.node
        if not isinstance(value, cst.Call) or not isinstance(node, cst.Assign) or len(node.targets) != 1:
            return None
        parts = [place for _, place in target_names(node.targets[0].target)]
        count, pair = len(parts), tuple(sorted(places))
        if count < 3 or parts != [(index,) for index in range(count)] or node.value is not value:
            return None
        if pair not in ((0, 1), (count - 2, count - 1)):
            return None
        found = self._split(value, step, count, pair[0] == 0)
        if found is not None:
            found[0].gated = True
        return found

    def _split(self, call: cst.Call, step: Step, parts: int, mlp_first: bool) -> tuple[First, list[Held]] | None:
        """`torch.split(…, [a, b], dim=-1)`, `….split([a, b], -1)` or `….chunk(2, -1)` of a linear's output."""
        done = self.look.runtime(call, step)
        if done == "split_linear" and len(call.args) >= 4:
            linear = self.look.linear(call.args[1].value)
            return None if linear is None else (First(call, step, True, *linear, done, mlp_first=mlp_first), [])
        if done == "split_held" and len(call.args) >= 3:
            return self._held(call.args[1].value, step, First(call, step, True, kind=done, mlp_first=mlp_first))
        if not is_call(call, "split", "split_with_sizes", "chunk") or not isinstance(call.func, cst.Attribute):
            return None
        arguments, inner = list(call.args), call.func.value
        is_function = isinstance(inner, cst.Name) and not self.look.scope.reaching(inner.value, step)
        if is_function and arguments:
            inner = arguments.pop(0).value
        sizes = next((a for i, a in enumerate(arguments) if _is(a, i, 0, *_SIZES)), None)
        dim = next((a for i, a in enumerate(arguments) if _is(a, i, 1, "dim")), None)
        if sizes is None or len(arguments) != 2 or dim is None or integer(dim.value) not in (2, -1):
            return None
        shares = integer(sizes.value) if is_call(call, "chunk") else None
        if (shares or len(elements(sizes.value) or [])) != parts:
            return None
        first = First(call, step, False, kind="split_linear", mlp_first=mlp_first)
        first.sizes, first.dim, first.shares = sizes, dim, shares or 0
        if isinstance(inner, cst.Call):
            linear = self.look.linear(inner.func)
            if linear is None or not has_one_argument(inner):
                return None
            first.linear, first.linear_text, first.linear_call = *linear, inner
            return first, []
        first.kind = "split_held"
        return self._held(inner, step, first)

    def _slice(self, value: cst.Subscript, step: Step) -> tuple[First, list[Held]] | None:
        """`x[..., n:]` of a linear's output held in x, beside `x[..., :n]` in the same statement or the next one."""
        code, cut = self.look.where.function.source.code, cut_at(value)
        if cut is None:
            return None
        first = First(value, step, False, kind="split_held", mlp_first=cut[0] is None)
        found = self._held(value.value, step, first)
        if found is None:
            return None
        held = found[1]
        readers = reads(self.look.scope, held[0].binding, shape=True)
        slices = [
            (node, at)
            for at in self.look.scope.steps
            for expression in at.expressions
            for node in walk(expression)
            if isinstance(node, cst.Subscript) and node.value in readers
        ]
        if len(slices) != 2 or len(readers) != 2:
            return None
        other, place = next(pair for pair in slices if pair[0] is not value)
        counterpart = cut_at(other)
        if counterpart is None or (counterpart[0] is None) == (cut[0] is None):
            return None
        edges = sorted((code(edge_of(cut)), code(edge_of(counterpart))), key=len)
        if _tree(edges[0]) != _tree(edges[1]):
            return None
        first.sizes = f"[{edges[0]}, -1]"
        if place is step:
            assert isinstance(step.node, cst.Assign)
            if elements(step.node.value) != ([value, other] if first.mlp_first else [other, value]):
                return None
            first.call = step.node.value
        else:
            for at in (step, place):
                plain = isinstance(at.node, cst.Assign) and len(at.node.targets) == 1 and at.chain == step.chain
                plain = plain and whole_line(self.look.where.function.source, at.node) is not None
                if not plain or not isinstance(at.node.targets[0].target, cst.Name):  # type: ignore[attr-defined]
                    return None
            first.step, first.later = sorted((step, place), key=lambda s: s.index)
            first.call = first.step.node
        return first, [replace(held[0], readers=tuple(readers)), *held[1:]]

    def _held(self, value: cst.BaseExpression, step: Step, first: First) -> tuple[First, list[Held]] | None:
        """A linear's output that a variable holds before it is cut."""
        call, at, path, held = self.look.follow(value, step, shape=True)
        if not isinstance(call, cst.Call) or path or not held or at.chain != step.chain:
            return None
        if self.look.runtime(call, at) == "held_linear" and len(call.args) == 3:
            linear = self.look.linear(call.args[1].value)
        elif has_one_argument(call):
            linear, first.linear_call = self.look.linear(call.func), call
        else:
            return None
        if linear is None:
            return None
        first.linear, first.linear_text, first.held_text = *linear, dotted(value) or ""
        return first, held


_SIZES = ("split_size_or_sections", "split_size", "split_sizes", "chunks")


def _is(arg: cst.Arg, index: int, position: int, *names: str) -> bool:
    return arg.keyword.value in names if arg.keyword is not None else index == position and not arg.star


def cut_at(node: cst.CSTNode | None) -> tuple[cst.BaseExpression | None, cst.BaseExpression | None] | None:
    """Where `x[..., a:b]` or `x[:, :, a:b]` is cut, if it is cut at one end and along its last dimension."""
    if not isinstance(node, cst.Subscript):
        return None
    parts = [part.slice for part in node.slice]
    last = parts[-1]
    if not isinstance(last, cst.Slice) or last.step is not None or (last.lower is None) == (last.upper is None):
        return None
    dots = [p for p in parts[:-1] if isinstance(p, cst.Index) and isinstance(p.value, cst.Ellipsis)]
    whole = [p for p in parts[:-1] if isinstance(p, cst.Slice) and p.lower is None and p.upper is None]
    if not (len(parts) == 2 and dots) and not (len(parts) == 3 and len(whole) == 2):
        return None
    return last.lower, last.upper


def _tree(expression: str) -> str:
    """What two expressions have in common that differ in their layout only."""
    return ast.dump(ast.parse(f"({expression}\n)", mode="eval"))


def edge_of(cut: tuple[cst.BaseExpression | None, cst.BaseExpression | None]) -> cst.BaseExpression:
    edge = cut[0] or cut[1]
    assert edge is not None
    return edge
