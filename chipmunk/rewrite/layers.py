"""Which torch layers an attribute is built of, and what a module made of them computes.

A module is followed from its construction: the arguments of the constructor decide its conditions, and then its forward
is followed with a symbol in the place of the input. Whatever is not understood makes the whole thing not understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import libcst as cst

from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.repository import Class, External, Function, Repository
from chipmunk.rewrite.syntax import (
    argument,
    bind,
    dotted,
    elements,
    integer,
    last_name,
    parameters,
    text_of_string,
    walk,
)

_DEPTH = 12

# Libraries' classes that need not lie in the repository: what the constructor's arguments make of them.
_LIBRARY = {
    "diffusers.models.attention.FeedForward": ("net.0.proj", "net.2", "FeedForward, GELU"),
    "timm.models.vision_transformer.Mlp": ("fc1", "fc2", "Mlp"),
    "timm.layers.Mlp": ("fc1", "fc2", "Mlp"),
    "timm.layers.mlp.Mlp": ("fc1", "fc2", "Mlp"),
}
_LIBRARY_ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True)
class Mlp:
    """What the runtime is to be told of an MLP: see `chipmunk.runtime.linears.mlp_form`."""

    activation: str
    parts: str = ""
    of: str = ""

    @property
    def gated(self) -> bool:
        return self.activation.startswith("swiglu")


# What an expression builds


@dataclass(frozen=True)
class _Layer:
    """`linear`, `gelu_tanh`, `gelu`, `gelu?` (which one is not known), `silu`, or `idle` (dropout, identity)."""

    kind: str


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Built, ...]
    runs: bool
    """A Sequential, which calls its items one after another; otherwise a list."""


@dataclass(frozen=True)
class _Given:
    """An argument, where it stands, and what its names stand for there."""

    value: cst.BaseExpression
    function: Function
    step: Step | None
    arguments: tuple[tuple[str, _Given], ...]


@dataclass(frozen=True)
class _Instance:
    """An object of the repository's class. `arguments`: what the constructor was given, by parameter."""

    owner: Class
    arguments: tuple[tuple[str, _Given], ...] = ()


@dataclass(frozen=True)
class _Library:
    """An object of a library's class that is an MLP."""

    mlp: Mlp


_Built = _Layer | _Sequence | _Instance | _Library | None
_Arguments = tuple[tuple[str, _Given], ...]


# What a module computes


@dataclass(frozen=True)
class _Value:
    """`input`, `linear`, an activation's name, `silu`, or `half`: what was done last, and to what."""

    kind: str
    of: _Value | None = None
    at: str = ""
    """Of a linear or an activation: its place in the module. Of a half: `0` or `1`."""


class _Unknown(Exception):
    """Something that is not understood."""


_INPUT = _Value("input")


def builds_linear(repository: Repository, owner: Class, attribute: str) -> bool:
    """Whether the attribute may be a Linear, or one of its kind (`F8Linear`): the runtime looks at the exact type."""
    return any(isinstance(b, _Layer) and b.kind == "linear" for b in _built_as(repository, owner, attribute))


def mlp_built(repository: Repository, owner: Class, attribute: str) -> Mlp | None:
    """The attribute's MLP, Linear → activation → Linear; None if it is none."""
    for built in _built_as(repository, owner, attribute):
        if isinstance(built, _Library):
            return built.mlp
        follow = _Follow(repository)
        try:
            value = follow.run(built, "", _INPUT)
        except _Unknown:
            continue
        inner = value.of
        if value.kind != "linear" or inner is None or inner.kind not in _ACTIVATIONS or inner.of is None:
            continue
        first = inner.of
        if first.kind == "linear" and first.of == _INPUT:
            if isinstance(built, _Sequence) and not follow.classes:
                return Mlp(inner.kind)
            name = inner.at if inner.kind == "gelu?" else inner.kind
            return Mlp(inner.kind, f"{first.at}, {name}, {value.at}", ", ".join(follow.classes))
    return None


