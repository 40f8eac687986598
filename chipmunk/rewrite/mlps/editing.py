"""Changing the calls of an MLP that a function computes itself into Chipmunk's."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.mlps.cuts import cut_at
from chipmunk.rewrite.mlps.looking import whole_line
from chipmunk.rewrite.mlps.pieces import Activation, First, Piece, Pieces, Second, why_dense
from chipmunk.rewrite.mlps.whole import is_gathered
from chipmunk.rewrite.roles import Block
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import dotted, walk


def patch_pieces(context: Context, block: Block, found: list[Pieces]) -> None:
    """Change the calls of the MLPs, or leave them dense for their reason."""
    taken: list[Pieces] = []
    for mlp in found:
        source, problem = mlp.where.function.source, why_dense(mlp, taken) or _why_gathered(mlp)
        if problem:
            context.left_dense(mlp.begins.function.source, mlp.first.call, problem)
            context.left_dense(source, mlp.second.call, problem)
            continue
        taken.append(mlp)
        _patch(context, block, mlp)


def _why_gathered(mlp: Pieces) -> str:
    """Why an MLP beside the attention must stay dense for what it is given; empty if it may be sparse."""
    given = mlp.first.linear_call
    if not mlp.second.alone or mlp.first.done or given is None:
        return ""
    scope, streams = mlp.where.function.scope, set(mlp.where.streams)
    gathered = is_gathered(scope, given.args[0].value, mlp.first.step, streams)
    return "the MLP sees only some of the tokens" if gathered else ""


def _patch(context: Context, block: Block, mlp: Pieces) -> None:
    first, activation, second = mlp.first, mlp.activation, mlp.second
    source, layer = mlp.where.function.source, mlp.where.layer
    assert layer is not None
    assert first.linear is not None
    assert second.linear is not None
    block.linear_in, block.linear_out = mlp.linear_in, second.linear.path
    block.mlp_alone = second.alone
    block.gated = activation.mlp.gated
    block.mlp_first_in, block.mlp_first_out = first.mlp_first, second.mlp_first
    edits = _Edits(context, source, layer, context.runtime(source))
    begins, begin_layer = mlp.begins.function.source, mlp.begins.layer
    assert begin_layer is not None
    begin_edits = _Edits(context, begins, begin_layer, context.runtime(begins))
    for each in mlp.firsts:
        what = f"{each.linear_text} makes query, key, value and the MLP's input in one go"
        if each.kind == "mlp_linear":
            what = f"{each.linear_text} makes the MLP's {each.half or 'input'}"
        _report(context, begins, each, what, "the first linear is Chipmunk's")
        if not each.done and not each.inline:
            begin_edits.first(each)
    if not activation.inside:
        _report(context, source, activation, "the MLP's activation", "the activation is Chipmunk's")
        if not activation.done and activation.gate is not None:
            edits.product(activation, mlp)
        elif not activation.done:
            edits.activation(activation)
    what = f"{second.linear_text} takes the attention and the activated MLP part together"
    if second.alone:
        what = f"{second.linear_text} takes the activated MLP part"
    _report(context, source, second, what, "the second linear is Chipmunk's")
    if not second.done:
        edits.second(second, activation)


def _report(context: Context, source: Source, piece: Piece, what: str, already: str) -> None:
    if piece.done:
        context.already(source, piece.call, already)
    else:
        context.patched(source, piece.call, what)


@dataclass(frozen=True)
class _Edits:
    """The edits of one MLP's calls. Expressions that stay are left where they are: others may be edited in them."""

    context: Context
    source: Source
    layer: str
    runtime: str

    def first(self, first: First) -> None:
        linear = first.linear_call
        assert linear is not None
        if first.kind != "split_linear":
            name = "mlp_linear" if first.kind == "mlp_linear" else "held_linear"
            self._call(linear, name, [self.layer, first.linear_text])
        if first.half:
            self.context.append_argument(self.source, linear, f'half="{first.half}"')
        if first.kind == "mlp_linear":
            return
        if first.shares:
            assert isinstance(first.sizes, cst.Arg)
            self.context.replace(self.source, first.sizes.value, f"[{', '.join(['-1'] * first.shares)}]")
        end = (", mlp_first=True" if first.mlp_first else "") + (", gated=True" if first.gated else "")
        if isinstance(first.sizes, str):
            self._slices(first, f"{self.runtime}.split_held({self.layer}, {first.held_text}, {first.sizes}{end})")
            return
        call = first.call
        assert isinstance(call, cst.Call)
        assert first.dim is not None
        (start, _), value = self.source.span(call.func), self.source.span(first.sizes.value)
        self.context.edit(self.source, value[1], self.source.span(first.dim)[1], end)
        if first.kind == "split_linear":
            given = self.source.span(linear.args[0].value)
            head = f"{self.runtime}.split_linear("
            lines = call.args[0].value is linear and self.source.starts_line(linear)
            separator = ",\n" + self.source.indentation(linear) if lines else ", "
            inputs = f"{self.layer}{separator}{first.linear_text}{separator}"
            if call.args[0].value is linear:  # a function: the arguments stay where they are
                self.context.replace(self.source, call.func, head[:-1])
                self.context.edit(self.source, self.source.span(linear)[0], given[0], inputs)
                self.context.edit(self.source, given[1], self.source.span(linear)[1], "")
                if first.sizes.keyword is not None:
                    self.context.edit(self.source, self.source.span(first.sizes)[0], value[0], "")
            else:
                self.context.edit(self.source, start, given[0], head + inputs)
                self.context.edit(self.source, given[1], value[0], ", ")
        elif dotted(call.args[0].value) == first.held_text:
            self._call(call, "split_held", [self.layer])
            if first.sizes.keyword is not None:
                self.context.edit(self.source, self.source.span(first.sizes)[0], value[0], "")
        else:
            head = f"{self.runtime}.split_held({self.layer}, {first.held_text}, "
            self.context.edit(self.source, start, value[0], head)

    def _slices(self, first: First, call: str) -> None:
        if first.later is None:
            self.context.replace(self.source, first.call, call)
            return
        nodes = (first.step.node, first.later.node)
        names = {}
        for node in nodes:
            assert isinstance(node, cst.Assign)
            names[(cut_at(node.value) or (None, None))[0] is None] = dotted(node.targets[0].target)
        self.context.replace(self.source, first.call, f"{names[True]}, {names[False]} = {call}")
        line = whole_line(self.source, nodes[1])
        assert line is not None
        self.context.edit(self.source, *line, "")

    def activation(self, activation: Activation) -> None:
        call = activation.call
        assert isinstance(call, cst.Call)
        start, end = self.source.span(call.args[0].value)
        if isinstance(call.args[0].value, cst.Call):  # which changes too, from its first letter on
            head = f"{self.runtime}.activate({self.layer}, {activation.text}, "
            self.context.edit(self.source, self.source.span(call.func)[0], start, head)
        else:
            self._call(call, "activate", [self.layer, activation.text])
        self.context.edit(self.source, end, self.source.span(call.args[-1])[1], _options(activation))

    def product(self, activation: Activation, mlp: Pieces) -> None:
        """A gate times a value; the calls of two linears change with it where they stand in it."""
        given = [activation.text]
        for first, operand in zip([mlp.first, *(mlp.others or [mlp.first])], _operands(activation), strict=True):
            code = self.source.code(operand)
            if first.inline and not first.done:
                assert isinstance(first.call, cst.Call)
                value = self.source.code(first.call.args[0].value)
                code = f'{self.runtime}.mlp_linear({self.layer}, {first.linear_text}, {value}, half="{first.half}")'
            given.append(code)
        end = ", value_first=True" if activation.mlp.activation == "swiglu_value_first" else ""
        text = f"{self.runtime}.gated({self.layer}, {', '.join(given)}{end})"
        self.context.replace(self.source, activation.call, text)

    def second(self, second: Second, activation: Activation) -> None:
        call, cat = second.call, second.cat
        assert isinstance(call, cst.Call)
        if second.alone:
            head = f"{self.runtime}.out_linear({self.layer}, {second.linear_text}, "
            start, end = self.source.span(call.func)[0], self.source.span(call.args[0].value)[0]
            self.context.edit(self.source, start, end, head)
            return
        assert cat is not None
        assert second.attention is not None
        assert second.active is not None
        outer = self.source.span(call if any(node is cat for node in walk(call)) else cat)
        if outer == self.source.span(cat):  # held in a variable: the linear moves to where the parts are concatenated
            self._unwrap(call, second.call_step)
        head = f"{self.runtime}.cat_linear({self.layer}, {second.linear_text}, "
        between = f", {activation.text}, " if activation.inside else ", None, "
        last = activation.argument if activation.inside else second.active
        assert last is not None
        tail = (_options(activation) if activation.inside else "") + (", mlp_first=True" if second.mlp_first else "")
        if second.mlp_first:
            text = f"{head}{self.source.code(second.attention)}{between}{self.source.code(last)}{tail})"
            self.context.edit(self.source, *outer, text)
            return
        attention, active = self.source.span(second.attention), self.source.span(last)
        self.context.edit(self.source, outer[0], attention[0], head)
        self.context.edit(self.source, attention[1], active[0], between)
        self.context.edit(self.source, active[1], outer[1], f"{tail})")

    def _unwrap(self, call: cst.Call, step: Step | None) -> None:
        """Leave of a call what it is given; of `x = f(x)`, nothing."""
        (start, end), given = self.source.span(call), self.source.span(call.args[0].value)
        node = step.node if step is not None else None
        if isinstance(node, cst.Assign) and node.value is call and len(node.targets) == 1:
            line = whole_line(self.source, node)
            if line is not None and dotted(node.targets[0].target) == dotted(call.args[0].value):
                self.context.edit(self.source, *line, "")
                return
        self.context.edit(self.source, start, given[0], "")
        self.context.edit(self.source, given[1], end, "")

    def _call(self, call: cst.Call, name: str, given: list[str]) -> None:
        """Make it a call of the runtime's, with arguments before those it has."""
        self.context.replace(self.source, call.func, f"{self.runtime}.{name}")
        self.context.prepend_arguments(self.source, call, given, drop_keyword=True)


def _operands(activation: Activation) -> tuple[cst.BaseExpression, cst.BaseExpression]:
    assert activation.gate is not None
    assert activation.value is not None
    return activation.gate, activation.value


def _options(activation: Activation) -> str:
    """What the runtime is to be told of an activation of the repository's own."""
    return f', kind="{activation.mlp.activation}", of="{activation.mlp.of}"' if activation.mlp.of else ""
