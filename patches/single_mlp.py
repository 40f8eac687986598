"""Send the MLP of the single blocks, which is fused into their two linear layers, through Chipmunk.

The first linear's output is cut into [query, key, value | MLP], by a split or by slices, at once or after it was held
in a variable; or a linear of its own makes the MLP's input. Then comes the activation (GELU, or SwiGLU), a module or a
function, and the second linear takes the attention's output beside the activated part, in either order. All these calls
change, as what passes between them is left uncomputed on a sparse step: so if anything else reads it, all stay as they
are. They may stand in the block's forward, in a method, or in a processor object.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Binding, Scope, Step
from chipmunk.rewrite.layers import Mlp, activation_built, builds_linear, functional_activation
from chipmunk.rewrite.minimal import SINGLE, variant
from chipmunk.rewrite.reach import Attribute, Reached, reached_from
from chipmunk.rewrite.roles import CONCATENATIONS, Block
from chipmunk.rewrite.source import Source
from chipmunk.rewrite.syntax import argument, dotted, elements, integer, is_call, target_names, walk

NAME = "single-mlp"
API = 1
VERSION = "2"

_SHAPE = {"shape", "dtype", "device", "ndim"}


@dataclass(frozen=True)
class _Held:
    """A variable that holds what passes between the calls. `shape`: whether it may be asked its shape."""

    binding: Binding
    readers: tuple[cst.CSTNode, ...]
    """The places that may read its value."""
    shape: bool = False


@dataclass
class _Piece:
    """One of the calls. `call`: as it stands; `done`: it is Chipmunk's already."""

    call: cst.CSTNode
    step: Step
    done: bool
    linear: Attribute | None = None
    linear_text: str = ""


@dataclass
class _First(_Piece):
    """The first linear, and how its output is cut."""

    kind: str = ""
    """`mlp_linear` (nothing to cut), `split_linear` (cut in one expression) or `split_held` (held in a variable)."""
    linear_call: cst.Call | None = None
    sizes: cst.Arg | str = ""
    """The argument with the sizes, or their text where the output is cut by slices."""
    dim: cst.Arg | None = None
    mlp_first: bool = False
    held_text: str = ""
    """The variable that the output is held in."""
    later: Step | None = None
    """The statement with the later slice, where each has its own."""


@dataclass
class _Activation(_Piece):
    """The activation. `text`: the module, or the name of the function in quotes."""

    text: str = ""
    mlp: Mlp = field(default_factory=lambda: Mlp(""))
    argument: cst.BaseExpression | None = None
    inside: bool = True
    """Whether it stands in the concatenation itself."""


@dataclass
class _Second(_Piece):
    """The second linear over cat(attention, activation(MLP))."""

    cat: cst.Call | None = None
    attention: cst.BaseExpression | None = None
    active: cst.BaseExpression | None = None
    mlp_first: bool = False
    call_step: Step | None = None
    """The statement that the call stands in; `step` is that of the concatenation."""


@dataclass
class _Mlp:
    """A whole MLP of a single block, in one function."""

    where: Reached
    second: _Second
    activation: _Activation
    first: _First
    held: list[_Held] = field(default_factory=list)

    @property
    def pieces(self) -> list[_Piece]:
        return [self.first, *([] if self.activation.inside else [self.activation]), self.second]


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.single_block)


def _patch_block(context: Context, block: Block) -> None:
    finders = [_Finder(context, where) for where in reached_from(context.repository, block)]
    found = [mlp for finder in finders for mlp in finder.found()]
    if not found:
        source, node = block.forward.source, block.forward.node
        missing = "cat(attention, activation(MLP)) into a second linear is missing"
        if any(finder.seconds for finder in finders):
            missing = "its output's split into [query, key, value | MLP] is missing"
        context.left_dense(source, node.name, f"no fused MLP was found: {missing}", matched=block.forward.name)
    taken: list[_Mlp] = []
    for mlp in found:
        source, problem = mlp.where.function.source, _problem(mlp, taken)
        if problem:
            context.left_dense(source, mlp.first.call, problem)
            context.left_dense(source, mlp.second.call, problem)
            continue
        taken.append(mlp)
        _patch(context, block, mlp)


