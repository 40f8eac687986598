"""Whether image tokens may be put into another order, and steps be skipped: all that speaks against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import libcst as cst

from chipmunk.rewrite.image_tokens import ids_parameter, other_spatial
from chipmunk.rewrite.passes import BY_NAME, CONCATENATIONS, Pass, Streams
from chipmunk.rewrite.places import Entry, is_made, is_number, read
from chipmunk.rewrite.repository import Function, Repository
from chipmunk.rewrite.syntax import bind, dotted, elements, is_call, walk

if TYPE_CHECKING:
    from chipmunk.rewrite.roles import Block


@dataclass(frozen=True)
class Order:
    """What is known of the order of a model's image tokens."""

    ids: str | None
    """The parameter with their positions; None where they keep their order."""
    off: str
    """Why they do; empty where they need not."""
    per_token: tuple[str, ...]
    """Optional parameters that are added to the image stream: where one is given, tokens keep their order."""
    kept: str
    """What the blocks keep for later calls, in words; empty if nothing is known."""


def order_of(
    repository: Repository,
    method: Function,
    image: str,
    others: set[str],
    blocks: list[Block],
    found: tuple[Pass, Pass],
    streams: Streams,
) -> Order:
    """`method`: the model's forward, in which `found` are the two loops; `others`: what is mixed into the image."""
    double, single = found
    place = streams.place if streams.place is not None else _place_inside(blocks[1])
    outside = {name for name in (streams.image, streams.text) if name}
    ids, why = ids_parameter(method.scope, found, place, outside)
    per_token: tuple[str, ...] = ()
    if ids is not None:
        taken_in = {dotted(arg.value) or "" for arg in single.call.args} & streams.inside.keys()
        mixed = {streams.image, *taken_in, *single.results[:1]} - {streams.text}
        why, per_token = other_spatial(method, double, single, streams.image, mixed, others)
        if {image, ids} & set(per_token):
            why = "token order is off: something computed from the image itself is added to its stream"
        chosen = next((told for block in blocks if (told := _chosen_by(block)) is not None), None)
        if chosen is not None:
            why = f"token order is off: which tokens the blocks work on is told by {chosen}"
        other = next((block.forward.name for block in blocks if block.is_handed), None)
        if other is not None and not why:
            why = f"token order is off: {other}, which does the blocks' work, may know where tokens lie"
    placed, kept = _by_place(repository, method, image, blocks, found)
    if placed and not why:
        why = f"token order is off: {placed}"
    return Order(None if why else ids, why, () if why else per_token, kept)


def _by_place(
    repository: Repository, method: Function, image: str, blocks: list[Block], found: tuple[Pass, Pass]
) -> tuple[str, str]:
    """What treats image tokens by where they lie, in the model's forward and in its blocks; what these keep."""
    own = () if method.owner is None else ((method.scope.receiver, method.owner),)
    whole = Entry(method, frozenset({image}), own)
    entries: list[Entry] = []
    for block, each in zip(blocks, found, strict=True):
        by_name, forward = each.first == BY_NAME, block.forward.outline
        given = {} if by_name else bind(forward, each.call, skip=1, first=max(each.first, 0))
        made = frozenset(name for name, value in given.items() if is_made(repository, whole, value, each.step))
        others = frozenset(method.scope.parameters) - {image, method.scope.receiver}
        numbers = frozenset(
            name
            for name, value in given.items()
            if name not in block.streams and is_number(whole, value, each.step, others)
        )
        objects = ((block.receiver, block.owner),)
        entries.append(Entry(block.forward, frozenset(block.streams), objects, made, numbers))
    return read(repository, whole, entries, blocks[0].owner.module)


def _place_inside(block: Block) -> int | None:
    """Which of the two streams that the block concatenates is the image: 0 the first, 1 the second."""
    scope = block.forward.scope
    for call, step in scope.calls:
        parts = elements(call.args[0].value) if is_call(call, *CONCATENATIONS) and call.args else None
        if parts is None or len(parts) != 2:
            continue
        found = [{block.streams[root] for root in scope.roots(part, step) & block.streams.keys()} for part in parts]
        if {"image"} in found and {"text"} in found:
            return found.index({"image"})
    return None


def _chosen_by(block: Block) -> str | None:
    """The parameter of a block, no stream, that says where tokens lie: `keys[:, :, info["places"]] = image_keys`."""
    scope = block.forward.scope
    others = set(scope.parameters) - block.streams.keys() - {block.receiver, scope.receiver}
    for step in scope.steps:
        for expression in step.expressions:
            for node in walk(expression):
                if not isinstance(node, cst.Subscript) or len(node.slice) < 2:
                    continue
                for part in node.slice[1:]:
                    if isinstance(part.slice, cst.Index) and (found := scope.roots(part.slice.value, step) & others):
                        return min(found)
    return None
