"""Where a model hands a block by name to what does the block's work: `run(…, block=block, image=image, …)`."""

from __future__ import annotations

import libcst as cst

from chipmunk.rewrite.passes import Pass
from chipmunk.rewrite.repository import Class, Function, Repository
from chipmunk.rewrite.syntax import bind, dotted, elements, last_name, parameters

_PLAIN = ("staticmethod", "no_grad", "inference_mode", "compile")


def work_of(
    repository: Repository, owner: Class, method: Function, found: Pass, roles: dict[str, str]
) -> tuple[Function, dict[str, str], str] | None:
    """What does the work of a block of class `owner`, its parameters with the streams, and its name for the block.

    `roles`: the model's variables with the streams. None if it is not understood.
    """
    function = repository.resolve(found.call.func, method, found.step)
    if not isinstance(function, Function) or any(arg.star for arg in found.call.args):
        return None
    decorators = [
        d.decorator.func if isinstance(d.decorator, cst.Call) else d.decorator for d in function.node.decorators
    ]
    if not {last_name(decorator) for decorator in decorators} <= set(_PLAIN):
        return None
    given = bind(function.outline, found.call, skip=function.receivers)
    order = [p.name.value for p in parameters(function.node)]
    taken = {name: roles[n] for name in order if (n := dotted(given.get(name)) or "") in roles}
    element = _element(found.loop)
    names = [name for name, value in given.items() if element is not None and dotted(value) == element]
    if set(taken.values()) != set(roles.values()) or len(names) != 1 or names[0] in function.scope.bindings:
        return None
    called = [
        (call, first)
        for call, step in function.scope.calls
        for first, callee in enumerate([call.func, *(arg.value for arg in call.args[:1] if arg.keyword is None)])
        if dotted(callee) in (names[0], f"{names[0]}.forward") and _streams(call) >= taken.keys()
        # what is given the block first is checkpointing, unless it is the repository's own
        if not (first and isinstance(repository.resolve(call.func, function, step), Function))
    ]
    if not called:
        return function, taken, names[0]
    # It leaves the work to the block after all.
    forward = repository.method(owner, "forward")
    if len(called) != 1 or forward is None:
        return None
    values = bind(forward.outline, called[0][0], skip=1, first=called[0][1])
    inner = {name: taken[n] for name, value in values.items() if (n := dotted(value) or "") in taken}
    return (forward, inner, forward.scope.receiver) if set(inner.values()) == set(taken.values()) else None


def _streams(call: cst.Call) -> set[str]:
    return {dotted(arg.value) or "" for arg in call.args}


def _element(loop: cst.For) -> str | None:
    """The variable with the list's element: `block` of `for i, block in enumerate(self.blocks)`."""
    target: cst.BaseExpression = loop.target
    iterable = loop.iter
    while isinstance(iterable, cst.Call) and iterable.args:
        parts, name = elements(target), last_name(iterable.func)
        if parts is not None and name in ("enumerate", "zip"):
            target = parts[1 if name == "enumerate" and len(parts) > 1 else 0]
        iterable = iterable.args[0].value
    return dotted(target)