def _problem(mlp: _Mlp, taken: list[_Mlp]) -> str:
    """Why the MLP must stay dense; empty if it may be sparse."""
    first, second, scope = mlp.first, mlp.second, mlp.where.function.scope
    assert first.linear is not None
    assert second.linear is not None
    for piece in mlp.pieces:
        if any(isinstance(node, (cst.For, cst.While)) for node, branch in piece.step.chain if branch == "body"):
            return "the MLP is computed piece by piece, in a loop"
    for held in mlp.held:
        if any(read not in held.readers for read in _reads(scope, held.binding, shape=held.shape)):
            name = held.binding.name
            return f"{name} is used in other places too: on a sparse step it would not hold what they expect"
    if first.later is not None and first.later.index != first.step.index + 1:
        return "the parts of the first linear's output are cut off at places apart from each other"
    if first.dim is not None and isinstance(first.sizes, cst.Arg) and not first.done:
        source = mlp.where.function.source
        if source.span(first.dim)[0] < source.span(first.sizes)[0]:
            return "the split's arguments are not in their order"
    if second.mlp_first and not second.done:
        parts = (second.attention, mlp.activation.argument if mlp.activation.inside else second.active)
        if any(dotted(part) is None for part in parts):
            return "something is computed inside the concatenation"
    for other in taken:
        assert other.first.linear is not None
        if other.first.linear.path != first.linear.path or other.activation.mlp.gated != mlp.activation.mlp.gated:
            return "another linear makes the MLP's input in other branches"
        apart = other.first.step.excludes(first.step) or first.step.excludes(other.first.step)
        if other.where.function is mlp.where.function and not apart:
            return "there are several splits of the fused linear"
    return ""


def _reads(scope: Scope, binding: Binding, *, shape: bool) -> list[cst.CSTNode]:
    """The places that read the value a variable got there; `shape`: those that only ask its shape do not count."""
    found: list[cst.CSTNode] = []
    for step in scope.steps:
        if isinstance(step.node, (cst.Del, cst.FunctionDef)) or binding not in scope.reaching(binding.name, step):
            continue
        for expression in step.expressions:
            if isinstance(expression, cst.AssignTarget):
                continue
            asked: set[cst.CSTNode] = set()
            for node in walk(expression):
                if isinstance(node, cst.Attribute) and node.attr.value in (_SHAPE if shape else {"dtype", "device"}):
                    asked.add(node.value)
                if isinstance(node, cst.Name) and node.value == binding.name and node not in asked:
                    found.append(node)
    return found


# Finding


