"""One call of the model: which generation and slot it belongs to, whether it runs sparse, and how it is made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chipmunk.ops import record_fallbacks
from chipmunk.runtime.block_list import blocks_of
from chipmunk.runtime.call_order import (
    AGAIN,
    note_own_features,
    order_of,
    reordered,
    restored,
    versions_of,
    why_by_token,
    why_watched,
    write_back,
)
from chipmunk.runtime.clock import CallSlot, Generation, current_generation
from chipmunk.runtime.guards import why_dense_here
from chipmunk.runtime.installed_states import found_states_taken_away, states_installed, states_taken_away
from chipmunk.runtime.layer_plan import always_dense, caches_as_wanted, pass_over, plan, record, seed
from chipmunk.runtime.layer_state import AttentionRules, LayerState, MlpRules
from chipmunk.runtime.step_caching import ATTRIBUTE as STEP_ATTRIBUTE
from chipmunk.runtime.step_caching import StepCache, StepCall
from chipmunk.runtime.timestep_clock import shapes_of
from chipmunk.runtime.weights_seen import WeightsSeen

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session


def run_model_call(
    session: Session,
    name: str,
    forward: Callable[..., Any],
    signature: inspect.Signature,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(model, *args, **kwargs)` from the call slot `name`, sparse where it can be."""
    blocks = _blocks(session, model)
    if session.model() is not model:  # a DataParallel replica or a shallow copy: the session is another model's
        model.__dict__.pop(STEP_ATTRIBUTE, None)
        session.recorder.model_calls += 1
        session.recorder.dense_model_calls["a replica of the model"] += 1
        with found_states_taken_away(blocks):
            return forward(model, *args, **kwargs)
    with session.lock:
        session.recorder.model_calls += 1
        if session.installed or STEP_ATTRIBUTE in model.__dict__:
            session.recorder.dense_model_calls["the model calls itself"] += 1
            with states_taken_away(session, model):
                return forward(model, *args, **kwargs)
        try:
            bound = signature.bind(model, *args, **kwargs)
        except TypeError:
            return forward(model, *args, **kwargs)  # which raises the error that the user expects
        with _placed(session, name, bound) as (generation, place, reason):
            while True:
                if reason is None and generation is not None:
                    reason = _why_dense_in(session, generation, place)
                if reason is not None or generation is None:
                    session.recorder.dense_model_calls[str(reason)] += 1
                    with session.compiler.settings():
                        return forward(model, *args, **kwargs)
                result = _attempt(session, generation, place, forward, bound, blocks)
                if result is not AGAIN:
                    return result


@contextmanager
def _placed(
    session: Session, name: str, bound: inspect.BoundArguments
) -> Iterator[tuple[Generation | None, str, str | None]]:
    """The generation and slot of a call tagged `name`, or why it runs dense; open while the call runs."""
    generation, clock = current_generation(session), session.clock
    reason = _why_dense(session, bound.arguments)
    if generation is not None or clock is None or reason is not None:
        if clock is not None and torch.is_grad_enabled():
            clock.free()  # training needs the memory
        yield generation, name, reason or (None if generation is not None else "outside a sampling loop")
        return
    placed = clock.place(name, bound)
    try:
        yield (None, name, placed) if isinstance(placed, str) else (*placed, None)
    except BaseException:
        clock.failed()
        raise
    finally:
        clock.returned(name if isinstance(placed, str) else placed[1])


def _blocks(session: Session, model: nn.Module) -> list[nn.Module]:
    return [block for _, block in blocks_of(model, session.spec)]


def _why_dense(session: Session, arguments: dict[str, Any]) -> str | None:
    """Why the whole call runs dense, in whichever generation."""
    config = session.config
    if not config.attn.is_enabled and not config.mlp.is_enabled and not config.step_caching.is_enabled:
        return "neither attn nor mlp is enabled"
    return why_dense_here(arguments.get(session.spec.image))


def _why_dense_in(session: Session, generation: Generation, name: str) -> str | None:
    """Why the whole call runs dense in this generation and slot."""
    config = session.config
    if generation.dense_reason is not None:
        return generation.dense_reason
    if generation.at_most is not None and generation.at_most < config.min_steps:
        return f"the loop has fewer than {config.min_steps} steps (min_steps)"
    if name in generation.slots and generation.slots[name].last_step == generation.step:
        return "a second call from the same place in one step (see chipmunk.slot)"
    return None


