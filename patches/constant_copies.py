"""Copy constants to the GPU without waiting for it.

The embedding of the timestep makes its frequencies on the CPU and copies them with `.to(t.device)`, at each step. Such
a copy waits until the GPU has done all that it was given, and then the GPU waits for the next step to reach it. With
`non_blocking=t.is_cuda` the same bytes arrive in the same order and nobody waits: memory that is not pinned is read
before the call returns. Only copies to a tensor's own device are changed, of values that PyTorch's factories make on
the CPU, in functions that the model's forward calls. On devices other than CUDA the copy is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from chipmunk.registry import Example
from chipmunk.rewrite.context import Context
from chipmunk.rewrite.flow import Step
from chipmunk.rewrite.minimal import MODEL, variant
from chipmunk.rewrite.repository import External, Function
from chipmunk.rewrite.syntax import dotted, is_call

NAME = "constant-copies"
API = 1
VERSION = "1"

_FACTORIES = frozenset(
    f"torch.{name}" for name in ("arange", "linspace", "logspace", "tensor", "ones", "zeros", "full")
)


def rule(context: Context) -> None:
    seen: set[int] = set()
    for model in context.models:
        for function in _called(context, model.forward):
            if id(function.node) in seen:
                continue
            seen.add(id(function.node))
            for call, step in function.scope.calls:
                _look_at(context, function, call, step)


def _called(context: Context, forward: Function) -> Iterator[Function]:
    """The functions of the repository that the model's forward calls by their names."""
    for call, step in forward.scope.calls:
        meaning = context.repository.resolve(call.func, forward, step)
        if isinstance(meaning, Function) and meaning.owner is None:
            yield meaning


def _look_at(context: Context, function: Function, call: cst.Call, step: Step) -> None:
    tensor = _target(call)
    if tensor is None or not isinstance(call.func, cst.Attribute):
        return
    if not any(
        _is_made_on_cpu(context, function, made, at) for made, at in function.scope.calls_behind(call.func.value, step)
    ):
        return
    options = {argument.keyword.value: argument.value for argument in call.args if argument.keyword is not None}
    wanted = f"{tensor}.is_cuda"
    if "non_blocking" not in options:
        context.append_argument(function.source, call, f"non_blocking={wanted}")
        reason = "made on the CPU at each step; the copy waited for the GPU"
        context.patched(function.source, call, reason, matched=function.name)
    elif dotted(options["non_blocking"]) == wanted:
        context.already(function.source, call, "the copy does not wait", matched=function.name)


def _target(call: cst.Call) -> str | None:
    """`t` of `….to(t.device)`, if that is all it says but for `non_blocking`."""
    if not is_call(call, "to"):
        return None
    devices = [a for a in call.args if a.keyword is None or a.keyword.value == "device"]
    others = [a for a in call.args if a not in devices and (a.keyword is None or a.keyword.value != "non_blocking")]
    if len(devices) != 1 or others or devices[0].star or not isinstance(devices[0].value, cst.Attribute):
        return None
    device = devices[0].value
    return dotted(device.value) if device.attr.value == "device" else None


def _is_made_on_cpu(context: Context, function: Function, made: cst.Call, step: Step) -> bool:
    meaning = context.repository.resolve(made.func, function, step)
    if not isinstance(meaning, External) or meaning.name not in _FACTORIES:
        return False
    return all(argument.keyword is None or argument.keyword.value != "device" for argument in made.args)


_HELPER = """\


def embed(time, dim):
    frequencies = torch.exp(-torch.arange(dim // 2, dtype=torch.float32)).to(time.device)
    angles = time[:, None].float() * frequencies[None]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)
"""
_EMBEDDED = variant(MODEL, ("image) + time[:, None, None]", "image) + embed(time, 32)[:, None]")) + _HELPER
_FREQUENCIES = "    frequencies = torch.exp(-torch.arange(dim // 2, dtype=torch.float32)).to(time.device)\n"
_NAMED = variant(
    _EMBEDDED,
    (
        _FREQUENCIES,
        "    steps = torch.arange(dim // 2, dtype=torch.float32)\n"
        "    frequencies = torch.exp(-steps).to(device=time.device)\n",
    ),
)

EXAMPLES = (
    Example(
        "frequencies made on the tensor's own device",
        "flow/model.py",
        variant(_EMBEDDED, ("torch.float32)).to(time.device)", "torch.float32, device=time.device)).to(time.device)")),
        None,
    ),
    Example(
        "a copy of what the function was given",
        "flow/model.py",
        variant(_EMBEDDED, (_FREQUENCIES, "    frequencies = dim.to(time.device)\n")),
        None,
    ),
    Example(
        "a copy that says more than where to",
        "flow/model.py",
        variant(_EMBEDDED, (".to(time.device)", ".to(time.device, time.dtype)")),
        None,
    ),
    Example(
        "a copy that waits, as somebody wrote",
        "flow/model.py",
        variant(_EMBEDDED, (".to(time.device)", ".to(time.device, non_blocking=False)")),
        None,
    ),
    Example("a function that the forward does not call", "flow/model.py", MODEL + _HELPER, None),
    Example(
        "frequencies of the timestep's embedding",
        "flow/model.py",
        _EMBEDDED,
        variant(_EMBEDDED, (".to(time.device)", ".to(time.device, non_blocking=time.is_cuda)")),
    ),
    Example(
        "the same, with a name in between",
        "flow/model.py",
        _NAMED,
        variant(_NAMED, ("(device=time.device)", "(device=time.device, non_blocking=time.is_cuda)")),
    ),
)