class _Finder:
    """The MLPs in one function, followed from the second linear back to the first."""

    def __init__(self, context: Context, where: Reached) -> None:
        self.context, self.where = context, where
        self.scope = where.function.scope
        self.seconds = 0

    def found(self) -> list[_Mlp]:
        mlps: list[_Mlp] = []
        for call, step in self.scope.calls:
            for second, held in self._second(call, step):
                self.seconds += 1
                mlp = self._mlp(second, held)
                if mlp is not None:
                    mlps.append(mlp)
        return mlps

    def _runtime(self, node: cst.CSTNode | None, step: Step) -> str | None:
        return self.context.runtime_call(node, self.where.function, step)

    def _linear(self, node: cst.CSTNode | None) -> tuple[Attribute, str] | None:
        attribute = self.where.attribute(self.context.repository, node)
        if attribute is None or not builds_linear(self.context.repository, attribute.owner, attribute.name):
            return None
        return attribute, dotted(node) or ""

    def _follow(
        self, value: cst.BaseExpression, step: Step, *, shape: bool = False
    ) -> tuple[cst.BaseExpression, Step, tuple[int, ...], list[_Held]]:
        """What a variable stands for, through other variables, and which were passed; the value itself if none."""
        held: list[_Held] = []
        path: tuple[int, ...] = ()
        while isinstance(value, cst.Name) and not path:
            bindings = self.scope.reaching(value.value, step)
            if len(bindings) != 1 or bindings[0].value is None or bindings[0].augmented:
                break
            if not self.scope.is_definite(bindings, step):
                break
            held.append(_Held(bindings[0], (value,), shape))
            value, step, path = bindings[0].value, bindings[0].step, bindings[0].path
        return value, step, path, held

    def _second(self, call: cst.Call, step: Step) -> list[tuple[_Second, list[_Held]]]:
        """The call as a linear over cat(attention, activation(mlp)), or Chipmunk's form of it."""
        if self._runtime(call, step) == "cat_linear" and len(call.args) >= 5:
            linear = self._linear(call.args[1].value)
            first = any(arg.keyword is not None and arg.keyword.value == "mlp_first" for arg in call.args)
            if linear is None:
                return []
            second = _Second(call, step, True, *linear, None, call.args[2].value, None, first)
            return [(second, [])]
        linear = self._linear(call.func)
        if linear is None or len(call.args) != 1 or call.args[0].star:
            return []
        cat, at, path, held = self._follow(call.args[0].value, step)
        if not is_call(cat, *CONCATENATIONS) or not cat.args or path:
            return []
        parts = elements(cat.args[0].value) or []
        if len(parts) != 2 or integer(argument(cat, 1, "dim", "axis")) not in (2, -1):
            return []
        if held and at.chain != step.chain:
            return []
        return [
            (_Second(call, at if held else step, False, *linear, cat, parts[i], parts[1 - i], i == 1, step), list(held))
            for i in (0, 1)
        ]

    def _mlp(self, second: _Second, held: list[_Held]) -> _Mlp | None:
        """The whole MLP, if the second linear's active part is an activation of a first linear's output."""
        if second.done:
            assert isinstance(second.call, cst.Call)
            given = second.call.args[3].value
            if dotted(given) != "None":
                activation = self._activation_of(given, second.call, second.step)
                if activation is None:
                    return None
                activation.argument = second.call.args[4].value
                return self._with_first(second, activation, held)
            active: cst.BaseExpression = second.call.args[4].value
        else:
            assert second.active is not None
            active = second.active
        value, step, path, passed = self._follow(active, second.step)
        if not isinstance(value, cst.Call) or path:
            return None
        activation = self._activation(value, step)
        if activation is None:
            return None
        activation.inside = not passed and not second.done
        return self._with_first(second, activation, [*held, *passed])

    def _activation(self, call: cst.Call, step: Step) -> _Activation | None:
        if self._runtime(call, step) == "activate" and len(call.args) >= 3:
            found = self._activation_of(call.args[1].value, call, step)
            if found is not None:
                found.argument, found.done, found.inside = call.args[2].value, True, False
            return found
        name = functional_activation(self.context.repository, call, self.where.function, step)
        if name is not None:
            return _Activation(call, step, False, text=f'"{name}"', mlp=Mlp(name), argument=call.args[0].value)
        if len(call.args) != 1 or call.args[0].star or call.args[0].keyword is not None:
            return None
        found = self._activation_of(call.func, call, step)
        if found is not None:
            found.argument = call.args[0].value
        return found

    def _activation_of(self, node: cst.BaseExpression, call: cst.Call, step: Step) -> _Activation | None:
        """The activation that the expression names: a module, or the name of a function."""
        if isinstance(node, cst.SimpleString):
            return _Activation(call, step, False, text=node.value, mlp=Mlp(str(node.evaluated_value)))
        attribute = self.where.attribute(self.context.repository, node)
        if attribute is None:
            return None
        mlp = activation_built(self.context.repository, attribute.owner, attribute.name)
        return None if mlp is None else _Activation(call, step, False, text=dotted(node) or "", mlp=mlp)

    def _with_first(self, second: _Second, activation: _Activation, held: list[_Held]) -> _Mlp | None:
        assert activation.argument is not None
        value, step, path, passed = self._follow(activation.argument, activation.step)
        first = self._first(value, step, path, passed)
        if first is None:
            return None
        found, more = first
        return _Mlp(self.where, second, activation, found, [*held, *passed, *more])

    def _first(
        self, value: cst.BaseExpression, step: Step, path: tuple[int, ...], passed: list[_Held]
    ) -> tuple[_First, list[_Held]] | None:
        """The first linear that an expression is cut from."""
        if isinstance(value, cst.Call) and not path:
            linear = self._linear(value.func)
            if linear is not None and _has_one_argument(value):
                return _First(value, step, False, *linear, "mlp_linear", value), []
            if self._runtime(value, step) == "mlp_linear" and len(value.args) == 3:
                linear = self._linear(value.args[1].value)
                return None if linear is None else (_First(value, step, True, *linear, "mlp_linear"), [])
        if isinstance(value, cst.Subscript) and not path and passed:
            return self._slice(value, step)
        node = step.node
        if not isinstance(node, cst.Assign) or len(node.targets) != 1 or len(path) > 1:
            return None
        names = target_names(node.targets[0].target)
        if len(names) != 2 or [place for _, place in names] != [(0,), (1,)]:
            return None
        if isinstance(value, cst.Call) and node.value is value and len(path) == 1:
            return self._split(value, step, path[0] == 0)
        return None

    def _split(self, call: cst.Call, step: Step, mlp_first: bool) -> tuple[_First, list[_Held]] | None:
        """`torch.split(…, [a, b], dim=-1)` or `….split([a, b], -1)` of a linear's output."""
        done = self._runtime(call, step)
        if done == "split_linear" and len(call.args) >= 4:
            linear = self._linear(call.args[1].value)
            return None if linear is None else (_First(call, step, True, *linear, done, mlp_first=mlp_first), [])
        if done == "split_held" and len(call.args) >= 3:
            return self._held(call.args[1].value, step, _First(call, step, True, kind=done, mlp_first=mlp_first))
        if not is_call(call, "split", "split_with_sizes") or not isinstance(call.func, cst.Attribute):
            return None
        arguments, inner = list(call.args), call.func.value
        is_function = isinstance(inner, cst.Name) and not self.scope.reaching(inner.value, step)
        if is_function and arguments:
            inner = arguments.pop(0).value
        sizes = next((a for i, a in enumerate(arguments) if _is(a, i, 0, *_SIZES)), None)
        dim = next((a for i, a in enumerate(arguments) if _is(a, i, 1, "dim")), None)
        if sizes is None or len(elements(sizes.value) or []) != 2 or len(arguments) != 2 or dim is None:
            return None
        if integer(dim.value) not in (2, -1):
            return None
        first = _First(call, step, False, kind="split_linear", mlp_first=mlp_first)
        first.sizes, first.dim = sizes, dim
        if isinstance(inner, cst.Call):
            linear = self._linear(inner.func)
            if linear is None or not _has_one_argument(inner):
                return None
            first.linear, first.linear_text, first.linear_call = *linear, inner
            return first, []
        first.kind = "split_held"
        return self._held(inner, step, first)

    def _slice(self, value: cst.Subscript, step: Step) -> tuple[_First, list[_Held]] | None:
        """`x[..., n:]` of a linear's output held in x, beside `x[..., :n]` in the same statement or the next one."""
        code, cut = self.where.function.source.code, _cut(value)
        if cut is None:
            return None
        first = _First(value, step, False, kind="split_held", mlp_first=cut[0] is None)
        found = self._held(value.value, step, first)
        if found is None:
            return None
        held = found[1]
        reads = _reads(self.scope, held[0].binding, shape=True)
        slices = [
            (node, at)
            for at in self.scope.steps
            for expression in at.expressions
            for node in walk(expression)
            if isinstance(node, cst.Subscript) and node.value in reads
        ]
        if len(slices) != 2 or len(reads) != 2:
            return None
        other, place = next(pair for pair in slices if pair[0] is not value)
        counterpart = _cut(other)
        if counterpart is None or (counterpart[0] is None) == (cut[0] is None):
            return None
        if code(_edge(counterpart)) != code(_edge(cut)):
            return None
        first.sizes = f"[{code(_edge(cut))}, -1]"
        if place is step:
            assert isinstance(step.node, cst.Assign)
            if elements(step.node.value) != ([value, other] if first.mlp_first else [other, value]):
                return None
            first.call = step.node.value
        else:
            for at in (step, place):
                plain = isinstance(at.node, cst.Assign) and len(at.node.targets) == 1 and at.chain == step.chain
                plain = plain and _whole_line(self.where.function.source, at.node) is not None
                if not plain or not isinstance(at.node.targets[0].target, cst.Name):  # type: ignore[attr-defined]
                    return None
            first.step, first.later = sorted((step, place), key=lambda s: s.index)
            first.call = first.step.node
        return first, [replace(held[0], readers=tuple(reads)), *held[1:]]

    def _held(self, value: cst.BaseExpression, step: Step, first: _First) -> tuple[_First, list[_Held]] | None:
        """A linear's output that a variable holds before it is cut."""
        call, at, path, held = self._follow(value, step, shape=True)
        if not isinstance(call, cst.Call) or path or not held or at.chain != step.chain:
            return None
        if self._runtime(call, at) == "held_linear" and len(call.args) == 3:
            linear = self._linear(call.args[1].value)
        elif _has_one_argument(call):
            linear, first.linear_call = self._linear(call.func), call
        else:
            return None
        if linear is None:
            return None
        first.linear, first.linear_text, first.held_text = *linear, dotted(value) or ""
        return first, held