def _attempt(
    session: Session,
    generation: Generation,
    name: str,
    forward: Callable[..., Any],
    bound: inspect.BoundArguments,
    blocks: Sequence[nn.Module],
) -> Any:
    """The call with states installed; `AGAIN` where it has to be made again, because something was found out."""
    image: Tensor = bound.arguments[session.spec.image]
    slot = _slot(session, generation, name, bound, blocks)
    skip = slot.steps is not None and slot.steps.skips(generation.step)
    step = None if slot.steps is None else StepCall(slot.steps, generation.step, skip)
    labels: list[tuple[str, str, bool]] = []
    if not skip:
        session.compiler.compile(blocks, image.device)
        labels = [plan(session, index, state) for index, state in enumerate(slot.layers)]
        seed(slot.layers, image.device)
    try:
        arguments = reordered(session, slot.order, bound, watched=step is not None)
        versions = versions_of(session, arguments)
        with (
            states_installed(session, blocks, slot, step),
            session.compiler.methods_in_place(blocks),
            session.compiler.settings(),
            record_fallbacks(session.recorder.fallbacks),
            caches_as_wanted(slot.layers, labels),
        ):
            result = forward(*arguments.args, **arguments.kwargs)
        if slot.order is not None:
            result = restored(session, slot.order, result, bound)
        if step is not None and step.problem is not None and result is not AGAIN:
            _give_up_step_caching(session, slot, step.problem)
            result = AGAIN if skip else result
    except BaseException as error:
        generation.drop_caches()
        result = AGAIN
        if _is_out_of_memory(error):
            generation.dense_reason = "the caches did not fit into memory"
            _warn(
                "the caches did not fit into memory; the rest of this image runs dense. A smaller batch or resolution, "
                "or `mlp.is_enabled: false`, needs less."
            )
        elif session.compiler.gives_up(error):
            why = " ".join(str(error).partition("\n\n")[0].split())
            _warn(f"torch.compile does not work here ({why}); blocks run uncompiled, as `compile: false` would ask.")
        else:
            raise
    if result is AGAIN:
        generation.drop_caches()
        if image.device.type == "cuda":
            torch.cuda.empty_cache()
        return AGAIN
    slot.last_step, slot.skipped = generation.step, skip
    slot.weights = WeightsSeen(blocks)  # after the call, in which offloading may write to them
    if write_back(session, slot.order, bound, arguments, versions) and step is not None:
        _give_up_step_caching(session, slot, "the model writes to the image tokens that it is given", "")
    if slot.order is not None:
        note_own_features(session, bound)
    if slot.steps is not None:
        session.recorder.step(generation, name, skip)
    if skip:
        for layer in slot.layers:
            if layer is not None:
                pass_over(session, layer)
        return result
    for index, (state, label) in enumerate(zip(slot.layers, labels, strict=True)):
        record(session, name, index, state, *label)
    if slot.steps is not None or any("full" in label for label in labels):
        session.recorder.peak_cache_bytes = max(session.recorder.peak_cache_bytes, session.cache_bytes())
    return result


def _slot(
    session: Session, generation: Generation, name: str, bound: inspect.BoundArguments, blocks: Sequence[nn.Module]
) -> CallSlot:
    """The call slot `name`, new if this is its first call, or if what it remembers does not fit this one."""
    signature = (len(blocks), *shapes_of(bound))
    inference = torch.is_inference_mode_enabled()
    slot = generation.slots.get(name)
    if slot is not None:
        changed = "shape, dtype or device of the inputs" if slot.inference == inference else "inference mode"
        if slot.signature == signature and slot.inference == inference:
            if not slot.weights.are_those_of(blocks):
                changed = "weights"
            elif slot.order is not None and why_by_token(session, bound) is not None:
                changed = "what belongs to the image tokens one by one"  # it would not be moved with them
            elif slot.order is not None and why_watched(session, bound.args[0]) is not None:
                changed = "what watches the model"  # it would see moved tokens
            else:
                return slot
        session.recorder.restarts[f"{changed} changed"] += 1
        slot.forget()
    attn, mlp = AttentionRules.of(session.config.attn), MlpRules.of(session.config.mlp)
    layers = [
        None
        if always_dense(session, index, "attention") and always_dense(session, index, "mlp")
        else LayerState(attn, mlp, session.config.implementation)
        for index in range(len(blocks))
    ]
    slot = generation.slots[name] = CallSlot(layers, signature, inference, WeightsSeen(blocks))
    if session.config.mlp.is_enabled and session.config.implementation != "reference":
        session.layout.prepare(blocks, bound.arguments[session.spec.image].device)
    if any(layers):
        slot.order = order_of(session, bound)
    if session.config.step_caching.is_enabled and session.recorder.no_step_caching is None:
        slot.steps = StepCache(session.config.step_caching, session.config.steps, generation.at_most)
    return slot


_WHY = (
    " `chipmunk patch` says why where it lists the sites of the patch step-caching; a repository patched by an older "
    "version is patched anew the same way."
)


def _give_up_step_caching(session: Session, slot: CallSlot, reason: str, more: str = _WHY) -> None:
    """Skip no more steps of this model, and say so."""
    session.recorder.no_step_caching, slot.steps = reason, None
    _warn(f"step_caching is enabled, but no steps are skipped: {reason}.{more}")


def _warn(message: str) -> None:
    warnings.warn(f"Chipmunk: {message}", RuntimeWarning, stacklevel=5)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
