"""The functions that run inside a block: its forward, methods, helpers, and the objects that it leaves its work to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst

from chipmunk.rewrite.flow import Scope, Step, value_names
from chipmunk.rewrite.objects import held_by
from chipmunk.rewrite.repository import Class, Function, Repository
from chipmunk.rewrite.roles import Block
from chipmunk.rewrite.syntax import bind, dotted, elements, self_attribute

_DEPTH = 4


@dataclass(frozen=True)
class Reached:
    """A function that a block's forward runs."""

    function: Function
    block: Block
    block_name: str | None
    """The block's name in it, `self` in its own methods; None where it is out of reach."""
    module_name: str | None
    """The name of a module right below the block."""
    module: str
    """That module's attribute in the block."""
    streams: dict[str, str]
    """Parameters that hold a stream of the block's, as they are: name → `image`, `text` or `joint`."""
    caller: tuple[Reached, cst.Call, Step] | None = None

    @property
    def layer(self) -> str | None:
        """What the runtime finds the layer by."""
        return self.block_name or self.module_name

    def attribute(self, repository: Repository, node: cst.CSTNode | None) -> Attribute | None:
        """`self.linear1` or `attn.linear1` as an attribute of the block, or of the module right below it."""
        if self.block_name is not None and (name := self_attribute(node, self.block_name)) is not None:
            return Attribute(self.block.owner, name, name)
        if self.module_name is not None and (name := self_attribute(node, self.module_name)) is not None:
            for owner in repository.classes_in(self.block.owner, self.module):
                if repository.assigned(owner, name):
                    return Attribute(owner, name, f"{self.module}.{name}")
        return None

    def streams_of(self, call: cst.Call) -> set[str]:
        """The streams of the block's results that the call's result becomes part of; empty if it is not known."""
        feeds = self._feeds()
        if feeds is not None:
            return {stream for stream, calls in feeds.items() if call in calls}
        scope = self.function.scope
        returned = [s for s in scope.steps if isinstance(s.node, cst.Return) and s.node.value is not None]
        for step in returned:
            assert isinstance(step.node, cst.Return)
            if step.node.value is not None and any(c is call for c, _ in scope.calls_behind(step.node.value, step)):
                return set() if self.caller is None else self.caller[0].streams_of(self.caller[1])
        return set()

    def _feeds(self) -> dict[str, set[cst.Call]] | None:
        """The calls that each returned stream is computed by; None if the function does not return the streams."""
        scope = self.function.scope
        wanted = set(self.block.streams.values())
        if set(self.streams.values()) != wanted:
            return None
        found: dict[str, set[cst.Call]] = {stream: set() for stream in wanted}
        order, names = list(self.streams.values()), {stream: name for name, stream in self.streams.items()}
        for step in scope.steps:
            if not isinstance(step.node, cst.Return) or step.node.value is None:
                continue
            value, at = _named_tuple(scope, step.node.value, step)
            parts = elements(value) or [value]
            if len(parts) < len(wanted):
                continue
            for place, part in enumerate(parts[: len(wanted)]):
                # A result in the variable of a stream is that stream; else the order of the parameters decides.
                stream = next((s for s, name in names.items() if name in set(value_names(part))), order[place])
                found[stream].update(call for call, _ in scope.calls_behind(part, at))
        return found if any(found.values()) else None


def _named_tuple(scope: Scope, value: cst.BaseExpression, step: Step) -> tuple[cst.BaseExpression, Step]:
    """The tuple that a name stands for, and where it is made: `result = img, txt`, then `return result`."""
    known = scope.reaching(value.value, step) if isinstance(value, cst.Name) else []
    if len(known) == 1 and scope.is_definite(known, step) and not known[0].path and known[0].value is not None:
        made = known[0].value
        return (made, known[0].step) if elements(made) is not None else (value, step)
    return value, step


@dataclass(frozen=True)
class Attribute:
    """An attribute of the block, or of a module right below it."""

    owner: Class
    name: str
    path: str
    """From the block: `linear1`, `attn.to_out`."""


def reached_from(repository: Repository, block: Block) -> list[Reached]:
    """The block's forward and the functions below it that have a name for the block, or a module right below it."""
    start = Reached(block.forward, block, block.receiver, None, "", dict(block.streams))
    found: dict[tuple[int, str | None, str | None], Reached] = {}
    _follow(repository, start, found, 0)
    return list(found.values())


def _follow(
    repository: Repository, here: Reached, found: dict[tuple[int, str | None, str | None], Reached], depth: int
) -> None:
    key = (id(here.function), here.block_name, here.module_name)
    if key in found or depth > _DEPTH:
        return
    found[key] = here
    for call, step in here.function.scope.calls:
        for function, own, module, first in _run_by(repository, here, call, step):
            given = bind(function.outline, call, skip=function.receivers, first=first)
            names = {dotted(value): name for name, value in given.items()}
            receiver = function.receiver if function.receivers else None
            block_name = names.get(here.block_name) if here.block_name is not None else None
            module_name = names.get(here.module_name) if here.module_name is not None else None
            if own == "block":
                block_name = receiver
            elif own == "module":
                module_name = receiver
            if block_name is None and module_name is None:
                continue
            streams = {names[name]: stream for name, stream in here.streams.items() if name in names}
            reached = Reached(function, here.block, block_name, module_name, module, streams, (here, call, step))
            _follow(repository, reached, found, depth + 1)


def _run_by(
    repository: Repository, here: Reached, call: cst.Call, step: Step
) -> Iterator[tuple[Function, str, str, int]]:
    """The functions that a call runs.

    Each with what its receiver is (`block`, `module`, or neither), the attribute of the module that it works on, and
    how many leading arguments are not its own.
    """
    callees = [(call.func, 0)]
    if call.args and call.args[0].keyword is None and not call.args[0].star:
        callees.append((call.args[0].value, 1))  # checkpoint(self.mix, …)
    for callee, first in callees:
        method = self_attribute(callee, here.block_name) if here.block_name is not None else None
        if method is not None and (inner := repository.method(here.block.owner, method)) is not None:
            yield inner, "block", here.module, first
            continue
        meaning = repository.resolve(callee, here.function, step)
        if isinstance(meaning, Function):
            own = here.module_name is not None and dotted(callee) == f"{here.module_name}.{meaning.outline.name}"
            yield meaning, "module" if own else "", here.module, first
            continue
        if meaning is not None or not isinstance(callee, cst.Attribute):
            continue
        for name, owner in ((here.block_name, here.block.owner), (here.module_name, here.function.owner)):
            if name is None or owner is None:
                continue
            attribute, run = self_attribute(callee, name), None
            if attribute is None:
                attribute, run = self_attribute(callee.value, name), callee.attr.value
            if attribute is None:
                continue
            below = name == here.block_name
            for inner in held_by(repository, owner, attribute, run, here.block.owner.module).methods:
                yield inner, "module" if below else "", attribute if below else here.module, first