def activation_built(repository: Repository, owner: Class, attribute: str) -> Mlp | None:
    """The attribute's activation, with its classes if they are the repository's own; None if it is none we know."""
    for built in _built_as(repository, owner, attribute):
        follow = _Follow(repository)
        try:
            value = follow.run(built, "", _INPUT)
        except _Unknown:
            continue
        if value.kind in _ACTIVATIONS and value.of == _INPUT and (value.kind != "gelu?" or not follow.classes):
            return Mlp(value.kind, of=", ".join(follow.classes))
    return None


def functional_activation(repository: Repository, call: cst.Call, function: Function, step: Step) -> str | None:
    """`gelu_tanh` or `gelu` if the call is torch's function of that name, on one value."""
    if not _is_torch(repository, call.func, "gelu", function, step) or not call.args or call.args[0].star:
        return None
    approximate = argument(call, 1, "approximate")
    if len(call.args) > 2 or (approximate is None and len(call.args) > 1) or call.args[0].keyword is not None:
        return None
    text = "none" if approximate is None else text_of_string(approximate)
    return {"tanh": "gelu_tanh", "none": "gelu"}.get(text or "")


_ACTIVATIONS = {"gelu_tanh", "gelu", "gelu?", "swiglu", "swiglu_value_first"}


def _is_torch(
    repository: Repository, callee: cst.BaseExpression, name: str, function: Function, step: Step | None
) -> bool:
    """Whether the callee is torch's `name`, or may be, as nothing is known of it."""
    if last_name(callee) != name or dotted(callee) is None:
        meaning = repository.resolve(callee, function, step)
        return isinstance(meaning, External) and meaning.name.startswith("torch.") and meaning.name.endswith(f".{name}")
    meaning = repository.resolve(callee, function, step)
    return meaning is None or (isinstance(meaning, External) and meaning.name.startswith("torch"))


def _built_as(repository: Repository, owner: Class, attribute: str) -> Iterator[_Built]:
    """What the expressions that are assigned to `self.attribute` build."""
    builder = _Builder(repository)
    for value, method, step in repository.values_of(owner, attribute):
        yield from builder.choices(_Given(value, method, step, ()))


