"""The order of image tokens in one call of the model: whether it may be changed, and the way there and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from chipmunk.runtime.token_order import TokenOrder, find_order

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

AGAIN = object()
"""Instead of a result: the call has to be made again, because something was found out."""

_NO_READERS = ("torch.", "accelerate.", "diffusers.", "deepspeed.", "chipmunk.")
"""Packages whose hooks bring weights into place, or watch without keeping tokens."""


def order_of(session: Session, bound: inspect.BoundArguments) -> TokenOrder | None:
    """The order of the image tokens in this slot, for all its steps."""
    spec, patchify = session.spec, session.config.patchify
    image: Tensor = bound.arguments[spec.image]
    ids = None if spec.ids is None else bound.arguments.get(spec.ids)
    order = None
    if not patchify.is_enabled:
        what = "kept: patchify is not enabled"
    elif session.keep_order is not None:
        what = f"kept: {session.keep_order}"
    elif not isinstance(ids, Tensor):
        what = "kept: no ids of the image tokens"
    elif ids.device.type == "meta":
        what = "kept: the ids are on the meta device"
    elif (reason := why_by_token(session, bound)) is not None:
        what = f"kept: {reason}"
    elif image.dim() != 3:
        what = "kept: the image is not tokens (B, L, C)"
    elif (reason := why_watched(session, bound.args[0])) is not None:
        what = f"kept: {reason}"
    else:
        order, what = find_order(ids, image.shape[1], patchify, image.device)
    session.recorder.token_order[what] += 1
    return order


def why_by_token(session: Session, bound: inspect.BoundArguments) -> str | None:
    """Why the image tokens of this call must keep their order: something else among the inputs goes by it."""
    spec = session.spec
    image: Tensor = bound.arguments[spec.image]
    if any(bound.arguments.get(name) is not None for name in spec.per_token):
        return " or ".join(spec.per_token) + " is given, and may belong to the image tokens one by one"
    own = session.own_features
    if image.dim() == 3 and any(not isinstance(x, Tensor) or x not in own for x in _moving(session, bound)):
        return "another input belongs to the image tokens one by one"
    return None


def why_watched(session: Session, model: nn.Module) -> str | None:
    """Why code that the model does not show may know where its tokens lie: a hook that reads them, say."""
    everywhere = (*all_modules._global_forward_hooks.values(), *all_modules._global_forward_pre_hooks.values())
    if any(map(_is_foreign, everywhere)):
        return "a hook of all modules may read its tokens"
    for name, module in model.named_modules():
        if module is not model and any(
            map(_is_foreign, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
        ):
            return f"a hook of {name} may read its tokens"
    return None if session.adopted is None else session.adopted.why_in_order(model)


def _is_foreign(hook: object) -> bool:
    """Whether a hook is none of torch's own (FSDP, profiling), of which none reads activations for their places."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = str(getattr(hook, "__module__", "") or "")
    return not home.startswith(_NO_READERS)


def note_own_features(session: Session, bound: inspect.BoundArguments) -> None:
    """After a call whose tokens were moved: what it left in dictionaries and lists is in its order, and may stay."""
    for entry in _moving(session, bound):
        if isinstance(entry, Tensor):
            session.own_features[entry] = True


def _moving(session: Session, bound: inspect.BoundArguments) -> Iterator[Any]:
    """Inputs other than image and ids, or entries of one, that have one row a token: residuals, a mask.

    A function among them may see the tokens, and know their places.
    """
    image, ids = session.spec.image, session.spec.ids
    given, model, tokens = dict(bound.arguments), bound.args[0], bound.arguments[image].shape[1]
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    for name, value in given.items():
        if name in (image, ids):
            continue
        for entry in _entries(value, 5):
            if _has_rows_for(entry, tokens) if isinstance(entry, Tensor) else callable(entry) and entry is not model:
                yield entry


def _entries(value: Any, depth: int) -> Iterator[Any]:
    """What a value holds in dictionaries, lists and tuples."""
    if isinstance(value, dict | list | tuple) and depth:
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _entries(entry, depth - 1)
    else:
        yield value


