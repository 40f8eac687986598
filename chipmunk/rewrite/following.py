"""What a module that is built of torch's layers makes of its input: its forward is followed with a symbol in its place.

Whatever is not understood makes the whole of it not understood.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

import libcst as cst

from chipmunk.rewrite import ast_nodes
from chipmunk.rewrite.building import Builder, Built, Given, Instance, Layer, Series, is_torch
from chipmunk.rewrite.repository import Function, Repository
from chipmunk.rewrite.syntax import argument, dotted, integer, last_name, text_of_string, walk

_DEPTH = 12
_SAME = ("to", "contiguous", "type_as")
"""Methods of a tensor that give it back with the same values."""


@dataclass(frozen=True)
class Value:
    """`input`, `linear`, an activation's name, `silu`, or `half`: what was done last, and to what."""

    kind: str
    of: Value | None = None
    at: str = ""
    """Of a linear or an activation: its place in the module. Of a half: `0` or `1`."""


class Unknown(Exception):
    """Something that is not understood."""


INPUT = Value("input")


@dataclass
class Follow:
    """Follows the forward of modules; `classes` are those of the repository that it has read."""

    repository: Repository
    classes: list[str] = field(default_factory=list)
    depth: int = 0

    def run(self, module: Built, at: str, value: Value) -> Value:
        """What the module at that place makes of the value. Raises Unknown."""
        if isinstance(module, Layer):
            if module.kind == "idle":
                return value
            return Value(module.kind, value, at)
        if isinstance(module, Series) and module.runs:
            for index, item in enumerate(module.items):
                value = self.run(item, _join(at, str(index)), value)
            return value
        if isinstance(module, Instance) and self.depth < _DEPTH:
            forward = self.repository.method(module.owner, "forward")
            if forward is None or not _is_plain(forward) or self.repository.method(module.owner, "__call__"):
                raise Unknown
            if module.owner.name not in self.classes:
                self.classes.append(module.owner.name)
            self.depth += 1
            try:
                return _Frame(self, module, at, forward).call([value])
            finally:
                self.depth -= 1
        raise Unknown


def _is_plain(function: Function) -> bool:
    """Whether no decorator may change what the function computes (autocast, say)."""
    found = [d.func if isinstance(d, ast.Call) else d for d in function.outline.decorator_list]
    return {ast_nodes.last_name(decorator) for decorator in found} <= {"compile", "no_grad", "inference_mode"}


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