@dataclass
class _Builder:
    """Follows constructors."""

    repository: Repository
    depth: int = 0

    def choices(self, given: _Given) -> list[_Built]:
        """What the expression may build: both arms of a condition that nothing decides."""
        value = given.value
        if isinstance(value, cst.IfExp):
            decided = self.decide(value.test, given)
            arms = [value.body] * (decided is not False) + [value.orelse] * (decided is not True)
            return [built for arm in arms for built in self.choices(replace(given, value=arm))]
        return [self.build(given)]

    def build(self, given: _Given) -> _Built:
        """What the expression builds; None if it is not known."""
        if self.depth > _DEPTH:
            return None
        self.depth += 1
        try:
            return self._build(given)
        finally:
            self.depth -= 1

    def _build(self, given: _Given) -> _Built:
        value = given.value
        if isinstance(value, cst.IfExp):
            return _one(self.choices(given))
        if isinstance(value, cst.Name):
            return _one([self.build(meant) for meant in self.meant(given)])
        if isinstance(value, (cst.List, cst.Tuple)):
            return _Sequence(tuple(self.build(replace(given, value=item)) for item in elements(value) or []), False)
        return self._call(value, given) if isinstance(value, cst.Call) else None

    def _call(self, call: cst.Call, given: _Given) -> _Built:
        for callee in self.meant(replace(given, value=call.func)):
            if isinstance(callee.value, cst.Lambda):
                return self.build(replace(callee, value=callee.value.body))
            meaning = self.repository.resolve(callee.value, callee.function, callee.step)
            name = last_name(callee.value)
            if isinstance(meaning, Class):
                return self._instance(meaning, call, given)
            if isinstance(meaning, External) and meaning.name in _LIBRARY:
                return self._library(meaning.name, call, given)
            if name.endswith("Linear"):
                return _Layer("linear")
            if isinstance(meaning, External) and not meaning.name.startswith("torch"):
                return None
            if name in ("Dropout", "Identity"):
                return _Layer("idle")
            if name == "SiLU":
                return _Layer("silu")
            if name == "GELU":
                text = self.text(argument(call, 0, "approximate"), given) if call.args else "none"
                return _Layer({"tanh": "gelu_tanh", "none": "gelu", None: "gelu?"}.get(text, "other"))
            if name in ("Sequential", "ModuleList"):
                parts = [arg.value for arg in call.args]
                if len(parts) == 1 and (name == "ModuleList" or isinstance(parts[0], (cst.List, cst.Tuple))):
                    parts = elements(parts[0]) or []  # one list, starred or not
                return _Sequence(tuple(self.build(replace(given, value=part)) for part in parts), name == "Sequential")
        return None

    def _instance(self, owner: Class, call: cst.Call, given: _Given) -> _Built:
        if owner.name.endswith("Linear"):
            return _Layer("linear")
        constructor = self.repository.method(owner, "__init__")
        if constructor is None:
            return _Instance(owner)
        bound: dict[str, _Given] = {}
        for parameter in parameters(constructor.node):
            if parameter.default is not None:
                bound[parameter.name.value] = _Given(parameter.default, constructor, None, ())
        if any(arg.star for arg in call.args):
            return None
        for name, value in bind(constructor.node, call, skip=1).items():
            bound[name] = replace(given, value=value)
        return _Instance(owner, tuple(bound.items()))

    def _library(self, name: str, call: cst.Call, given: _Given) -> _Built:
        first, second, classes = _LIBRARY[name]
        if any(arg.star for arg in call.args):
            return None
        if classes == "Mlp":
            return _Library(Mlp("gelu?", f"{first}, act, {second}", classes))
        kind = argument(call, 5, "activation_fn")
        activation = _LIBRARY_ACTIVATIONS.get(self.text(kind, given) or "")
        return None if activation is None else _Library(Mlp(activation, f"{first}, {activation}, {second}", classes))

    def attribute(self, instance: _Instance, name: str) -> _Built:
        """What `self.name` is in an object, lists with what is appended to them."""
        found: list[_Built] = []
        for value, method, step in self.repository.values_of(instance.owner, name):
            given = self._inside(instance, value, method, step)
            if self._happens(step, given):
                found.append(self.build(given))
        built = _one(found)
        if not isinstance(built, _Sequence) or built.runs:
            return built
        items = list(built.items)
        for owner in self.repository.bases(instance.owner):
            for method in owner.methods.values():
                for call, step in method.scope.calls:
                    if dotted(call.func) == f"{method.scope.receiver}.{name}.append" and len(call.args) == 1:
                        given = self._inside(instance, call.args[0].value, method, step)
                        if self._happens(step, given):
                            items.append(self.build(given))
        return _Sequence(tuple(items), False)

    def _inside(self, instance: _Instance, value: cst.BaseExpression, method: Function, step: Step) -> _Given:
        """An expression in a method of the object; only the names of its own constructor are known."""
        constructor = self.repository.method(instance.owner, "__init__")
        known = instance.arguments if method is constructor else ()
        return _Given(value, method, step, known)

    def _happens(self, step: Step, given: _Given) -> bool:
        """Whether the step may run; False only if a condition around it says no."""
        for node, branch in step.chain:
            if isinstance(node, cst.If):
                decided = self.decide(node.test, given)
                if decided is not None and decided != (branch == "body"):
                    return False
        return True

    def meant(self, given: _Given) -> list[_Given]:
        """What a name stands for, through local variables and the constructor's arguments; itself if nothing else."""
        name, scope = given.value, given.function.scope
        if isinstance(name, cst.IfExp):
            decided = self.decide(name.test, given)
            if decided is None:
                return [given]
            return self.meant(replace(given, value=name.body if decided else name.orelse))
        if not isinstance(name, cst.Name) or given.step is None:
            return [given]
        found: list[_Given] = []
        for binding in scope.reaching(name.value, given.step):
            inner = replace(given, value=binding.value, step=binding.step) if binding.value is not None else None
            if inner is not None and not binding.path and self._happens(binding.step, inner):
                found += self.meant(inner)
        arguments = dict(given.arguments)
        if not found and name.value in arguments:
            return self.meant(arguments[name.value])
        return found or [given]

    def text(self, value: cst.BaseExpression | None, given: _Given) -> str | None:
        """The string that the expression is."""
        if value is None:
            return None
        found = {text_of_string(meant.value) for meant in self.meant(replace(given, value=value))}
        return found.pop() if len(found) == 1 else None

    def decide(self, test: cst.BaseExpression, given: _Given) -> bool | None:
        """Whether a condition holds, from the constructor's arguments; None if they do not tell."""
        if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
            inner = self.decide(test.expression, given)
            return None if inner is None else not inner
        if isinstance(test, cst.Name):
            found = [_literal(meant.value) for meant in self.meant(replace(given, value=test))]
            return bool(found[0]) if len(found) == 1 and not isinstance(found[0], _Unknown) else None
        if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
            target = test.comparisons[0]
            sides = [
                _literal(meant[0].value) if len(meant := self.meant(replace(given, value=side))) == 1 else _Unknown()
                for side in (test.left, target.comparator)
            ]
            if any(isinstance(side, _Unknown) for side in sides):
                return None
            if isinstance(target.operator, (cst.Equal, cst.Is)):
                return sides[0] == sides[1]
            if isinstance(target.operator, (cst.NotEqual, cst.IsNot)):
                return sides[0] != sides[1]
        return None


