"""Send the image MLP of the double blocks through Chipmunk.

The MLP is the attribute that is built as Linear, GELU (tanh), Linear, and whose result flows into the image stream that
the block returns, and not into the text stream. Only the call changes, never the arithmetic around it. The text MLP
stays dense: it is small. An MLP that sees only some of the tokens stays dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.layers import built_as_tanh_gelu_mlp
from chipmunk.rewrite.minimal import DOUBLE, variant
from chipmunk.rewrite.roles import Block
from chipmunk.rewrite.syntax import elements, is_call, self_attribute, walk

NAME = "double-mlp"
API = 1
VERSION = "1"


def rule(context: Context) -> None:
    for model in context.models:
        _patch_block(context, model.double_block)


def _patch_block(context: Context, block: Block) -> None:
    source, function = block.forward.source, block.forward
    calls = list(_mlp_calls(context, block))
    image = [call for call in calls if call.stream == "image"]
    if not image:
        context.left_dense(
            source,
            function.node.name,
            "no Linear, GELU(tanh), Linear was found on the image stream alone",
            matched=function.name,
        )
    for found in image:
        if found.done:
            block.mlp = found.attribute
            context.already(source, found.call, "the image MLP is Chipmunk's")
        elif found.problem:
            context.left_dense(source, found.call, found.problem)
        else:
            block.mlp = found.attribute
            runtime = context.runtime(source)
            context.replace(source, found.call.func, f"{runtime}.mlp")
            receiver = function.scope.receiver
            context.prepend_arguments(source, found.call, [receiver, f"{receiver}.{found.attribute}"])
            context.patched(source, found.call, "the image MLP: Linear, GELU(tanh), Linear on the whole image stream")


@dataclass
class _Mlp:
    """A call of such an MLP. `stream`: whose result it becomes part of; `problem`: why it must stay dense."""

    call: cst.Call
    step: Step
    attribute: str
    done: bool
    stream: str = ""
    problem: str = ""


def _mlp_calls(context: Context, block: Block) -> list[_Mlp]:
    """Calls of attributes that are such MLPs, each with the stream that its result belongs to."""
    function = block.forward
    scope = function.scope
    found: list[_Mlp] = []
    for call, step in scope.calls:
        done = context.runtime_call(call, function, step) == "mlp" and len(call.args) >= 2
        callee = call.args[1].value if done else call.func
        attribute = self_attribute(callee, scope.receiver)
        if attribute is not None and built_as_tanh_gelu_mlp(context.repository, block.owner, attribute):
            found.append(_Mlp(call, step, attribute, done))
    feeds = _calls_behind_results(scope, block)
    for mlp in found:
        streams = {stream for stream, calls in feeds.items() if mlp.call in calls}
        mlp.stream = streams.pop() if len(streams) == 1 else ""
        if not mlp.done and (len(mlp.call.args) != 1 or mlp.call.args[0].star or mlp.call.args[0].keyword is not None):
            mlp.problem = "the MLP is called with more than its input"
        elif not mlp.done and _is_gathered(scope, mlp.call.args[0].value, mlp.step, set(block.streams)):
            mlp.problem = "the MLP sees only some of the tokens"
    return found


def _calls_behind_results(scope: Scope, block: Block) -> dict[str, set[cst.Call]]:
    """For `image` and `text`: the calls that the returned stream is computed by."""
    found: dict[str, set[cst.Call]] = {"image": set(), "text": set()}
    order = list(block.streams.values())
    names = {stream: name for name, stream in block.streams.items()}
    for step in scope.steps:
        if not isinstance(step.node, cst.Return):
            continue
        parts = elements(step.node.value)
        if parts is None or len(parts) < 2:
            continue
        for place, part in enumerate(parts[:2]):
            # A result in the variable of a stream is that stream; else the order of the parameters decides.
            stream = next((s for s, name in names.items() if name in set(value_names(part))), order[place])
            found[stream].update(call for call, _ in scope.calls_behind(part, step))
    return found


def _is_gathered(scope: Scope, value: cst.CSTNode, step: Step, streams: set[str]) -> bool:
    """Whether the input is picked out of a stream by an index or a mask."""
    for node in walk(value):
        if isinstance(node, cst.Subscript) and scope.roots(node.value, step) & streams:
            return True
        if is_call(node, "index_select", "gather", "masked_select", "take_along_dim"):
            return True
    temporaries = [name for name in value_names(value) if name not in streams and "." not in name]
    return any(
        _is_gathered(scope, binding.value, binding.step, streams)
        for name in temporaries
        for binding in scope.reaching(name, step)
        if binding.value is not None and not binding.path
    )


_CALL = "self.image_mlp(self.image_norm(image))"

EXAMPLES = (
    Example(
        "an MLP with another activation",
        "flow/double.py",
        variant(DOUBLE, ('nn.GELU(approximate="tanh")', "nn.SiLU()")),
        None,
    ),
    Example(
        "an MLP that sees only some of the tokens",
        "flow/double.py",
        variant(DOUBLE, (_CALL, "self.image_mlp(self.image_norm(image)[:, ::2]).repeat_interleave(2, dim=1)")),
        None,
    ),
    Example(
        "the MLP of the image stream; that of the text stays dense",
        "flow/double.py",
        DOUBLE,
        variant(
            DOUBLE,
            ("import torch\nfrom", "import chipmunk\nimport torch\nfrom"),
            (_CALL, "chipmunk.mlp(self, self.image_mlp, self.image_norm(image))"),
        ),
    ),
)