class _Frame:
    """One call of a method of a module."""

    def __init__(self, follow: Follow, instance: Instance, at: str, function: Function) -> None:
        self.follow, self.instance, self.at, self.function = follow, instance, at, function
        self.builder = Builder(follow.repository)
        self.values: dict[str, Value] = {}
        self.halves: dict[str, Value] = {}
        """Names that hold both halves of a value."""
        self.widths: dict[str, Value] = {}
        """Names that hold half of a value's width."""
        self.modules: dict[str, tuple[Built, str]] = {}
        """Names that hold a module, and its place."""

    def call(self, given: list[Value]) -> Value:
        names = [p.name.value for p in self.function.node.params.params][1:]
        if len(names) < len(given) or self.function.owner is None or self.function.is_static:
            raise Unknown
        self.values.update(zip(names, given, strict=False))
        result = self._suite(self.function.node.body)
        if result is None:
            raise Unknown
        return result

    def _suite(self, suite: cst.BaseSuite) -> Value | None:
        """Run the statements; what they return, None if they go on."""
        return self._statements(list(suite.body))

    def _statements(self, body: list[Any]) -> Value | None:
        for statement in body:
            for node in statement.body if isinstance(statement, cst.SimpleStatementLine) else (statement,):
                result = self._statement(node)
                if result is not None:
                    return result
        return None

    def _statement(self, node: cst.CSTNode) -> Value | None:
        if isinstance(node, cst.Return):
            return self.value(node.value)
        if isinstance(node, cst.Assign) and len(node.targets) == 1:
            self._assign(node.targets[0].target, node.value)
        elif isinstance(node, cst.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, cst.If):
            return self._if(node)
        elif isinstance(node, cst.For) and isinstance(node.target, cst.Name) and node.orelse is None:
            return self._for(node.target.value, node)
        elif isinstance(node, (cst.Assert, cst.Pass)) or (isinstance(node, cst.Expr) and not self._concerns(node)):
            return None
        else:
            raise Unknown
        return None

    def _if(self, node: cst.If) -> Value | None:
        """A condition on something else than the module's construction may do anything but touch the values."""
        decided = self.builder.decide(node.test, Given(node.test, self.function, None, self.instance.arguments))
        if isinstance(decided, bool) and not self._concerns(node.test):
            suite = node.body if decided else node.orelse
            if isinstance(suite, cst.If):
                return self._if(suite)
            suite = suite.body if isinstance(suite, cst.Else) else suite
            return self._suite(suite) if suite is not None else None
        before = dict(self.values)
        result = self._suite(node.body)
        if self.values != before or node.orelse is not None:
            raise Unknown
        if result is None:
            return None
        rest = _Frame(self.follow, self.instance, self.at, self.function)
        rest.values, rest.modules = dict(self.values), dict(self.modules)
        other = rest._after(node)
        if other != result:
            raise Unknown
        return result

    def _after(self, node: cst.CSTNode) -> Value | None:
        """What the statements after `node`, in the function's own suite, return."""
        body: list[Any] = list(self.function.node.body.body)
        if node not in body:
            raise Unknown
        return self._statements(body[body.index(node) + 1 :])

    def _for(self, name: str, node: cst.For) -> Value | None:
        module, at = self._module(node.iter)
        if not isinstance(module, Series):
            raise Unknown
        for index, item in enumerate(module.items):
            self.modules[name] = (item, _join(at, str(index)))
            if self._suite(node.body) is not None:
                raise Unknown
        return None

    def _assign(self, target: cst.BaseExpression, value: cst.BaseExpression) -> None:
        if isinstance(target, (cst.Tuple, cst.List)):
            names = [last_name(element.value) for element in target.elements]
            for name, half in zip(names, self._both(value), strict=True):
                self.values[name] = half
            return
        if not isinstance(target, cst.Name):
            raise Unknown
        name, found = target.value, self._meant(value)
        tables: list[dict[str, Any]] = [self.values, self.halves, self.widths, self.modules]
        for table in tables:
            table.pop(name, None)
        if found is not None:
            table, meant = found
            table[name] = meant

    def _meant(self, value: cst.BaseExpression) -> tuple[dict[str, Any], Value] | None:
        """What a name gets, and in which table; None if it has nothing to do with the values."""
        if (whole := self._half_width(value)) is not None:
            return self.widths, whole
        if not self._concerns(value):
            return None
        try:
            return self.values, self.value(value)
        except Unknown:
            return self.halves, self._both(value)[0].of or INPUT

    def _both(self, value: cst.BaseExpression) -> tuple[Value, Value]:
        """The two halves: `x.chunk(2, dim=-1)`, `torch.chunk(x, 2, -1)`, or a name that holds them."""
        if isinstance(value, cst.Name) and value.value in self.halves:
            whole = self.halves[value.value]
        elif isinstance(value, cst.Call) and last_name(value.func) in ("chunk", "tensor_split"):
            inner, shift = (value.func.value, 0) if isinstance(value.func, cst.Attribute) else (None, 1)
            if inner is not None and not self._concerns(inner):
                inner, shift = None, 1
            inner = value.args[0].value if inner is None and value.args else inner
            count, dim = argument(value, shift, "chunks"), argument(value, shift + 1, "dim")
            if integer(count) != 2 or integer(dim) != -1:
                raise Unknown
            whole = self.value(inner)
        else:
            raise Unknown
        return Value("half", whole, "0"), Value("half", whole, "1")

    def _half_width(self, value: cst.BaseExpression) -> Value | None:
        """The value of whose width `x.shape[-1] // 2` is the half."""
        if isinstance(value, cst.Name):
            return self.widths.get(value.value)
        if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.FloorDivide):
            return None
        width = value.left
        if integer(value.right) != 2:
            return None
        if isinstance(width, cst.Call) and last_name(width.func) == "size" and isinstance(width.func, cst.Attribute):
            whole, index = width.func.value, argument(width, 0, "dim")
        elif isinstance(width, cst.Subscript) and last_name(width.value) == "shape":
            assert isinstance(width.value, cst.Attribute)
            part = width.slice[0].slice
            whole, index = width.value.value, part.value if isinstance(part, cst.Index) else None
        else:
            return None
        try:
            return self.value(whole) if integer(index) == -1 else None
        except Unknown:
            return None

    def value(self, node: cst.BaseExpression | None) -> Value:
        """What the expression computes."""
        if isinstance(node, cst.Name) and node.value in self.values:
            return self.values[node.value]
        if isinstance(node, cst.Call):
            return self._call(node)
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply):
            return _gated(self.value(node.left), self.value(node.right))
        if isinstance(node, cst.Subscript):
            return self._subscript(node)
        raise Unknown

    def _subscript(self, node: cst.Subscript) -> Value:
        last = node.slice[-1].slice
        if isinstance(last, cst.Index) and len(node.slice) == 1 and integer(last.value) in (0, 1):
            return self._both(node.value)[integer(last.value) or 0]
        if not isinstance(last, cst.Slice) or last.step is not None or len(node.slice) not in (2, 3):
            raise Unknown
        for part in node.slice[:-1]:
            whole = isinstance(part.slice, cst.Slice) and part.slice.lower is None and part.slice.upper is None
            if not whole and not (isinstance(part.slice, cst.Index) and isinstance(part.slice.value, cst.Ellipsis)):
                raise Unknown
        value = self.value(node.value)
        cut = last.upper if last.lower is None else last.lower
        if cut is None or (last.lower is not None and last.upper is not None) or self._half_width(cut) != value:
            raise Unknown
        return Value("half", value, "0" if last.lower is None else "1")

    def _call(self, call: cst.Call) -> Value:
        function, name = call.func, last_name(call.func)
        if isinstance(function, cst.Attribute) and name in _SAME and self._concerns(function.value):
            return self.value(function.value)
        if not call.args or call.args[0].star or call.args[0].keyword is not None:
            raise Unknown
        first = call.args[0].value
        for kind in ("gelu", "silu"):
            theirs = is_torch(self.follow.repository, function, kind, self.function, None)
            if theirs and dotted(function) is not None and not self._is_own(function):
                return self._functional(kind, call)
        own = self._own_method(function)
        if own is not None:
            if any(arg.star or arg.keyword is not None for arg in call.args):
                raise Unknown
            return _Frame(self.follow, self.instance, self.at, own).call([self.value(arg.value) for arg in call.args])
        if len(call.args) != 1:
            raise Unknown
        module, at = self._module(function)
        return self.follow.run(module, at, self.value(first))

    def _functional(self, kind: str, call: cst.Call) -> Value:
        value = self.value(call.args[0].value)
        if kind == "silu":
            return Value("silu", value)
        approximate = argument(call, 1, "approximate")
        text: str | None = "none"
        if approximate is not None:
            text = text_of_string(approximate)
            attribute = self._receiver_attribute(approximate)
            if attribute is not None:
                text = self._text(attribute)
        if text not in ("tanh", "none"):
            raise Unknown
        return Value("gelu_tanh" if text == "tanh" else "gelu", value)

    def _text(self, attribute: str) -> str | None:
        found = {
            self.builder.text(value, Given(value, method, step, self.instance.arguments))
            for value, method, step in self.follow.repository.values_of(self.instance.owner, attribute)
        }
        return found.pop() if len(found) == 1 else None

    def _receiver_attribute(self, node: cst.CSTNode) -> str | None:
        name = dotted(node)
        receiver = self.function.scope.receiver
        if name is None or not name.startswith(f"{receiver}.") or name.count(".") != 1:
            return None
        return name.split(".")[1]

    def _is_own(self, function: cst.BaseExpression) -> bool:
        return (dotted(function) or "").split(".")[0] == self.function.scope.receiver

    def _own_method(self, function: cst.BaseExpression) -> Function | None:
        attribute = self._receiver_attribute(function)
        return None if attribute is None else self.follow.repository.method(self.instance.owner, attribute)

    def _module(self, node: cst.BaseExpression) -> tuple[Built, str]:
        """The module that the expression is, and its place."""
        if isinstance(node, cst.Name) and node.value in self.modules:
            return self.modules[node.value]
        attribute = self._receiver_attribute(node)
        if attribute is not None:
            return self.builder.attribute(self.instance, attribute), _join(self.at, attribute)
        if isinstance(node, cst.Subscript) and len(node.slice) == 1 and isinstance(node.slice[0].slice, cst.Index):
            module, at = self._module(node.value)
            index = integer(node.slice[0].slice.value)
            if isinstance(module, Series) and index is not None and -len(module.items) <= index < len(module.items):
                return module.items[index], _join(at, str(index % len(module.items)))
        raise Unknown

    def _concerns(self, node: cst.CSTNode) -> bool:
        """Whether the values occur in it."""
        known = self.values.keys() | self.halves.keys()
        return any(isinstance(inner, cst.Name) and inner.value in known for inner in walk(node))


def _gated(first: Value, second: Value) -> Value:
    """`silu(gate) · value` of the two halves of one value."""
    for gate, value in ((first, second), (second, first)):
        inner = gate.of
        if gate.kind != "silu" or inner is None or inner.of != value.of:
            continue
        if inner.kind == value.kind == "linear" and inner.at != value.at:
            return Value("swiglu", Value("linear", inner.of, f"{inner.at} + {value.at}"))
        if inner.kind == value.kind == "half" and {inner.at, value.at} == {"0", "1"}:
            return Value("swiglu" if inner.at == "0" else "swiglu_value_first", inner.of)
    raise Unknown
