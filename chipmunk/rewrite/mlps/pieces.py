"""The pieces of an MLP that a function computes itself, and why such an MLP must stay dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst

from chipmunk.rewrite.flow import Binding, Scope, Step
from chipmunk.rewrite.layers import Mlp
from chipmunk.rewrite.reach import Attribute, Reached
from chipmunk.rewrite.syntax import dotted, walk

_SHAPE = {"shape", "dtype", "device", "ndim"}


@dataclass(frozen=True)
class Held:
    """A variable that holds what passes between the calls. `shape`: whether it may be asked its shape."""

    binding: Binding
    readers: tuple[cst.CSTNode, ...]
    """The places that may read its value."""
    shape: bool = False


@dataclass
class Piece:
    """One of the calls. `call`: as it stands; `done`: it is Chipmunk's already."""

    call: cst.CSTNode
    step: Step
    done: bool
    linear: Attribute | None = None
    linear_text: str = ""


@dataclass
class First(Piece):
    """The first linear, and how its output is cut."""

    kind: str = ""
    """`mlp_linear` (nothing to cut), `split_linear` (cut in one expression) or `split_held` (held in a variable)."""
    linear_call: cst.Call | None = None
    sizes: cst.Arg | str = ""
    """The argument with the sizes, or their text where the output is cut by slices."""
    dim: cst.Arg | None = None
    shares: int = 0
    """How many equal parts, where `sizes` gives their number."""
    mlp_first: bool = False
    gated: bool = False
    """Whether the MLP's part is two of the parts, the gate and the value."""
    held_text: str = ""
    """The variable that the output is held in."""
    later: Step | None = None
    """The statement with the later slice, where each has its own."""
    half: str = ""
    """`gate` or `value`, where each has a linear of its own."""
    inline: bool = False
    """Whether such a linear's call stands in the product itself."""


@dataclass
class Activation(Piece):
    """The activation. `text`: the module, or the name of the function in quotes."""

    text: str = ""
    mlp: Mlp = field(default_factory=lambda: Mlp(""))
    argument: cst.BaseExpression | None = None
    inside: bool = True
    """Whether it stands in the concatenation itself."""
    gate: cst.BaseExpression | None = None
    """What the activation is applied to, where `call` is the product of that and `value`; `text` is then the callee."""
    value: cst.BaseExpression | None = None


@dataclass
class Second(Piece):
    """The second linear over cat(attention, activation(MLP)), or over the activated part alone."""

    cat: cst.Call | None = None
    attention: cst.BaseExpression | None = None
    active: cst.BaseExpression | None = None
    mlp_first: bool = False
    call_step: Step | None = None
    """The statement that the call stands in; `step` is that of the concatenation."""
    alone: bool = False


@dataclass
class Pieces:
    """A whole MLP, in one function; the first linear may be in another one."""

    where: Reached
    second: Second
    activation: Activation
    first: First
    held: list[Held] = field(default_factory=list)
    others: list[First] = field(default_factory=list)
    """The value's linear, where `first` is the gate's alone."""
    begun: Reached | None = None
    """The function that the first linear is in, if it is another one."""
    problem: str = ""
    """Why the MLP must stay dense, as far as that function is concerned."""

    @property
    def begins(self) -> Reached:
        """The function that the first linear is in."""
        return self.begun or self.where

    @property
    def all(self) -> list[Piece]:
        return [*self.firsts, *([] if self.activation.inside else [self.activation]), self.second]

    @property
    def firsts(self) -> list[First]:
        return [self.first, *self.others]

    @property
    def linear_in(self) -> str:
        return ", ".join(first.linear.path for first in self.firsts if first.linear is not None)


def why_dense(mlp: Pieces, taken: list[Pieces]) -> str:
    """Why the MLP must stay dense, beside others of the block that are sparse; empty if it may be sparse."""
    first, second, scope = mlp.first, mlp.second, mlp.where.function.scope
    assert first.linear is not None
    assert second.linear is not None
    if mlp.problem:
        return mlp.problem
    for piece in mlp.all:
        if any(isinstance(node, (cst.For, cst.While)) for node, branch in piece.step.chain if branch == "body"):
            return "the MLP is computed piece by piece, in a loop"
    for held in mlp.held:
        if any(read not in held.readers for read in reads(scope, held.binding, shape=held.shape)):
            name = held.binding.name
            return f"{name} is used in other places too: on a sparse step it would not hold what they expect"
    if first.later is not None and first.later.index != first.step.index + 1:
        return "the parts of the first linear's output are cut off at places apart from each other"
    if first.dim is not None and isinstance(first.sizes, cst.Arg) and not first.done:
        source = mlp.begins.function.source
        if source.span(first.dim)[0] < source.span(first.sizes)[0]:
            return "the split's arguments are not in their order"
    if second.mlp_first and not second.done:
        parts = (second.attention, mlp.activation.argument if mlp.activation.inside else second.active)
        if any(dotted(part) is None for part in parts):
            return "something is computed inside the concatenation"
    for other in taken:
        if other.linear_in != mlp.linear_in or other.activation.mlp.gated != mlp.activation.mlp.gated:
            return "another linear makes the MLP's input in other branches"
        apart = other.first.step.excludes(first.step) or first.step.excludes(other.first.step)
        if other.where.function is mlp.where.function and not apart:
            return "there are several splits of the fused linear"
    return ""


def reads(scope: Scope, binding: Binding, *, shape: bool) -> list[cst.CSTNode]:
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
