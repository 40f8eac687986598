"""What the model did while a picture was drawn: kind, cost and time of each call, layer by layer.

Listens where the runtime notes what a layer did. Nothing is added to the blocks: compiled ones stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import chipmunk
from chipmunk.fidelity.block_calls import block_calls
from chipmunk.fidelity.flops import LayerCall, LayerShape, ModelCost
from chipmunk.runtime.control import statistics
from chipmunk.runtime.layer_state import DONE, LayerState
from chipmunk.runtime.session import ATTRIBUTE, Session


@dataclass
class Recording:
    """All calls of the model for one picture, in order."""

    calls: list[dict[int, LayerCall]] = field(default_factory=list)
    """By layer index; empty where no block ran."""
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Wall time from the first call to the end of the loop."""

    def step_seconds(self) -> list[float]:
        """Time of each model call on the device."""
        if self.marks and not isinstance(self.marks[0][0], float):
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in self.marks]
        return [end - start for start, end in self.marks]


@contextmanager
def recording(model: nn.Module, blocks: list[nn.Module], watched: bool = False) -> Iterator[Recording]:
    """Note each call of `model`.

    watched: note which blocks ran by listening at them, where it is another library that leaves them out.
    """
    found = Recording()
    cuda = next(model.parameters()).is_cuda
    ran: dict[int, LayerCall] = {}
    dense_calls = [0]

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def before(*_: object) -> None:
        ran.clear()
        found.marks.append((now(), None))

    def after(*_: object) -> None:
        found.marks[-1] = (found.marks[-1][0], now())
        counted = statistics(model)
        dense = sum(counted.dense_model_calls.values())
        if not watched and (not counted.enabled or dense != dense_calls[0]):
            # the whole call was dense: no layer was noted
            found.calls.append({index: LayerCall() for index in range(len(blocks))})
        else:
            found.calls.append(dict(ran))
        dense_calls[0] = dense

    def noted(index: int, state: LayerState | None) -> None:
        ran[index] = layer_call(state)

    dense_calls[0] = sum(statistics(model).dense_model_calls.values())
    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    start = time.perf_counter()
    try:
        with (
            _told(model, noted),
            block_calls(blocks if watched else [], lambda number: ran.update({number: LayerCall()})),
        ):
            yield found
    finally:
        if cuda:
            torch.cuda.synchronize()
        found.seconds = time.perf_counter() - start
        for handle in handles:
            handle.remove()


@contextmanager
def _told(model: nn.Module, watch: Callable[[int, LayerState | None], object]) -> Iterator[None]:
    """While this is open, `watch` is told of each layer after each call; of none where Chipmunk is off."""
    session: Session | None = model.__dict__.get(ATTRIBUTE) or None
    if session is None:
        yield
        return
    session.recorder.watch = watch
    try:
        yield
    finally:
        session.recorder.watch = None


def layer_call(state: LayerState | None) -> LayerCall:
    """What a layer did in the call that has just ended."""
    if state is None:
        return LayerCall()
    attention, mlp, keys, neurons, means = "dense", "dense", 0, 0, 0
    if state.attention_done == DONE:
        attention = state.attention
        keys = 0 if state.keys is None else state.keys.shape[-1]
    if state.mlp_done == DONE:
        mlp = state.mlp
        neurons = 0 if state.neurons is None else state.neurons.shape[-1]
        means = 0 if state.means is None else state.means.shape[1] * state.means.shape[2]
    return LayerCall(
        attention,
        keys if attention != "dense" else 0,
        attention == "full" and state.select_keys,
        mlp,
        neurons if mlp == "sparse" else 0,
        mlp == "sparse" and state.select_neurons,
        means if mlp != "dense" else 0,
    )


SHOW = {
    "compile": False,
    "min_steps": 0,
    "patchify": {"is_enabled": False},
    "attn": {
        "first_n_dense_layers": 0,
        "full_step_schedule": [0],
        "top_keys": 0.02,
        "counts_multiple_of": 1,
        "mbm": 16,
    },
    "mlp": {"first_n_dense_layers": 0, "top_keys": 0.5, "counts_multiple_of": 1, "bm": 2, "mbm": 2},
}
"""A configuration with which the first step makes caches in every layer that can run sparse: they have its sizes."""


def measure_cost(model: nn.Module, blocks: list[nn.Module], draw: Callable[[], object]) -> ModelCost:
    """Count one dense call: `draw` makes a picture of one step with the patched `model`.

    The operations are PyTorch's own count; the sizes of what can run sparse are those of Chipmunk's caches.
    """
    shapes = [LayerShape() for _ in blocks]

    def noted(index: int, state: LayerState | None) -> None:
        if state is not None:
            shapes[index] = layer_shape(state)

    chipmunk.enable(model, SHOW)
    try:
        with _told(model, noted):
            draw()
    finally:
        chipmunk.disable(model)

    counts, counter = [0] * len(blocks), FlopCounterMode(display=False)

    def before(index: int) -> None:
        counts[index] -= counter.get_total_flops()

    def after(index: int) -> None:
        counts[index] += counter.get_total_flops()

    with block_calls(blocks, before, after), sdpa_kernel(SDPBackend.MATH), counter:
        draw()  # the math backend's products are counted on every device
    return ModelCost(tuple(shapes), tuple(counts), counter.get_total_flops() - sum(counts))


def layer_shape(state: LayerState) -> LayerShape:
    """Sizes of a layer whose caches were made in full."""
    sizes: dict[str, int] = {}
    if state.attention_done == DONE and state.difference is not None:
        batch, heads, tokens, width = state.difference.shape
        sizes |= {"batch": batch, "tokens": tokens, "width": heads * width}
    if state.mlp_done == DONE and state.activations is not None and state.output is not None:
        assert state.means is not None
        batch, rows, neurons = state.activations.shape
        per_neuron = state.means.shape[-1] // neurons
        sizes |= {"batch": batch, "rows": rows, "neurons": neurons, "channels": state.output.shape[2]}
        sizes["rows_per_neuron"] = per_neuron
    return LayerShape(**sizes)