_SIZES = ("split_size_or_sections", "split_size", "split_sizes")


def _is(arg: cst.Arg, index: int, position: int, *names: str) -> bool:
    return arg.keyword.value in names if arg.keyword is not None else index == position and not arg.star


def _has_one_argument(call: cst.Call) -> bool:
    return len(call.args) == 1 and not call.args[0].star


def _cut(node: cst.CSTNode | None) -> tuple[cst.BaseExpression | None, cst.BaseExpression | None] | None:
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


def _edge(cut: tuple[cst.BaseExpression | None, cst.BaseExpression | None]) -> cst.BaseExpression:
    edge = cut[0] or cut[1]
    assert edge is not None
    return edge


def _whole_line(source: Source, node: cst.CSTNode) -> tuple[int, int] | None:
    """Where the lines of a statement start and end, its newline with them; None if it is not alone on them."""
    first, last = source.span(node)
    start, end = source.line_at(first)[0], source.line_at(last)[1]
    alone = not source.text[start:first].strip() and not source.text[last:end].strip()
    return (start, min(end + 1, len(source.text))) if alone else None


# Changing


def _patch(context: Context, block: Block, mlp: _Mlp) -> None:
    first, activation, second = mlp.first, mlp.activation, mlp.second
    source, layer = mlp.where.function.source, mlp.where.layer
    assert layer is not None
    assert first.linear is not None
    assert second.linear is not None
    block.linear_in, block.linear_out = first.linear.path, second.linear.path
    block.gated = activation.mlp.gated
    block.mlp_first_in, block.mlp_first_out = first.mlp_first, second.mlp_first
    edits = _Edits(context, source, layer, context.runtime(source))
    what = f"{first.linear_text} makes query, key, value and the MLP's input in one go"
    if first.kind == "mlp_linear":
        what = f"{first.linear_text} makes the MLP's input"
    _report(context, source, first, what, "the first linear is Chipmunk's")
    if not first.done:
        edits.first(first)
    if not activation.inside:
        _report(context, source, activation, "the MLP's activation", "the activation is Chipmunk's")
        if not activation.done:
            edits.activation(activation)
    what = f"{second.linear_text} takes the attention and the activated MLP part together"
    _report(context, source, second, what, "the second linear is Chipmunk's")
    if not second.done:
        edits.second(second, activation)


