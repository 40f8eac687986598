"""Finding the MLPs that a function computes itself, from the second linear back to the first."""

from __future__ import annotations

import libcst as cst

from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.layers import Mlp, activation_built, functional_activation
from chipmunk.rewrite.mlps.across import begun
from chipmunk.rewrite.mlps.cuts import Cuts
from chipmunk.rewrite.mlps.gates import Gates
from chipmunk.rewrite.mlps.looking import Look
from chipmunk.rewrite.mlps.pieces import Activation, Held, Pieces, Second
from chipmunk.rewrite.reach import Attribute, Reached
from chipmunk.rewrite.roles import CONCATENATIONS
from chipmunk.rewrite.syntax import argument, dotted, elements, integer, is_call


class Finder:
    """The MLPs in one function. `streams`: of which one may be that of an MLP without the attention."""

    def __init__(self, context: Context, where: Reached, *streams: set[str]) -> None:
        self.look, self.streams = Look(context, where), streams
        self.seconds = 0
        self.apart = 0
        """Second linears that stand in another branch, or under another `with`, than the concatenation they take."""
        self.several = 0
        """MLPs whose input is made in different branches."""

    def found(self) -> list[Pieces]:
        mlps: list[Pieces] = []
        for call, step in self.look.scope.calls:
            for second, held in self._second(call, step):
                self.seconds += not second.alone
                mlp = self._mlp(second, held)
                if mlp is not None and (not second.alone or self._is_on_stream(mlp)):
                    mlps.append(mlp)
        return mlps

    def _second(self, call: cst.Call, step: Step) -> list[tuple[Second, list[Held]]]:
        """The call as a linear over cat(attention, activation(mlp)), or Chipmunk's form of it."""
        if self.look.runtime(call, step) == "cat_linear" and len(call.args) >= 5:
            linear = self.look.linear(call.args[1].value)
            first = any(arg.keyword is not None and arg.keyword.value == "mlp_first" for arg in call.args)
            if linear is None:
                return []
            second = Second(call, step, True, *linear, None, call.args[2].value, call.args[4].value, first)
            return [(second, [])]
        if self.look.runtime(call, step) == "out_linear" and len(call.args) == 3:
            linear = self.look.linear(call.args[1].value)
            return [] if linear is None else [(_alone(call, step, linear, done=True), [])]
        linear = self.look.linear(call.func)
        if linear is None or len(call.args) != 1 or call.args[0].star:
            return []
        cat, at, path, held = self.look.follow(call.args[0].value, step)
        if not is_call(cat, *CONCATENATIONS):
            return [(_alone(call, step, linear, done=False), [])]
        if not cat.args or path:
            return []
        parts = elements(cat.args[0].value) or []
        if len(parts) != 2 or integer(argument(cat, 1, "dim", "axis")) not in (2, -1):
            return []
        if held and at.chain != step.chain:
            self.apart += 1
            return []
        return [
            (Second(call, at if held else step, False, *linear, cat, parts[i], parts[1 - i], i == 1, step), list(held))
            for i in (0, 1)
        ]

    def _mlp(self, second: Second, held: list[Held]) -> Pieces | None:
        """The whole MLP, if the second linear's active part is an activation of a first linear's output."""
        if second.done and not second.alone:
            assert isinstance(second.call, cst.Call)
            given = second.call.args[3].value
            if dotted(given) != "None":
                activation = self._activation_of(given, second.call, second.step)
                if activation is None:
                    return None
                activation.argument = second.call.args[4].value
                return self._with_first(second, activation, held)
        assert second.active is not None
        value, step, path, passed = self.look.follow(second.active, second.step)
        if path:
            return None
        product = Gates(self.look).found(value, step)
        if product is not None:
            gate, (first, *others), more = product
            return Pieces(self.look.where, second, gate, first, [*held, *passed, *more], others)
        if not isinstance(value, cst.Call):
            return None
        activation = self._activation(value, step)
        if activation is None:
            return None
        activation.inside = not passed and not second.done and not second.alone
        return self._with_first(second, activation, [*held, *passed])

    def _activation(self, call: cst.Call, step: Step) -> Activation | None:
        if self.look.runtime(call, step) == "activate" and len(call.args) >= 3:
            found = self._activation_of(call.args[1].value, call, step)
            if found is not None:
                found.argument, found.done, found.inside = call.args[2].value, True, False
            return found
        name = functional_activation(self.look.context.repository, call, self.look.where.function, step)
        if name is not None:
            return Activation(call, step, False, text=f'"{name}"', mlp=Mlp(name), argument=call.args[0].value)
        if len(call.args) != 1 or call.args[0].star or call.args[0].keyword is not None:
            return None
        found = self._activation_of(call.func, call, step)
        if found is not None:
            found.argument = call.args[0].value
        return found

    def _activation_of(self, node: cst.BaseExpression, call: cst.Call, step: Step) -> Activation | None:
        """The activation that the expression names: a module, or the name of a function."""
        if isinstance(node, cst.SimpleString):
            return Activation(call, step, False, text=node.value, mlp=Mlp(str(node.evaluated_value)))
        attribute = self.look.where.attribute(self.look.context.repository, node)
        if attribute is None:
            return None
        mlp = activation_built(self.look.context.repository, attribute.owner, attribute.name)
        return None if mlp is None else Activation(call, step, False, text=dotted(node) or "", mlp=mlp)

    def _with_first(self, second: Second, activation: Activation, held: list[Held]) -> Pieces | None:
        assert activation.argument is not None
        value, step, path, passed = self.look.follow(activation.argument, activation.step)
        first = Cuts(self.look).first(value, step, path, passed)
        if first is None and isinstance(value, cst.Name) and not second.alone:
            elsewhere = begun(self.look.context, self.look.where, value.value)
            if elsewhere is not None:
                begin, problem = elsewhere.where, elsewhere.problem
                all_held = [*held, *passed]
                return Pieces(self.look.where, second, activation, elsewhere.first, all_held, [], begin, problem)
        if first is None:
            name = dotted(activation.argument)
            made = [] if name is None else self.look.scope.reaching(name, activation.step)
            self.several += len(made) > 1 and made[-1].step.excludes(made[0].step)
            return None
        found, more = first
        return Pieces(self.look.where, second, activation, found, [*held, *passed, *more])

    def _is_on_stream(self, mlp: Pieces) -> bool:
        """Whether an MLP beside the attention works on a stream of the block, and its result becomes part of it."""
        assert isinstance(mlp.second.call, cst.Call)
        where, call = self.look.where, mlp.first.linear_call
        if where.block_name is None:  # a module's own code, which other modules of its class run too
            return False
        if where.streams_of(mlp.second.call) not in self.streams:
            return False
        if call is None or not where.streams:  # Chipmunk's already, or a helper that is given something else
            return True
        given = call.args[2 if mlp.first.done else 0].value
        return bool(self.look.scope.roots(given, mlp.first.step) & where.streams.keys())


def _alone(call: cst.Call, step: Step, linear: tuple[Attribute, str], *, done: bool) -> Second:
    return Second(call, step, done, *linear, active=call.args[2 if done else 0].value, call_step=step, alone=True)