def _has_rows_for(x: Tensor, tokens: int) -> bool:
    """Whether x is (B, …, tokens, C), (B, tokens), or a mask that covers them. Chance hits cost the order, no more."""
    if x.dim() < 2 or tokens < 2:
        return False
    is_mask = x.shape[-1] >= tokens and (x.dtype == torch.bool or x.shape[-1] == x.shape[-2])
    return is_mask or tokens in (x.shape[1:] if x.dim() == 2 else x.shape[1:-1])


def _beside(result: Any, bound: inspect.BoundArguments) -> Iterator[Any]:
    """What is in a result, but for what the model was given: a cache of features, handed on."""
    given = [*bound.arguments.values()]
    given += [inner for value in given if isinstance(value, dict) for inner in value.values()]
    yield from _entries([part for part in result if not any(part is value for value in given)], 6)


def _may_hold_tokens(x: Any, tokens: int) -> bool:
    """Whether x is a tensor that may have an axis of image tokens, alone or with others; or no tensor, nor a number."""
    if isinstance(x, Tensor):
        return tokens in x.shape or max(x.shape[1:-1], default=0) > tokens
    return not isinstance(x, (int, float, str, type(None)))


def reordered(
    session: Session, order: TokenOrder | None, bound: inspect.BoundArguments, *, watched: bool
) -> inspect.BoundArguments:
    """The arguments with image tokens and ids in the slot's order.

    watched: where that is their own, with a copy of the image tokens that tells whether it is written to.
    """
    image, ids = session.spec.image, session.spec.ids
    if order is None and not watched:
        return bound
    changed = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    with torch.inference_mode(False), torch.no_grad():  # inference tensors would not tell that they are written to
        if order is None:
            changed.arguments[image] = bound.arguments[image].clone()
        else:
            changed.arguments[image] = order.apply(bound.arguments[image], session.config.implementation)
        if order is not None and ids is not None:
            changed.arguments[ids] = order.apply_to_ids(bound.arguments[ids])
    return changed


def versions_of(session: Session, bound: inspect.BoundArguments) -> list[int]:
    """How often image tokens and ids that are `reordered` have been written to."""
    given = [bound.arguments.get(name) for name in (session.spec.image, session.spec.ids) if name is not None]
    return [x._version for x in given if isinstance(x, Tensor) and not x.is_inference()]


def write_back(
    session: Session,
    order: TokenOrder | None,
    bound: inspect.BoundArguments,
    changed: inspect.BoundArguments,
    versions: list[int],
) -> bool:
    """Write to the caller's image tokens and ids what the model wrote in place to the copies that it was given.

    versions: of these, `changed`, before the call. Returns whether it wrote to the image tokens.
    """
    if changed is bound:
        return False
    image, ids = session.spec.image, session.spec.ids
    wrote = [before != now for before, now in zip(versions, versions_of(session, changed), strict=True)]
    if wrote[0]:
        copy = changed.arguments[image]
        bound.arguments[image].copy_(copy if order is None else order.undo(copy, session.config.implementation))
    if order is not None and ids is not None and wrote[1]:
        bound.arguments[ids].copy_(order.undo_ids(changed.arguments[ids]))
    return wrote[0]


def restored(session: Session, order: TokenOrder, result: Any, bound: inspect.BoundArguments) -> Any:
    """The model's result with its image tokens in their old order; `AGAIN` if they cannot be found in it."""
    first = result[0] if type(result) in (tuple, list) and result else result
    # Fewer rows than the image had: not known which ones they are.
    if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[1] < len(order.order):
        session.keep_order = "the model's output is not (B, tokens, …)"
        return AGAIN
    if first.requires_grad:
        session.keep_order = "the model turns autograd on itself"
        return AGAIN
    if first is not result and any(_may_hold_tokens(x, len(order.order)) for x in _beside(result[1:], bound)):
        session.keep_order = "what the model returns beside its image may have a row for each token"
        return AGAIN
    undone = order.undo(first, session.config.implementation)
    return undone if first is result else type(result)((undone, *result[1:]))