def _literal(value: cst.BaseExpression) -> object:
    """The value of a literal; an `_Unknown` for anything else."""
    if isinstance(value, cst.Name) and value.value in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[value.value]
    text, number = text_of_string(value), integer(value)
    if text is None and number is None:
        return float(value.value) if isinstance(value, cst.Float) else _Unknown()
    return number if text is None else text


def _one(found: list[_Built]) -> _Built:
    return found[0] if found and all(built == found[0] for built in found) else None


# Following a forward


_SAME = ("to", "contiguous", "type_as")


@dataclass
class _Follow:
    """Follows the forward of modules; `classes` are those of the repository that it has read."""

    repository: Repository
    classes: list[str] = field(default_factory=list)
    depth: int = 0

    def run(self, module: _Built, at: str, value: _Value) -> _Value:
        """What the module at that place makes of the value. Raises _Unknown."""
        if isinstance(module, _Layer):
            if module.kind == "idle":
                return value
            return _Value(module.kind, value, at)
        if isinstance(module, _Sequence) and module.runs:
            for index, item in enumerate(module.items):
                value = self.run(item, _join(at, str(index)), value)
            return value
        if isinstance(module, _Instance) and self.depth < _DEPTH:
            forward = self.repository.method(module.owner, "forward")
            if forward is None or not _is_plain(forward) or self.repository.method(module.owner, "__call__"):
                raise _Unknown
            if module.owner.name not in self.classes:
                self.classes.append(module.owner.name)
            self.depth += 1
            try:
                return _Frame(self, module, at, forward).call([value])
            finally:
                self.depth -= 1
        raise _Unknown


def _is_plain(function: Function) -> bool:
    """Whether no decorator may change what the function computes (autocast, say)."""
    found = [d.decorator.func if isinstance(d.decorator, cst.Call) else d.decorator for d in function.node.decorators]
    return {last_name(decorator) for decorator in found} <= {"compile", "no_grad", "inference_mode"}


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


