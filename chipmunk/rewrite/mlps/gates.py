"""SwiGLU written out: `silu(gate) * value`, of the halves of one linear's output or of the outputs of two linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import libcst as cst

from chipmunk.rewrite.building import Layer, built_as, is_torch
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.layers import Mlp
from chipmunk.rewrite.mlps.cuts import Cuts, cut_at, edge_of
from chipmunk.rewrite.mlps.looking import Look, has_one_argument
from chipmunk.rewrite.mlps.pieces import Activation, First, Held
from chipmunk.rewrite.syntax import argument, dotted, elements, integer, is_call, target_names


@dataclass(frozen=True)
class _Half:
    """One half of a value. `whole`: the value, as the cut names it; `index`: which half."""

    whole: cst.BaseExpression
    cut: cst.BaseExpression
    step: Step
    index: int
    held: list[Held]


@dataclass(frozen=True)
class Gates:
    """The products of a gate and a value in one function."""

    look: Look

    def found(self, value: cst.BaseExpression, step: Step) -> tuple[Activation, list[First], list[Held]] | None:
        """The product, or Chipmunk's form of it, with the linears that make its factors: one, or the gate's first."""
        for callee, gate, other, done in self._products(value, step):
            forms = (self._by_two_linears, self._by_halves, self._by_parts)
            made = next((made for form in forms if (made := form(gate, other, step)) is not None), None)
            if made is not None:
                firsts, held, value_first = made
                mlp = Mlp("swiglu_value_first" if value_first else "swiglu")
                text = self.look.where.function.source.code(callee)
                activation = Activation(value, step, done, text=text, mlp=mlp, inside=False, gate=gate, value=other)
                return activation, firsts, held
        return None

    def _products(
        self, value: cst.BaseExpression, step: Step
    ) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression, cst.BaseExpression, bool]]:
        if isinstance(value, cst.Call) and self.look.runtime(value, step) == "gated" and len(value.args) >= 4:
            yield value.args[1].value, value.args[2].value, value.args[3].value, True
        if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.Multiply):
            return
        if "#" in self.look.where.function.source.code(value):
            return  # a comment between the factors
        for gate, other in ((value.left, value.right), (value.right, value.left)):
            if not isinstance(gate, cst.Call) or not has_one_argument(gate) or gate.args[0].keyword is not None:
                continue
            if self._is_silu(gate.func, step):
                yield gate.func, gate.args[0].value, other, False

    def _is_silu(self, callee: cst.BaseExpression, step: Step) -> bool:
        repository, where = self.look.context.repository, self.look.where
        attribute = where.attribute(repository, callee)
        if attribute is not None:
            built = built_as(repository, attribute.owner, attribute.name)
            return any(isinstance(each, Layer) and each.kind == "silu" for each in built)
        receivers = {where.block_name, where.module_name, where.function.scope.receiver}
        is_own = where.function.owner is not None and (dotted(callee) or "").split(".")[0] in receivers
        return not is_own and dotted(callee) is not None and is_torch(repository, callee, "silu", where.function, step)

    # Two linears

    def _by_two_linears(
        self, gate: cst.BaseExpression, other: cst.BaseExpression, step: Step
    ) -> tuple[list[First], list[Held], bool] | None:
        firsts: list[First] = []
        passed: list[Held] = []
        inputs: list[tuple[str, object]] = []
        for half, operand in (("gate", gate), ("value", other)):
            call, at, path, held = self.look.follow(operand, step)
            if not isinstance(call, cst.Call) or path:
                return None
            done = self.look.runtime(call, at) == "mlp_linear" and len(call.args) == 4
            if not done and not has_one_argument(call):
                return None
            linear = self.look.linear(call.args[1].value if done else call.func)
            given = dotted(call.args[2 if done else 0].value)
            if linear is None or given is None:
                return None
            firsts.append(First(call, at, done, *linear, "mlp_linear", call, half=half, inline=not held))
            passed += held
            inputs.append((given, self.look.scope.reaching(given.split(".")[0], at)))
        if inputs[0] != inputs[1] or firsts[0].linear == firsts[1].linear:
            return None
        return firsts, passed, False

    # Two of the parts of one linear's output

    def _by_parts(
        self, gate: cst.BaseExpression, other: cst.BaseExpression, step: Step
    ) -> tuple[list[First], list[Held], bool] | None:
        value, at, path, held = self.look.follow(gate, step)
        again, _, other_path, other_held = self.look.follow(other, step)
        if again is not value or len(path) != 1 or len(other_path) != 1 or path == other_path:
            return None
        found = Cuts(self.look).pair(value, at, (path[0], other_path[0]))
        return None if found is None else ([found[0]], [*held, *other_held, *found[1]], path > other_path)

    # Two halves

    def _by_halves(
        self, gate: cst.BaseExpression, other: cst.BaseExpression, step: Step
    ) -> tuple[list[First], list[Held], bool] | None:
        first, second = self._half(gate, step), self._half(other, step)
        if first is None or second is None or {first.index, second.index} != {0, 1}:
            return None
        if first.cut is not second.cut:  # two slices, of one variable at one place
            if not (isinstance(first.cut, cst.Subscript) and isinstance(second.cut, cst.Subscript)):
                return None
            edges = [edge_of(cut) for half in (first, second) if (cut := cut_at(half.cut)) is not None]
            code = self.look.where.function.source.code
            if len(edges) != 2 or code(edges[0]) != code(edges[1]) or not isinstance(first.whole, cst.Name):
                return None
        value, at, path, passed = self.look.follow(first.whole, first.step, shape=True)
        if first.cut is not second.cut:
            again = self.look.follow(second.whole, second.step, shape=True)
            if again[0] is not value or [h.binding for h in again[3]] != [h.binding for h in passed]:
                return None
            pairs = zip(passed, again[3], strict=True)
            passed = [replace(one, readers=(*one.readers, *two.readers)) for one, two in pairs]
        found = Cuts(self.look).first(value, at, path, passed)
        if found is None:
            return None
        made, more = found
        return [made], [*first.held, *second.held, *passed, *more], first.index == 1

    def _half(self, operand: cst.BaseExpression, step: Step) -> _Half | None:
        value, at, path, held = self.look.follow(operand, step, shape=True)
        if isinstance(value, cst.Subscript) and not path:
            cut = cut_at(value)
            return None if cut is None else _Half(value.value, value, at, 0 if cut[0] is None else 1, held)
        node = at.node
        if len(path) != 1 or not isinstance(node, cst.Assign) or len(node.targets) != 1 or node.value is not value:
            return None
        if [place for _, place in target_names(node.targets[0].target)] != [(0,), (1,)]:
            return None
        whole = self._cut_in_two(value, at)
        return None if whole is None else _Half(whole, value, at, path[0], held)

    def _cut_in_two(self, call: cst.BaseExpression, step: Step) -> cst.BaseExpression | None:
        """What `x.chunk(2, dim=-1)`, `torch.split(x, n, -1)` or `x.unflatten(-1, (2, -1)).unbind(-2)` cuts in two.

        Of a split in two parts whose product is taken, both are as wide.
        """
        if not isinstance(call, cst.Call) or not isinstance(call.func, cst.Attribute):
            return None
        whole, shift = call.func.value, 0
        if isinstance(whole, cst.Name) and not self.look.scope.reaching(whole.value, step):
            if whole.value in self.look.scope.parameters or not call.args or call.args[0].star:
                return None
            whole, shift = call.args[0].value, 1
        dim = integer(argument(call, shift + 1, "dim"))
        if is_call(call, "chunk", "tensor_split") and integer(argument(call, shift, "chunks", "sections")) == 2:
            return whole if dim in (2, -1) else None
        if is_call(call, "split", "split_with_sizes") and dim in (2, -1):
            return whole
        if is_call(call, "unbind") and integer(argument(call, shift, "dim")) in (2, -2) and not shift:
            if not is_call(whole, "unflatten") or not isinstance(whole.func, cst.Attribute):
                return None
            sizes = elements(argument(whole, 1, "sizes")) or []
            if integer(argument(whole, 0, "dim")) in (2, -1) and len(sizes) == 2 and integer(sizes[0]) == 2:
                return whole.func.value
        return None