def _report(context: Context, source: Source, piece: _Piece, what: str, already: str) -> None:
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

    def first(self, first: _First) -> None:
        linear = first.linear_call
        assert linear is not None
        if first.kind != "split_linear":
            name = "mlp_linear" if first.kind == "mlp_linear" else "held_linear"
            self._call(linear, name, [self.layer, first.linear_text])
        if first.kind == "mlp_linear":
            return
        end = ", mlp_first=True" if first.mlp_first else ""
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

    def _slices(self, first: _First, call: str) -> None:
        if first.later is None:
            self.context.replace(self.source, first.call, call)
            return
        nodes = (first.step.node, first.later.node)
        names = {}
        for node in nodes:
            assert isinstance(node, cst.Assign)
            names[(_cut(node.value) or (None, None))[0] is None] = dotted(node.targets[0].target)
        self.context.replace(self.source, first.call, f"{names[True]}, {names[False]} = {call}")
        line = _whole_line(self.source, nodes[1])
        assert line is not None
        self.context.edit(self.source, *line, "")

    def activation(self, activation: _Activation) -> None:
        call = activation.call
        assert isinstance(call, cst.Call)
        start, end = self.source.span(call.args[0].value)
        if isinstance(call.args[0].value, cst.Call):  # which changes too, from its first letter on
            head = f"{self.runtime}.activate({self.layer}, {activation.text}, "
            self.context.edit(self.source, self.source.span(call.func)[0], start, head)
        else:
            self._call(call, "activate", [self.layer, activation.text])
        self.context.edit(self.source, end, self.source.span(call.args[-1])[1], _options(activation))

    def second(self, second: _Second, activation: _Activation) -> None:
        call, cat = second.call, second.cat
        assert isinstance(call, cst.Call)
        assert cat is not None
        assert second.attention is not None
        assert second.active is not None
        assert activation.argument is not None
        outer = self.source.span(call if any(node is cat for node in walk(call)) else cat)
        if outer == self.source.span(cat):  # held in a variable: the linear moves to where the parts are concatenated
            self._unwrap(call, second.call_step)
        head = f"{self.runtime}.cat_linear({self.layer}, {second.linear_text}, "
        between = f", {activation.text}, " if activation.inside else ", None, "
        last = activation.argument if activation.inside else second.active
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
            line = _whole_line(self.source, node)
            if line is not None and dotted(node.targets[0].target) == dotted(call.args[0].value):
                self.context.edit(self.source, *line, "")
                return
        self.context.edit(self.source, start, given[0], "")
        self.context.edit(self.source, given[1], end, "")

    def _call(self, call: cst.Call, name: str, given: list[str]) -> None:
        """Make it a call of the runtime's, with arguments before those it has."""
        self.context.replace(self.source, call.func, f"{self.runtime}.{name}")
        self.context.prepend_arguments(self.source, call, given, drop_keyword=True)


