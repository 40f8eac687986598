"""Send the MLP of the single blocks, which is fused into their two linear layers, through Chipmunk.

The first linear's output is split into [query, key, value | MLP]; the second takes the attention's output beside the
activated MLP part. Both calls change, as the part between them is left uncomputed on a sparse step: so if it is used
anywhere else, both stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step
from chipmunk.rewrite.layers import built_as_linear, built_as_tanh_gelu
from chipmunk.rewrite.minimal import SINGLE, variant
from chipmunk.rewrite.repository import Repository
from chipmunk.rewrite.roles import CONCATENATIONS, Block
from chipmunk.rewrite.syntax import (
    argument,
    dotted,
    elements,
    integer,
    is_call,
    self_attribute,
    target_names,
    walk,
)

NAME = "single-mlp"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.single_block)


@dataclass(frozen=True)
class _Split:
    """`qkv, mlp = torch.split(self.linear1(x), [...], dim=-1)`."""

    call: cst.Call
    step: Step
    linear: str
    linear_call: cst.Call | None
    """None if Chipmunk's call stands there already."""
    sizes: cst.Arg | None
    dim: cst.Arg | None
    mlp: str
    """The name that the MLP part is bound to."""


@dataclass(frozen=True)
class _Join:
    """`self.linear2(torch.cat((attn, self.mlp_act(mlp)), 2))`."""

    call: cst.Call
    step: Step
    linear: str
    attention: cst.BaseExpression
    activation: str
    mlp: str
    done: bool


def _patch_block(context: Context, block: Block) -> None:
    source, scope = block.forward.source, block.forward.scope
    splits = [s for call, step in scope.calls if (s := _split(context, block, call, step)) is not None]
    joins = [j for call, step in scope.calls if (j := _join(context, block, call, step)) is not None]
    pairs = [(s, j) for s in splits for j in joins if s.mlp == j.mlp]
    if not pairs:
        missing = (
            "its output's split into [query, key, value | MLP]"
            if not splits
            else "cat(attention, activation(MLP)) into a second linear"
        )
        context.left_dense(
            source, block.forward.node.name, f"no fused MLP was found: {missing} is missing", matched=block.forward.name
        )
        return
    split, join = pairs[0]
    problem = _problem(context.repository, block, split, join)
    if len(pairs) > 1:
        problem = "there are several splits of the fused linear"
    if problem:
        context.left_dense(source, split.call, problem)
        context.left_dense(source, join.call, problem)
        return
    block.linear_in, block.linear_out = split.linear, join.linear
    receiver = scope.receiver
    if split.linear_call is None:
        context.already(source, split.call, "the fused linear is Chipmunk's")
    else:
        _edit_split(context, block, split)
        context.patched(
            source, split.call, f"{receiver}.{split.linear} makes query, key, value and the MLP's input in one go"
        )
    if join.done:
        context.already(source, join.call, "the second linear is Chipmunk's")
    else:
        attention = source.code(join.attention)
        texts = [receiver, f"{receiver}.{join.linear}", attention, f"{receiver}.{join.activation}", join.mlp]
        context.replace(source, join.call, f"{context.runtime(source)}.cat_linear({', '.join(texts)})")
        context.patched(
            source, join.call, f"{receiver}.{join.linear} takes the attention and the activated MLP part together"
        )


def _edit_split(context: Context, block: Block, split: _Split) -> None:
    source, receiver = block.forward.source, block.forward.scope.receiver
    linear = split.linear_call
    assert linear is not None
    assert split.sizes is not None
    runtime = context.runtime(source)
    inputs = f"{receiver}, {receiver}.{split.linear}, {source.code(linear.args[0].value)}"
    start = source.span(split.call.func)[0]
    if any(arg.value is linear for arg in split.call.args):
        context.replace(source, split.call.func, f"{runtime}.split_linear")
        context.replace(source, linear, inputs)
    else:  # self.linear1(x).split([...], dim=-1)
        context.edit(source, start, source.span(split.sizes)[0], f"{runtime}.split_linear({inputs}, ")
    if split.sizes.keyword is not None:
        context.edit(source, source.span(split.sizes)[0], source.span(split.sizes.value)[0], "") if any(
            arg.value is linear for arg in split.call.args
        ) else None
    if split.dim is not None:
        context.edit(source, source.span(split.sizes)[1], source.span(split.dim)[1], "")


def _split(context: Context, block: Block, call: cst.Call, step: Step) -> _Split | None:
    """The call, if it splits the output of a linear in two and binds both parts."""
    scope, node = block.forward.scope, step.node
    if not isinstance(node, cst.Assign) or node.value is not call or len(node.targets) != 1:
        return None
    names = [name for name, path in target_names(node.targets[0].target) if len(path) == 1]
    if len(names) != 2:
        return None
    if context.runtime_call(call, block.forward, step) == "split_linear" and len(call.args) == 4:
        linear = self_attribute(call.args[1].value, scope.receiver)
        return None if linear is None else _Split(call, step, linear, None, call.args[3], None, names[1])
    if not is_call(call, "split", "split_with_sizes") or not isinstance(call.func, cst.Attribute):
        return None
    arguments = list(call.args)
    inner: cst.BaseExpression = call.func.value
    if dotted(inner) is not None and arguments:  # torch.split(x, sizes, dim)
        inner = arguments.pop(0).value
    inner = _only_value(scope, inner, step) or inner
    if not isinstance(inner, cst.Call):
        return None
    linear = self_attribute(inner.func, scope.receiver)
    sizes = next(
        (a for i, a in enumerate(arguments) if _is(a, i, 0, "split_size_or_sections", "split_size", "split_sizes")),
        None,
    )
    dim = next((a for i, a in enumerate(arguments) if _is(a, i, 1, "dim")), None)
    if linear is None or sizes is None or len(elements(sizes.value) or []) != 2 or len(arguments) > 2:
        return None
    return _Split(call, step, linear, inner, sizes, dim, names[1])


