"""One call of the model: which generation and slot it belongs to, what each layer is to do, and what came of it."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chipmunk.ops import dense_results_only, record_fallbacks
from chipmunk.runtime.block_list import blocks_of, holders
from chipmunk.runtime.call_order import (
    AGAIN,
    note_own_features,
    order_of,
    reordered,
    restored,
    versions_of,
    why_by_token,
    write_back,
)
from chipmunk.runtime.clock import CallSlot, Generation, current_generation
from chipmunk.runtime.guards import why_dense_here
from chipmunk.runtime.layer_state import ATTRIBUTE, DONE, AttentionRules, LayerState, MlpRules
from chipmunk.runtime.schedule import attention_is_full, attention_step, mlp_is_full, mlp_step, neurons_are_due
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
        with _found_states_taken_away(blocks):
            return forward(model, *args, **kwargs)
    with session.lock:
        session.recorder.model_calls += 1
        if session.installed or STEP_ATTRIBUTE in model.__dict__:
            session.recorder.dense_model_calls["the model calls itself"] += 1
            with _states_taken_away(session, model):
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
        labels = [_plan(session, index, state) for index, state in enumerate(slot.layers)]
        _seed(slot.layers, image.device)
    try:
        arguments = reordered(session, slot.order, bound, watched=step is not None)
        versions = versions_of(session, arguments)
        with (
            _states_installed(session, blocks, slot, step),
            session.compiler.methods_in_place(blocks),
            session.compiler.settings(),
            record_fallbacks(session.recorder.fallbacks),
            _caches_as_wanted(slot.layers, labels),
        ):
            result = forward(*arguments.args, **arguments.kwargs)
        if slot.order is not None:
            result = restored(session, slot.order, result)
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
                _pass_over(session, layer)
        return result
    for index, (state, label) in enumerate(zip(slot.layers, labels, strict=True)):
        _record(session, name, index, state, *label)
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
            elif slot.order is None or why_by_token(session, bound) is None:
                return slot
            else:
                changed = "what belongs to the image tokens one by one"  # it would not be moved with them
        session.recorder.restarts[f"{changed} changed"] += 1
        slot.forget()
    attn, mlp = AttentionRules.of(session.config.attn), MlpRules.of(session.config.mlp)
    layers = [
        None
        if _always_dense(session, index, "attention") and _always_dense(session, index, "mlp")
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


def _always_dense(session: Session, index: int, part: str) -> str | None:
    """Why a part of a layer never runs sparse."""
    section = session.config.attn if part == "attention" else session.config.mlp
    if not section.is_enabled:
        return "not enabled"
    if index < section.first_n_dense_layers:
        return f"one of the first {section.first_n_dense_layers} layers"
    if section.full_step_every == 1 and (part == "mlp" or session.config.attn.full_step_schedule is None):
        return "every step is full"
    return None


def _plan(session: Session, index: int, state: LayerState | None) -> tuple[str, str, bool]:
    """Write this call's kinds into a layer's state.

    Returns what the statistics call attention and MLP if all goes to plan, and whether to drop attention's caches.
    """
    config = session.config
    attention, mlp = _always_dense(session, index, "attention"), _always_dense(session, index, "mlp")
    discard = False
    if state is None:
        return attention or "", mlp or "", False
    state.attention_done = state.mlp_done = None
    state.single_mlp = state.attention = state.mlp = "dense"
    state.select_keys = state.select_neurons = False
    if attention is None:
        kind, select = attention_step(
            config.attn, state.attention_count, state.keys is not None, state.attention_overdue
        )
        attention = "sparse" if kind == "sparse" else "full"
        if kind == "dense" and session.compiler.has_compiled and config.attn.recompute_mask:
            # A dense graph for this one step would cost more to compile than its selection costs to compute.
            kind, select, discard = "full", True, True
        state.attention, state.select_keys = kind, select
    if mlp is None:
        state.mlp, state.select_neurons = mlp_step(
            config.mlp, state.mlp_count, state.neurons_are_fresh, state.mlp_overdue
        )
        mlp = "sparse" if state.mlp == "sparse" else "full"
    return attention, mlp, discard


def _caches_as_wanted(
    layers: Sequence[LayerState | None], labels: Sequence[tuple[str, str, bool]]
) -> AbstractContextManager[None]:
    """Spares the making of attention's caches where every layer that would make them is to drop them."""
    making = [
        discard
        for state, (_, _, discard) in zip(layers, labels, strict=False)
        if state is not None and state.attention == "full"
    ]
    return dense_results_only() if making and all(making) else nullcontext()


def _seed(layers: Sequence[LayerState | None], device: torch.device) -> None:
    """Give each layer the seeds of its selections: count and layer as tensors, so that no graph depends on them."""
    counts = [
        (count, index, 0, 0)  # padded to 32 bytes: a kernel's pointer to a row is aligned
        for index, state in enumerate(layers)
        if state is not None
        for count in (state.attention_count, state.mlp_count)
    ]
    if not any(state is not None and (state.select_keys or state.select_neurons) for state in layers):
        return
    rows = iter(torch.tensor(counts, dtype=torch.int64, device="cpu").to(device, non_blocking=True)[:, :3])
    for state in layers:
        if state is not None:
            state.attention_seed, state.mlp_seed = next(rows), next(rows)