def _options(activation: _Activation) -> str:
    """What the runtime is to be told of an activation of the repository's own."""
    return f', kind="{activation.mlp.activation}", of="{activation.mlp.of}"' if activation.mlp.of else ""


_SPLIT = "torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)"
_JOIN = "self.leave(torch.cat((mixed, self.act(hidden)), 2))"
_METHOD = variant(SINGLE, (_SPLIT, "self.enter(x).split((3 * self.width, 4 * self.width), dim=2)"))
_IMPORT = ("import torch\nfrom", "import chipmunk\nimport torch\nfrom")
_BOTH = (
    (_SPLIT, "chipmunk.split_linear(self, self.enter, x, [3 * self.width, 4 * self.width])"),
    (_JOIN, "chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden)"),
)
_LINE = "        "
_HELD = variant(
    SINGLE,
    (
        f"qkv, hidden = {_SPLIT}",
        f"both = self.enter(x)\n{_LINE}qkv, hidden = both[..., : 3 * self.width], both[..., 3 * self.width :]",
    ),
    (
        f"return x + {_JOIN}",
        f'hidden = nn.functional.gelu(hidden, approximate="tanh")\n{_LINE}both = torch.cat([mixed, hidden], dim=-1)\n'
        f"{_LINE}return x + self.leave(both)",
    ),
)
_APART = variant(
    SINGLE,
    ("nn.Linear(width, 3 * width + 4 * width)", "nn.Linear(width, 3 * width)"),
    ("self.act =", f"self.widen = nn.Linear(width, 4 * width)\n{_LINE}self.act ="),
    (f"qkv, hidden = {_SPLIT}", f"qkv = self.enter(x)\n{_LINE}hidden = self.act(self.widen(x))"),
    ("(mixed, self.act(hidden))", "(hidden, mixed)"),
)
_GATED = variant(
    SINGLE,
    ('nn.GELU(approximate="tanh")', "Gate()"),
    ("3 * width + 4 * width", "3 * width + 8 * width"),
    ("3 * self.width, 4 * self.width", "3 * self.width, 8 * self.width"),
    (
        "class JointBlock",
        """class Gate(nn.Module):
    def forward(self, x):
        half = x.shape[-1] // 2
        return nn.functional.silu(x[..., :half]) * x[..., half:]


class JointBlock""",
    ),
)