def _is(arg: cst.Arg, index: int, position: int, *names: str) -> bool:
    return arg.keyword.value in names if arg.keyword is not None else index == position and not arg.star


def _only_value(scope: Scope, value: cst.BaseExpression, step: Step) -> cst.BaseExpression | None:
    """The expression that a name stands for here, if there is only one."""
    if not isinstance(value, cst.Name):
        return None
    found = scope.reaching(value.value, step)
    return found[0].value if len(found) == 1 and not found[0].path else None


def _join(context: Context, block: Block, call: cst.Call, step: Step) -> _Join | None:
    """The call, if it is a linear over cat(attention, activation(mlp))."""
    scope = block.forward.scope
    if context.runtime_call(call, block.forward, step) == "cat_linear" and len(call.args) == 5:
        linear, activation = (self_attribute(call.args[i].value, scope.receiver) for i in (1, 3))
        mlp = dotted(call.args[4].value)
        if linear is None or activation is None or mlp is None:
            return None
        return _Join(call, step, linear, call.args[2].value, activation, mlp, True)
    linear = self_attribute(call.func, scope.receiver)
    if linear is None or len(call.args) != 1:
        return None
    inner = _only_value(scope, call.args[0].value, step) or call.args[0].value
    if not is_call(inner, *CONCATENATIONS) or not inner.args:
        return None
    parts = elements(inner.args[0].value) or []
    if len(parts) != 2 or integer(argument(inner, 1, "dim", "axis")) not in (2, -1):
        return None
    active = _only_value(scope, parts[1], step) or parts[1]
    if not isinstance(active, cst.Call) or len(active.args) != 1:
        return None
    activation, mlp = self_attribute(active.func, scope.receiver), dotted(active.args[0].value)
    if activation is None or mlp is None:
        return None
    return _Join(call, step, linear, parts[0], activation, mlp, False)


def _problem(repository: Repository, block: Block, split: _Split, join: _Join) -> str:
    """Why the pair must stay dense; empty if it may be sparse."""
    scope = block.forward.scope
    for attribute in (split.linear, join.linear):
        if not built_as_linear(repository, block.owner, attribute):
            return f"self.{attribute} is not built as a Linear"
    if not built_as_tanh_gelu(repository, block.owner, join.activation):
        return f'self.{join.activation} is not built as GELU(approximate="tanh")'
    if split.linear_call is not None:
        if split.dim is None or integer(split.dim.value) not in (2, -1):
            return "the fused linear is not split along its last dimension"
        if len(split.linear_call.args) != 1 or split.linear_call.args[0].star:
            return f"self.{split.linear} is called with more than its input"
        if not any(n is split.linear_call for n in walk(split.call)):
            return f"the output of self.{split.linear} is held in a variable of its own, which something else may read"
    if not join.done and not any(is_call(n, *CONCATENATIONS) for n in walk(join.call)):
        return "the concatenation is held in a variable of its own, which something else may read"
    if not join.done and not any(n is not join.call and is_call(n, join.activation) for n in walk(join.call)):
        return "the activated MLP part is held in a variable of its own, which something else may read"
    uses = _uses(scope, split.mlp)
    if len(uses) > 1 or len(scope.bindings.get(split.mlp, ())) > 1:
        return f"{split.mlp} is used in other places too: on a sparse step it would not hold the MLP's input"
    return ""


def _uses(scope: Scope, name: str) -> list[cst.Name]:
    found: list[cst.Name] = []
    for step in scope.steps:
        for expression in step.expressions:
            if isinstance(expression, cst.AssignTarget):
                continue
            found += [node for node in walk(expression) if isinstance(node, cst.Name) and node.value == name]
    return found


_SPLIT = "torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)"
_JOIN = "self.leave(torch.cat((mixed, self.act(hidden)), 2))"
_METHOD = variant(SINGLE, (_SPLIT, "self.enter(x).split((3 * self.width, 4 * self.width), dim=2)"))
_IMPORT = ("import torch\nfrom", "import chipmunk\nimport torch\nfrom")

EXAMPLES = (
    Example(
        "the MLP's input is used in another place too",
        "flow/single.py",
        variant(SINGLE, (_JOIN, f"{_JOIN} + hidden.mean()")),
        None,
    ),
    Example(
        "another activation", "flow/single.py", variant(SINGLE, ('nn.GELU(approximate="tanh")', "nn.GELU()")), None
    ),
    Example(
        "the two parts the other way round", "flow/single.py", variant(SINGLE, ("qkv, hidden =", "hidden, qkv =")), None
    ),
    Example(
        "both linears",
        "flow/single.py",
        SINGLE,
        variant(
            SINGLE,
            _IMPORT,
            (_SPLIT, "chipmunk.split_linear(self, self.enter, x, [3 * self.width, 4 * self.width])"),
            (_JOIN, "chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden)"),
        ),
    ),
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
            (_JOIN, "chipmunk.cat_linear(self, self.leave, mixed, self.act, hidden)"),
        ),
    ),
)
