"""Which torch layer an expression builds."""

from __future__ import annotations

import libcst as cst

from chipmunk.rewrite.repository import Class, Repository
from chipmunk.rewrite.syntax import argument, elements, is_call, last_name, text_of_string


def is_linear(value: cst.CSTNode) -> bool:
    """A Linear or one of its kind (`F8Linear`); the runtime looks at the exact type."""
    return isinstance(value, cst.Call) and last_name(value.func).endswith("Linear")


def is_tanh_gelu(value: cst.CSTNode) -> bool:
    """`GELU(approximate="tanh")`."""
    return is_call(value, "GELU") and text_of_string(argument(value, 0, "approximate")) == "tanh"


def is_tanh_gelu_mlp(value: cst.CSTNode) -> bool:
    """`Sequential(Linear, GELU(approximate="tanh"), Linear)`, the layers also in one list or tuple."""
    if not is_call(value, "Sequential"):
        return False
    parts = [arg.value for arg in value.args]
    if len(parts) == 1:
        parts = elements(parts[0]) or []
    return len(parts) == 3 and is_linear(parts[0]) and is_tanh_gelu(parts[1]) and is_linear(parts[2])


def built_as_linear(repository: Repository, owner: Class, attribute: str) -> bool:
    return any(is_linear(value) for value, _, _ in repository.values_of(owner, attribute))


def built_as_tanh_gelu(repository: Repository, owner: Class, attribute: str) -> bool:
    return any(is_tanh_gelu(value) for value, _, _ in repository.values_of(owner, attribute))


def built_as_tanh_gelu_mlp(repository: Repository, owner: Class, attribute: str) -> bool:
    return any(is_tanh_gelu_mlp(value) for value, _, _ in repository.values_of(owner, attribute))