EXAMPLES = (
    Example(
        "the MLP's input is used in another place too",
        "flow/single.py",
        variant(SINGLE, (_JOIN, f"{_JOIN} + hidden.mean()")),
        None,
    ),
    Example(
        "the concatenation is read by something else",
        "flow/single.py",
        variant(_HELD, ("self.leave(both)", "self.leave(both) + both[..., :1]")),
        None,
    ),
    Example(
        "another activation", "flow/single.py", variant(SINGLE, ('nn.GELU(approximate="tanh")', "nn.SiLU()")), None
    ),
    Example(
        "the two parts the other way round, so that the attention is the MLP's",
        "flow/single.py",
        variant(SINGLE, ("qkv, hidden =", "hidden, qkv ="), ("qkv.unflatten", "hidden.unflatten")),
        None,
    ),
    Example("both linears", "flow/single.py", SINGLE, variant(SINGLE, _IMPORT, *_BOTH)),
    Example(
        "split as a method of the tensor",
        "flow/single.py",
        _METHOD,
        variant(
            _METHOD,
            _IMPORT,
            (
                "self.enter(x).split((3 * self.width, 4 * self.width), dim=2)",
                "chipmunk.split_linear(self, self.enter, x, (3 * self.width, 4 * self.width))",
            ),
            _BOTH[1],
        ),
    ),
    Example(
        "slices of a variable, a functional activation, and the concatenation in a variable",
        "flow/single.py",
        _HELD,
        variant(
            _HELD,
            _IMPORT,
            ("both = self.enter(x)", "both = chipmunk.held_linear(self, self.enter, x)"),
            (
                "both[..., : 3 * self.width], both[..., 3 * self.width :]",
                "chipmunk.split_held(self, both, [3 * self.width, -1])",
            ),
            ('nn.functional.gelu(hidden, approximate="tanh")', 'chipmunk.activate(self, "gelu_tanh", hidden)'),
            ("torch.cat([mixed, hidden], dim=-1)", "chipmunk.cat_linear(self, self.leave, mixed, None, hidden)"),
            ("self.leave(both)", "both"),
        ),
    ),
    Example(
        "a linear of its own, and the MLP before the attention",
        "flow/single.py",
        _APART,
        variant(
            _APART,
            _IMPORT,
            (
                "self.act(self.widen(x))",
                "chipmunk.activate(self, self.act, chipmunk.mlp_linear(self, self.widen, x))",
            ),
            (
                "self.leave(torch.cat((hidden, mixed), 2))",
                "chipmunk.cat_linear(self, self.leave, mixed, None, hidden, mlp_first=True)",
            ),
        ),
    ),
    Example(
        "SwiGLU",
        "flow/single.py",
        _GATED,
        variant(
            _GATED,
            _IMPORT,
            (
                "torch.split(self.enter(x), [3 * self.width, 8 * self.width], dim=-1)",
                "chipmunk.split_linear(self, self.enter, x, [3 * self.width, 8 * self.width])",
            ),
            (
                _JOIN,
                'chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden, kind="swiglu", of="Gate")',
            ),
        ),
    ),
)