class _Frame:
    """One call of a method of a module."""

    def __init__(self, follow: _Follow, instance: _Instance, at: str, function: Function) -> None:
        self.follow, self.instance, self.at, self.function = follow, instance, at, function
        self.builder = _Builder(follow.repository)
        self.values: dict[str, _Value] = {}
        self.halves: dict[str, _Value] = {}
        """Names that hold both halves of a value."""
        self.widths: dict[str, _Value] = {}
        """Names that hold half of a value's width."""
        self.modules: dict[str, tuple[_Built, str]] = {}
        """Names that hold a module, and its place."""

    def call(self, given: list[_Value]) -> _Value:
        names = [p.name.value for p in self.function.node.params.params][1:]
        if len(names) < len(given) or self.function.owner is None or self.function.is_static:
            raise _Unknown
        self.values.update(zip(names, given, strict=False))
        result = self._suite(self.function.node.body)
        if result is None:
            raise _Unknown
        return result

    def _suite(self, suite: cst.BaseSuite) -> _Value | None:
        """Run the statements; what they return, None if they go on."""
        return self._statements(list(suite.body))

    def _statements(self, body: list[Any]) -> _Value | None:
        for statement in body:
            for node in statement.body if isinstance(statement, cst.SimpleStatementLine) else (statement,):
                result = self._statement(node)
                if result is not None:
                    return result
        return None

    def _statement(self, node: cst.CSTNode) -> _Value | None:
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
            raise _Unknown
        return None

    def _if(self, node: cst.If) -> _Value | None:
        """A condition on something else than the module's construction may do anything but touch the values."""
        decided = self.builder.decide(node.test, _Given(node.test, self.function, None, self.instance.arguments))
        if isinstance(decided, bool) and not self._concerns(node.test):
            suite = node.body if decided else node.orelse
            if isinstance(suite, cst.If):
                return self._if(suite)
            suite = suite.body if isinstance(suite, cst.Else) else suite
            return self._suite(suite) if suite is not None else None
        before = dict(self.values)
        result = self._suite(node.body)
        if self.values != before or node.orelse is not None:
            raise _Unknown
        if result is None:
            return None
        rest = _Frame(self.follow, self.instance, self.at, self.function)
        rest.values, rest.modules = dict(self.values), dict(self.modules)
        other = rest._after(node)
        if other != result:
            raise _Unknown
        return result

    def _after(self, node: cst.CSTNode) -> _Value | None:
        """What the statements after `node`, in the function's own suite, return."""
        body: list[Any] = list(self.function.node.body.body)
        if node not in body:
            raise _Unknown
        return self._statements(body[body.index(node) + 1 :])

    def _for(self, name: str, node: cst.For) -> _Value | None:
        module, at = self._module(node.iter)
        if not isinstance(module, _Sequence):
            raise _Unknown
        for index, item in enumerate(module.items):
            self.modules[name] = (item, _join(at, str(index)))
            if self._suite(node.body) is not None:
                raise _Unknown
        return None

    def _assign(self, target: cst.BaseExpression, value: cst.BaseExpression) -> None:
        if isinstance(target, (cst.Tuple, cst.List)):
            names = [last_name(element.value) for element in target.elements]
            for name, half in zip(names, self._both(value), strict=True):
                self.values[name] = half
            return
        if not isinstance(target, cst.Name):
            raise _Unknown
        name, found = target.value, self._meant(value)
        tables: list[dict[str, Any]] = [self.values, self.halves, self.widths, self.modules]
        for table in tables:
            table.pop(name, None)
        if found is not None:
            table, meant = found
            table[name] = meant

    def _meant(self, value: cst.BaseExpression) -> tuple[dict[str, Any], _Value] | None:
        """What a name gets, and in which table; None if it has nothing to do with the values."""
        if (whole := self._half_width(value)) is not None:
            return self.widths, whole
        if not self._concerns(value):
            return None
        try:
            return self.values, self.value(value)
        except _Unknown:
            return self.halves, self._both(value)[0].of or _INPUT

    def _both(self, value: cst.BaseExpression) -> tuple[_Value, _Value]:
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
                raise _Unknown
            whole = self.value(inner)
        else:
            raise _Unknown
        return _Value("half", whole, "0"), _Value("half", whole, "1")

    def _half_width(self, value: cst.BaseExpression) -> _Value | None:
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
        except _Unknown:
            return None

    def value(self, node: cst.BaseExpression | None) -> _Value:
        """What the expression computes."""
        if isinstance(node, cst.Name) and node.value in self.values:
            return self.values[node.value]
        if isinstance(node, cst.Call):
            return self._call(node)
        if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply):
            return _gated(self.value(node.left), self.value(node.right))
        if isinstance(node, cst.Subscript):
            return self._subscript(node)
        raise _Unknown

    def _subscript(self, node: cst.Subscript) -> _Value:
        last = node.slice[-1].slice
        if isinstance(last, cst.Index) and len(node.slice) == 1 and integer(last.value) in (0, 1):
            return self._both(node.value)[integer(last.value) or 0]
        if not isinstance(last, cst.Slice) or last.step is not None or len(node.slice) not in (2, 3):
            raise _Unknown
        for part in node.slice[:-1]:
            whole = isinstance(part.slice, cst.Slice) and part.slice.lower is None and part.slice.upper is None
            if not whole and not (isinstance(part.slice, cst.Index) and isinstance(part.slice.value, cst.Ellipsis)):
                raise _Unknown
        value = self.value(node.value)
        cut = last.upper if last.lower is None else last.lower
        if cut is None or (last.lower is not None and last.upper is not None) or self._half_width(cut) != value:
            raise _Unknown
        return _Value("half", value, "0" if last.lower is None else "1")

    def _call(self, call: cst.Call) -> _Value:
        function, name = call.func, last_name(call.func)
        if isinstance(function, cst.Attribute) and name in _SAME and self._concerns(function.value):
            return self.value(function.value)
        if not call.args or call.args[0].star or call.args[0].keyword is not None:
            raise _Unknown
        first = call.args[0].value
        for kind in ("gelu", "silu"):
            is_torch = _is_torch(self.follow.repository, function, kind, self.function, None)
            if is_torch and dotted(function) is not None and not self._is_own(function):
                return self._functional(kind, call)
        own = self._own_method(function)
        if own is not None:
            if any(arg.star or arg.keyword is not None for arg in call.args):
                raise _Unknown
            return _Frame(self.follow, self.instance, self.at, own).call([self.value(arg.value) for arg in call.args])
        if len(call.args) != 1:
            raise _Unknown
        module, at = self._module(function)
        return self.follow.run(module, at, self.value(first))

    def _functional(self, kind: str, call: cst.Call) -> _Value:
        value = self.value(call.args[0].value)
        if kind == "silu":
            return _Value("silu", value)
        approximate = argument(call, 1, "approximate")
        text: str | None = "none"
        if approximate is not None:
            text = text_of_string(approximate)
            attribute = self._receiver_attribute(approximate)
            if attribute is not None:
                text = self._text(attribute)
        if text not in ("tanh", "none"):
            raise _Unknown
        return _Value("gelu_tanh" if text == "tanh" else "gelu", value)

    def _text(self, attribute: str) -> str | None:
        found = {
            self.builder.text(value, _Given(value, method, step, self.instance.arguments))
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

    def _module(self, node: cst.BaseExpression) -> tuple[_Built, str]:
        """The module that the expression is, and its place."""
        if isinstance(node, cst.Name) and node.value in self.modules:
            return self.modules[node.value]
        attribute = self._receiver_attribute(node)
        if attribute is not None:
            return self.builder.attribute(self.instance, attribute), _join(self.at, attribute)
        if isinstance(node, cst.Subscript) and len(node.slice) == 1 and isinstance(node.slice[0].slice, cst.Index):
            module, at = self._module(node.value)
            index = integer(node.slice[0].slice.value)
            if isinstance(module, _Sequence) and index is not None and -len(module.items) <= index < len(module.items):
                return module.items[index], _join(at, str(index % len(module.items)))
        raise _Unknown

    def _concerns(self, node: cst.CSTNode) -> bool:
        """Whether the values occur in it."""
        known = self.values.keys() | self.halves.keys()
        return any(isinstance(inner, cst.Name) and inner.value in known for inner in walk(node))


def _gated(first: _Value, second: _Value) -> _Value:
    """`silu(gate) · value` of the two halves of one value."""
    for gate, value in ((first, second), (second, first)):
        inner = gate.of
        if gate.kind != "silu" or inner is None or inner.of != value.of:
            continue
        if inner.kind == value.kind == "half" and {inner.at, value.at} == {"0", "1"}:
            return _Value("swiglu" if inner.at == "0" else "swiglu_value_first", inner.of)
    raise _Unknown
