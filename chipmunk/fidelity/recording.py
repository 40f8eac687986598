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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import chipmunk
from chipmunk.fidelity.flops import LayerCall, LayerShape, ModelCost
from chipmunk.runtime import model_call
from chipmunk.runtime.layer_state import DONE, LayerState
from chipmunk.runtime.session import statistics


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
def recording(model: nn.Module, layers: int) -> Iterator[Recording]:
    """Note each call of `model`, which has so many `layers`."""
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
        if not counted.enabled or dense != dense_calls[0]:  # the whole call was dense: no layer was noted
            found.calls.append({index: LayerCall() for index in range(layers)})
        else:
            found.calls.append(dict(ran))
        dense_calls[0] = dense

    original = model_call._record

    def noted(
        session: Any, slot: str, index: int, state: LayerState | None, attention: str, mlp: str, discard: bool
    ) -> None:
        ran[index] = layer_call(state)
        original(session, slot, index, state, attention, mlp, discard)

    dense_calls[0] = sum(statistics(model).dense_model_calls.values())
    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    model_call._record = noted
    start = time.perf_counter()
    try:
        yield found
    finally:
        if cuda:
            torch.cuda.synchronize()
        found.seconds = time.perf_counter() - start
        model_call._record = original
        for handle in handles:
            handle.remove()


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


def measure_cost(model: nn.Module, blocks: list[nn.Module], call: Callable[[], object]) -> ModelCost:
    """Count one dense call: `call` draws something of one step with `model`, patched and switched off.

    The operations are PyTorch's own count; the sizes are those that the patched code hands to Chipmunk.
    """
    shapes = [LayerShape() for _ in blocks]
    counts = [0] * len(blocks)
    inside: list[int] = []

    def change(**sizes: int) -> None:
        if inside:
            old = shapes[inside[-1]]
            shapes[inside[-1]] = LayerShape(**{**vars(old), **sizes})

    def attention(layer: Any, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        query: Tensor = args[0] if args else kwargs["query"]
        if query.dim() == 4:
            change(batch=query.shape[0], tokens=query.shape[2], width=query.shape[1] * query.shape[3])
        result: Tensor = originals["attention"](layer, function, *args, **kwargs)
        return result

    def mlp(block: nn.Module, module: Any, x: Tensor) -> Tensor:
        change(batch=x.shape[0], rows=x.shape[1], channels=x.shape[2], neurons=module[0].weight.shape[0])
        result: Tensor = originals["mlp"](block, module, x)
        return result

    def split_linear(block: nn.Module, linear: Any, x: Tensor, sizes: list[int]) -> Any:
        change(batch=x.shape[0], rows=x.shape[1], channels=x.shape[2], neurons=sizes[1])
        return originals["split_linear"](block, linear, x, sizes)

    originals: dict[str, Callable[..., Any]] = {
        name: getattr(chipmunk, name) for name in ("attention", "mlp", "split_linear")
    }
    counter = FlopCounterMode(display=False)
    handles = []
    for index, block in enumerate(blocks):

        def before(*_: object, index: int = index) -> None:
            inside.append(index)
            counts[index] -= counter.get_total_flops()

        def after(*_: object, index: int = index) -> None:
            inside.pop()
            counts[index] += counter.get_total_flops()

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    replaced = {"attention": attention, "mlp": mlp, "split_linear": split_linear}
    try:
        for name, function in replaced.items():
            setattr(chipmunk, name, function)
        with sdpa_kernel(SDPBackend.MATH), counter:  # its products are counted on every device
            call()
    finally:
        for name, function in originals.items():
            setattr(chipmunk, name, function)
        for handle in handles:
            handle.remove()
    return ModelCost(tuple(shapes), tuple(counts), counter.get_total_flops() - sum(counts))
