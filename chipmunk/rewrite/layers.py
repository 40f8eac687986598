"""Whether what a module is built of is an MLP or an activation, and of which parts: told by following its forward."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite.building import Layer, LibraryMlp, Series, built_as, is_torch
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.following import INPUT, Follow, Unknown
from chipmunk.rewrite.repository import Class, Function, Repository
from chipmunk.rewrite.syntax import argument, text_of_string

_ACTIVATIONS = {"gelu_tanh", "gelu", "gelu?", "swiglu", "swiglu_value_first"}


@dataclass(frozen=True)
class Mlp:
    """What the runtime is to be told of an MLP: see `chipmunk.runtime.linears.mlp_form`."""

    activation: str
    parts: str = ""
    of: str = ""

    @property
    def gated(self) -> bool:
        return self.activation.startswith("swiglu")


def builds_linear(repository: Repository, owner: Class, attribute: str) -> bool:
    """Whether the attribute may be a Linear, or one of its kind (`F8Linear`): the runtime looks at the exact type."""
    return any(isinstance(b, Layer) and b.kind == "linear" for b in built_as(repository, owner, attribute))


def mlp_built(repository: Repository, owner: Class, attribute: str) -> Mlp | None:
    """The attribute's MLP, Linear → activation → Linear; None if it is none."""
    for built in built_as(repository, owner, attribute):
        if isinstance(built, LibraryMlp):
            return Mlp(built.activation, built.parts, built.of)
        follow = Follow(repository)
        try:
            value = follow.run(built, "", INPUT)
        except Unknown:
            continue
        inner = value.of
        if value.kind != "linear" or inner is None or inner.kind not in _ACTIVATIONS or inner.of is None:
            continue
        first = inner.of
        if first.kind == "linear" and first.of == INPUT:
            if isinstance(built, Series) and not follow.classes:
                return Mlp(inner.kind)
            name = inner.at if inner.kind == "gelu?" else inner.kind
            return Mlp(inner.kind, f"{first.at}, {name}, {value.at}", ", ".join(follow.classes))
    return None


def activation_built(repository: Repository, owner: Class, attribute: str) -> Mlp | None:
    """The attribute's activation, with its classes if they are the repository's own; None if it is none we know."""
    for built in built_as(repository, owner, attribute):
        follow = Follow(repository)
        try:
            value = follow.run(built, "", INPUT)
        except Unknown:
            continue
        if value.kind in _ACTIVATIONS and value.of == INPUT and (value.kind != "gelu?" or not follow.classes):
            return Mlp(value.kind, of=", ".join(follow.classes))
    return None


def functional_activation(repository: Repository, call: cst.Call, function: Function, step: Step) -> str | None:
    """`gelu_tanh` or `gelu` if the call is torch's function of that name, on one value."""
    if not is_torch(repository, call.func, "gelu", function, step) or not call.args or call.args[0].star:
        return None
    approximate = argument(call, 1, "approximate")
    if len(call.args) > 2 or (approximate is None and len(call.args) > 1) or call.args[0].keyword is not None:
        return None
    text = "none" if approximate is None else text_of_string(approximate)
    return {"tanh": "gelu_tanh", "none": "gelu"}.get(text or "")