def _record(
    session: Session, slot: str, index: int, state: LayerState | None, attention: str, mlp: str, discard: bool
) -> None:
    """Count what a layer did, and start over what did not go to plan."""
    count, watch = session.recorder.count, session.recorder.watch
    if watch is not None:
        watch(index, state)
    if state is None:
        count(index, "attention", slot, attention)
        count(index, "mlp", slot, mlp)
        return
    if state.attention_done == DONE:
        state.attention_count += 1
        state.attention_overdue = False
        count(index, "attention", slot, attention)
        if discard:
            state.keys = state.difference = None
    elif state.attention_done is not None:
        state.forget_attention()
        count(index, "attention", slot, state.attention_done)
    if state.mlp_done == DONE:
        state.mlp_count += 1
        state.mlp_overdue = False
        state.neurons_are_fresh = state.mlp == "sparse" and (state.neurons_are_fresh or state.select_neurons)
        count(index, "mlp", slot, mlp)
    elif state.mlp_done is not None:
        state.forget_mlp()
        count(index, "mlp", slot, state.mlp_done)


def _pass_over(session: Session, state: LayerState) -> None:
    """Count a call on which no block ran, for the layers that ran before; a full step that it was is made up for."""
    attn, mlp = session.config.attn, session.config.mlp
    if state.attention_count > 0:
        state.attention_overdue |= attention_is_full(attn, state.attention_count)
        state.attention_count += 1
    if state.mlp_count > 0:
        state.mlp_overdue |= mlp_is_full(mlp, state.mlp_count)
        state.neurons_are_fresh &= not neurons_are_due(mlp, state.mlp_count)
        state.mlp_count += 1


_WHY = (
    " `chipmunk patch` says why where it lists the sites of the patch step-caching; a repository patched by an older "
    "version is patched anew the same way."
)


def _give_up_step_caching(session: Session, slot: CallSlot, reason: str, more: str = _WHY) -> None:
    """Skip no more steps of this model, and say so."""
    session.recorder.no_step_caching, slot.steps = reason, None
    _warn(f"step_caching is enabled, but no steps are skipped: {reason}.{more}")


@contextmanager
def _states_installed(
    session: Session, blocks: Sequence[nn.Module], slot: CallSlot, step: StepCall | None
) -> Iterator[None]:
    """While this is open, each block finds the state of its layer, and the model that of its steps."""
    model = session.model()
    assert model is not None
    if step is not None:
        model.__dict__[STEP_ATTRIBUTE] = step
    try:
        with _installing:
            is_free = all(block.__dict__.get(ATTRIBUTE) is None for block in blocks)
            for module, state in holders(blocks, slot.layers) if is_free else ():
                state.thread = threading.get_ident()
                module.__dict__[ATTRIBUTE] = state
                session.installed.append(module)
        if not is_free and (step is None or not step.skip):
            session.recorder.dense_model_calls["another model's call runs these blocks"] += 1
        with nullcontext() if is_free else _found_states_taken_away(blocks):
            yield
    finally:
        for block in session.installed:
            block.__dict__.pop(ATTRIBUTE, None)
        session.installed.clear()
        model.__dict__.pop(STEP_ATTRIBUTE, None)


_installing = threading.Lock()
"""Models in several threads may share blocks: the one whose call comes first runs sparse."""


@contextmanager
def _found_states_taken_away(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While this is open, the blocks run as if Chipmunk were off, whatever call of this thread they are part of.

    Another thread's states are left to it: `state_of` does not give them to this one.
    """
    modules = [module for block in blocks for module in (block, *block.children())]
    found = [(module, module.__dict__.get(ATTRIBUTE)) for module in modules]
    own = [(module, state) for module, state in found if state and state.thread == threading.get_ident()]
    for module, _ in own:
        module.__dict__.pop(ATTRIBUTE, None)
    try:
        yield
    finally:
        for module, state in own:
            module.__dict__[ATTRIBUTE] = state


@contextmanager
def _states_taken_away(session: Session, model: nn.Module) -> Iterator[None]:
    """While this is open, the blocks run as if Chipmunk were off."""
    step = model.__dict__.pop(STEP_ATTRIBUTE, None)
    states = [block.__dict__.pop(ATTRIBUTE, None) for block in session.installed]
    try:
        yield
    finally:
        for block, state in zip(session.installed, states, strict=True):
            block.__dict__[ATTRIBUTE] = state
        if step is not None:
            model.__dict__[STEP_ATTRIBUTE] = step


def _warn(message: str) -> None:
    warnings.warn(f"Chipmunk: {message}", RuntimeWarning, stacklevel=5)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
