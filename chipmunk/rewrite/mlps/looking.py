"""What the pieces of an MLP are looked for with, in one function."""

from __future__ import annotations

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.layers import builds_linear
from chipmunk.rewrite.mlps.pieces import Held
from chipmunk.rewrite.reach import Attribute, Reached
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import dotted


class Look:
    """One of the functions that a block runs."""

    def __init__(self, context: Context, where: Reached) -> None:
        self.context, self.where = context, where
        self.scope = where.function.scope

    def runtime(self, node: cst.CSTNode | None, step: Step) -> str | None:
        return self.context.runtime_call(node, self.where.function, step)

    def linear(self, node: cst.CSTNode | None) -> tuple[Attribute, str] | None:
        attribute = self.where.attribute(self.context.repository, node)
        if attribute is None or not builds_linear(self.context.repository, attribute.owner, attribute.name):
            return None
        return attribute, dotted(node) or ""

    def follow(
        self, value: cst.BaseExpression, step: Step, *, shape: bool = False
    ) -> tuple[cst.BaseExpression, Step, tuple[int, ...], list[Held]]:
        """What a variable stands for, through other variables, and which were passed; the value itself if none."""
        held: list[Held] = []
        path: tuple[int, ...] = ()
        while isinstance(value, cst.Name) and not path:
            bindings = self.scope.reaching(value.value, step)
            if len(bindings) != 1 or bindings[0].value is None or bindings[0].augmented:
                break
            if not self.scope.is_definite(bindings, step):
                break
            held.append(Held(bindings[0], (value,), shape))
            value, step, path = bindings[0].value, bindings[0].step, bindings[0].path
        return value, step, path, held


def has_one_argument(call: cst.Call) -> bool:
    return len(call.args) == 1 and not call.args[0].star


def whole_line(source: Source, node: cst.CSTNode) -> tuple[int, int] | None:
    """Where the lines of a statement start and end, its newline with them; None if it is not alone on them."""
    first, last = source.span(node)
    start, end = source.line_at(first)[0], source.line_at(last)[1]
    alone = not source.text[start:first].strip() and not source.text[last:end].strip()
    return (start, min(end + 1, len(source.text))) if alone else None
