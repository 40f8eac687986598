"""A file for the user to complete: how to build a model, and how to call it, where no target can.

Everything that signatures tell is filled in; what they do not tell is `...`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from chipmunk.target.calls import roles_of
from chipmunk.target.construct import parameters_of, record_fields
from chipmunk.target.signature import is_required
from chipmunk.target.sizes import shrunk

_CALL = '''

def inputs(model, batch, height, width, text_tokens, generator, reference=False):
    """Tensors of one image of height x width tokens, under names of your choice.

    `img` has to be the noise; `txt` and `vec`, where there are any, are what a second prompt changes.
    """
    weight = next(model.parameters())

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(weight)
{positions}
    return {{
{inputs}
    }}


def call(call_model, model, given, time, extra=None):
    """One call at a time between 1 (noise) and 0: the velocity, of the shape of `img`."""
    times = given["img"].new_full((len(given["img"]),), time)
    result = call_model(
{arguments}
    )
    return result if isinstance(result, torch.Tensor) else result[0]
'''

_POSITIONS = """
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).to(weight)
"""


def skeleton(
    model_class: type[nn.Module], calls: bool, values: Mapping[str, Any] | None = None, builds: bool = True
) -> str:
    """The text of `verify_factory.py`; with `calls` also how the model is called, where building it is not enough.

    values: what the target knows of the constructor's arguments, by name. builds: whether it says how the model is
    built.
    """
    if not builds:
        return "import torch\n" + _calls(model_class)
    name = model_class.__name__
    records: list[type] = []
    build = _call_of(name, _constructor(model_class, values or {}, records), records, "    ")
    names = ", ".join([name, *(record.__name__ for record in records if record.__module__ == model_class.__module__)])
    others = [record for record in records if record.__module__ != model_class.__module__]
    imports = [f"from {model_class.__module__} import {names}"]
    imports += [f"from {record.__module__} import {record.__name__}" for record in others]
    if calls:
        imports.insert(0, "import torch\n")
    text = (
        "\n".join(imports)
        + f'''


def build():
    """A small {name}: two heads, at least three blocks of each kind after the first two. Weights do not matter."""
    return {build}
'''
    )
    return text + (_calls(model_class) if calls else "")


# The constructor.


def _constructor(model_class: type, known: Mapping[str, Any], records: list[type]) -> dict[str, Any]:
    """Value of each parameter; a record as (record, its fields)."""
    found = parameters_of(model_class)
    defaults = {name: p.default for name, (p, _) in found.items() if p.default is not p.empty}
    values: dict[str, Any] = {}
    for name, (parameter, hint) in found.items():
        fields = record_fields(hint)
        if fields is not None:
            values[name] = hint, {field: known.get(field, ...) for field in fields}
            records.append(hint)
        else:
            values[name] = ... if is_required(parameter) else parameter.default
    return {**values, **shrunk(defaults), **{name: known[name] for name in values if name in known}}


def _call_of(name: str, values: dict[str, Any], records: list[type], indent: str) -> str:
    lines = []
    for parameter, value in values.items():
        if isinstance(value, tuple) and value and value[0] in records:
            written = _call_of(value[0].__name__, value[1], records, indent + "    ")
        else:
            written = "..." if value is ... else repr(value)
        if written == "..." or "(" in written or _is_literal(written):
            lines.append(f"{indent}    {parameter}={written},\n")
    return f"{name}(\n{''.join(lines)}{indent})" if lines else f"{name}()"


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


# The forward.


def _calls(model_class: type[nn.Module]) -> str:
    parameters = dict(list(inspect.signature(model_class.forward).parameters.items())[1:])
    roles = roles_of(parameters)
    is_latents = "image ids" not in roles.values()
    texts = [name for name, role in roles.items() if role == "text"]
    inputs, arguments, left_out = [], [], []
    for name, parameter in parameters.items():
        role = roles.get(name)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        key = {"image": "img", "pooled": "vec"}.get(role or "", "txt" if texts[:1] == [name] else name)
        if role == "time":
            arguments.append(f"{name}=times,")
        elif role == "guidance":
            arguments.append(f"{name}=torch.full_like(times, 3.5),  # not where the model was built without guidance")
        elif name == "return_dict":
            arguments.append("return_dict=False,")
        elif role is None and not is_required(parameter):
            left_out.append(name)
        else:
            arguments.append(f'{name}=given["{key}"],')
            inputs.append(f'"{key}": {_shape(role, is_latents)}')
    if not inputs:
        inputs.append('"img": noise(batch, height * width, ...),  # and the rest; its channels')
        arguments.append("...  # its signature names nothing: as the repository's own code calls it")
    if left_out:
        arguments.append(f"# it also takes {', '.join(left_out)}")
    return _CALL.format(
        positions="" if is_latents else _POSITIONS,
        inputs="\n".join(f"        {line}" for line in inputs),
        arguments="\n".join(f"        {line}" for line in arguments),
    )


def _shape(role: str | None, is_latents: bool) -> str:
    """A line of `inputs`: what can be told of a tensor by what it is for."""
    if role == "image" and is_latents:
        return "noise(batch, ..., height, width),  # its channels; twice the size where two rows make one token"
    return {
        "image": "noise(batch, height * width, ...),  # its channels",
        "text": "noise(batch, text_tokens, ...),  # its channels",
        "pooled": "noise(batch, ...),  # its channels",
        "mask": "torch.ones(batch, text_tokens, dtype=torch.bool, device=weight.device),",
        "image ids": "positions.expand(batch, -1, -1),  # (batch, height * width, 3), or as forward wants them",
        "text ids": "torch.zeros(batch, text_tokens, 3).to(weight),  # or as forward wants them",
    }.get(role or "", "...,")
