"""What each layer is to do in one call of the model, and what came of it: kinds of step, seeds, counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from chipmunk.ops import dense_results_only
from chipmunk.runtime.layer_state import DONE, LayerState
from chipmunk.runtime.schedule import attention_is_full, attention_step, mlp_is_full, mlp_step, neurons_are_due

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session


def always_dense(session: Session, index: int, part: str) -> str | None:
    """Why a part of a layer never runs sparse."""
    section = session.config.attn if part == "attention" else session.config.mlp
    if not section.is_enabled:
        return "not enabled"
    if index < section.first_n_dense_layers:
        return f"one of the first {section.first_n_dense_layers} layers"
    if section.full_step_every == 1 and (part == "mlp" or session.config.attn.full_step_schedule is None):
        return "every step is full"
    return None


def plan(session: Session, index: int, state: LayerState | None) -> tuple[str, str, bool]:
    """Write this call's kinds into a layer's state.

    Returns what the statistics call attention and MLP if all goes to plan, and whether to drop attention's caches.
    """
    config = session.config
    attention, mlp = always_dense(session, index, "attention"), always_dense(session, index, "mlp")
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


def caches_as_wanted(
    layers: Sequence[LayerState | None], labels: Sequence[tuple[str, str, bool]]
) -> AbstractContextManager[None]:
    """Spares the making of attention's caches where every layer that would make them is to drop them."""
    making = [
        discard
        for state, (_, _, discard) in zip(layers, labels, strict=False)
        if state is not None and state.attention == "full"
    ]
    return dense_results_only() if making and all(making) else nullcontext()


def seed(layers: Sequence[LayerState | None], device: torch.device) -> None:
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


def record(
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


def pass_over(session: Session, state: LayerState) -> None:
    """Count a call on which no block ran, for the layers that ran before; a full step that it was is made up for."""
    attn, mlp = session.config.attn, session.config.mlp
    if state.attention_count > 0:
        state.attention_overdue |= attention_is_full(attn, state.attention_count)
        state.attention_count += 1
    if state.mlp_count > 0:
        state.mlp_overdue |= mlp_is_full(mlp, state.mlp_count)
        state.neurons_are_fresh &= not neurons_are_due(mlp, state.mlp_count)
        state.mlp_count += 1
