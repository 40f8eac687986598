"""Building a model by what its constructor asks for: parameters, dataclasses, pydantic models, or constants in it."""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from chipmunk.target.signature import CannotRun
from chipmunk.target.sizes import shrunk

if TYPE_CHECKING:
    from torch import nn

SHRINK = "shrink"
"""A key of a target's `SMALL`: what it does not name itself is made smaller, by the roles that names tell."""

_MISSING = object()


def construct(model_class: type[nn.Module], values: Mapping[str, Any], target: str) -> nn.Module:
    """An instance of the class, its constructor filled from `values` by parameter name.

    The parameters may be spelled out or gathered in a dataclass or a pydantic model (`params: FluxParams`), which may
    be a field of another one. A dtype is the default one. With `SHRINK` among the values, parameters that they do not
    name take smaller values than their defaults. Raises CannotRun where a required parameter is not known to `target`.
    """
    import torch

    parameters = parameters_of(model_class)
    defaults = {name: p.default for name, (p, _) in parameters.items() if p.default is not p.empty}
    small = shrunk(defaults) if values.get(SHRINK) else {}
    arguments: dict[str, Any] = {}
    for name, (parameter, hint) in parameters.items():
        if name in values:
            arguments[name] = values[name]
        elif name in small:
            arguments[name] = small[name]
        elif _is_record(hint):
            arguments[name] = _filled(hint, values, target)
        elif hint is torch.dtype:
            arguments[name] = torch.get_default_dtype()
        elif parameter.default is parameter.empty:
            raise CannotRun(f"{model_class.__name__}() needs '{name}', which target '{target}' does not know")
    if values.get(SHRINK) and not small:
        return from_literals(model_class, arguments)
    return model_class(**arguments)


def parameter_names(model_class: type) -> set[str]:
    """What the constructor's parameters are called, and the fields of those that are records."""
    found: set[str] = set()
    for name, (_, hint) in parameters_of(model_class).items():
        found |= {name, *(record_fields(hint) or ())}
    return found


# Parameters of a constructor.


def parameters_of(model_class: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Constructor parameters with their types; a class that passes `*args, **kwargs` on also has those of its base."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for owner in model_class.__mro__[:-1]:  # without `object`
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        hints = _hints(constructor)
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in named:
            found.setdefault(parameter.name, (parameter, hints.get(parameter.name)))
        if len(named) == len(parameters):
            break
    return found


def _hints(constructor: Any) -> dict[str, Any]:
    """Types of the parameters, also of such as are imported for type checkers alone."""
    module = sys.modules[constructor.__module__]
    known: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(constructor, localns=known)
        except NameError as missing:
            name = missing.name or ""
            known[name] = _imported_for_types(module, name)


def _imported_for_types(module: ModuleType, name: str) -> Any:
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            found = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            return getattr(found, next(alias.name for alias in node.names if (alias.asname or alias.name) == name))
    return Any


# Records of parameters.


def record_fields(hint: Any) -> list[str] | None:
    """Names of the fields of a dataclass or pydantic model; None for any other type."""
    return list(_fields(hint)) if _is_record(hint) else None


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields"))


def _filled(record: Any, values: Mapping[str, Any], target: str) -> Any:
    """An instance of a dataclass or pydantic model, in which fields that are not known keep their defaults."""
    given = {}
    for name, (hint, default) in _fields(record).items():
        if name in values:
            # as many axes of positions as the class has: three in FLUX.1, four in FLUX.2
            is_wider = name == "axes_dim" and isinstance(default, list) and len(default) > len(values[name])
            given[name] = [sum(values[name]) // len(default)] * len(default) if is_wider else values[name]
        elif default is not _MISSING:
            continue
        elif _is_record(hint):
            # of the autoencoder, say, where it has nothing in common with the model's
            in_common = set(values) & set(_fields(hint)) - {"in_channels"}
            given[name] = _filled(hint, values, target) if in_common else _empty(hint)
        elif type(None) in typing.get_args(hint):
            given[name] = None
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            given[name] = next(iter(hint))
        else:
            raise CannotRun(f"{record.__name__} has a field '{name}' that target '{target}' does not know")
    return record(**given)


def _empty(record: Any) -> Any:
    return record.model_construct() if hasattr(record, "model_construct") else object.__new__(record)


def _fields(record: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each field."""
    if not dataclasses.is_dataclass(record):
        return {name: (field.annotation, _default(field)) for name, field in record.model_fields.items()}
    hints = typing.get_type_hints(record)
    return {field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(record)}


def _default(field: Any) -> Any:
    """Of a field of a dataclass or pydantic model; `_MISSING` if it has none."""
    if field.default_factory not in (None, dataclasses.MISSING):
        return field.default_factory()
    none = field.default is dataclasses.MISSING or getattr(field, "is_required", bool)()
    return _MISSING if none else field.default


# Sizes that are written into the constructor.


def from_literals(model_class: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """An instance whose constructor ran with smaller constants: those that it assigns to names (`self.heads = 24`).

    The class is not touched. The constructor runs as it is where its text cannot be had or holds no such constants.
    """
    constructor = inspect.unwrap(vars(model_class).get("__init__", model_class.__init__))
    smaller = _with_smaller_constants(constructor)
    if smaller is None:
        return model_class(**arguments)
    model = model_class.__new__(model_class)
    smaller(model, **arguments)
    return model


def _with_smaller_constants(constructor: Any) -> FunctionType | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return None
    places: dict[str, list[ast.Assign | ast.AnnAssign]] = {}
    values: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = getattr(target, "attr", getattr(target, "id", None))
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            if name is not None:
                places.setdefault(name, []).append(node)
                values[name] = value
    small = shrunk(values)
    if not small:
        return None
    for name, value in small.items():
        for node in places[name]:
            node.value = ast.copy_location(ast.parse(repr(value), mode="eval").body, node)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    # inside a function of one parameter `__class__`, so that `super()` finds the class where the original does
    around = ast.parse("def around(__class__): pass")
    outer = around.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body = [function]
    code = compile(ast.fix_missing_locations(around), inspect.getsourcefile(constructor) or "<constructor>", "exec")
    for name in (outer.name, function.name):
        code = next(each for each in code.co_consts if isinstance(each, types.CodeType) and each.co_name == name)
    cells = dict(zip(constructor.__code__.co_freevars, constructor.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    smaller = FunctionType(code, constructor.__globals__, constructor.__name__, constructor.__defaults__, closure)
    smaller.__kwdefaults__ = constructor.__kwdefaults__
    return smaller
