"""One side of a benchmark, in a process of its own: `python -m chipmunk.bench.worker spec.json`.

Builds the repository's model, runs the repository's own sampling loop, times every picture and every model call, and
writes a `Run` as JSON. Progress goes to standard output, one JSON object a line.
"""

from __future__ import annotations

import inspect
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk.bench.measurement import Image, Run
from chipmunk.bench.spec import Spec
from chipmunk.verify.checkout import Checkout
from chipmunk.verify.subject import load_file, randomise

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> None:
    spec = Spec.read(Path(sys.argv[1]))
    torch.set_grad_enabled(False)
    model, loop = build(spec)
    backend = fastest_sdpa(spec, model)
    session = enable(model, spec) if spec.side == "patched" else None
    if session is None and spec.compile:
        torch._dynamo.config.cache_size_limit = 64
        for block in (*getattr(model, spec.facts.double), *getattr(model, spec.facts.single)):
            block.compile(dynamic=False)
    with sdpa_kernel([_BACKENDS[backend], SDPBackend.MATH]):
        runs = measure(spec, model, loop, session)
    environment = describe(spec, backend)
    for run in runs:
        run = replace(run, environment=environment, compiled=compile_counts())
        with spec.out.open("a") as file:
            file.write(json.dumps(run.to_json()) + "\n")


def build(spec: Spec) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The repository's model with random or given weights, and its sampling loop as `loop(model, given, times)`."""
    say(event="build", variant=spec.side)
    checkout, target = Checkout(spec.root), load_file(spec.target, "chipmunk_bench_target")
    model_class = checkout.object(spec.facts.file, spec.facts.name)
    dtype = getattr(torch, spec.dtype)
    torch.set_default_dtype(dtype)
    tensors: dict[str, Tensor] | None = None
    values = target.FULL
    if spec.weights is not None:
        from safetensors.torch import load_file as load_tensors

        tensors = load_tensors(spec.weights)
        values = target.values_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.device(spec.device):
        model: nn.Module = target.build(model_class, {**values, **spec.overrides})
    torch.set_default_dtype(torch.float32)
    if tensors is None:
        randomise(model, spec.seed)
    else:
        model.load_state_dict(tensors, strict=True)
    for facts in spec.facts.loops:
        if facts.model_parameter is None:
            continue
        function = checkout.object(facts.file, facts.function)
        variants = target.loop_variants(function, facts.model_parameter)
        checkout.placeholders.arm()
        parameter = facts.model_parameter

        def run(model: nn.Module, given: dict[str, Tensor], times: Sequence[float]) -> Tensor:
            result: Tensor = target.run_loop(function, parameter, model, given, times, variants[0])
            return result

        run.inputs = target.inputs  # type: ignore[attr-defined]
        return model.eval().requires_grad_(False), run
    raise SystemExit("No sampling loop of this repository takes the model as a parameter: nothing to time.")


def enable(model: nn.Module, spec: Spec) -> Any:
    import chipmunk

    chipmunk.enable(model, spec.config or {})
    return model.__dict__["_chipmunk_session"]


def fastest_sdpa(spec: Spec, model: nn.Module) -> str:
    """The backend that computes the joint attention of the first size soonest. On a CPU there is no choice."""
    if torch.device(spec.device).type != "cuda":
        return "flash"
    width, height = spec.sizes[0]
    tokens = spec.text_tokens + (width // 16) * (height // 16)
    heads = getattr(model, "num_heads", 24)
    hidden = getattr(model, "hidden_size", 3072)
    q, k, v = torch.randn(
        3, spec.batch, heads, tokens, hidden // heads, device=spec.device, dtype=getattr(torch, spec.dtype)
    )
    times: dict[str, float] = {}
    for name, backend in _BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times[name] = timed(lambda: nn.functional.scaled_dot_product_attention(q, k, v))
        except RuntimeError:
            continue
    say(event="sdpa", milliseconds=times)
    return min(times, key=lambda name: times[name])


def timed(call: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds on the device."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in zip(marks, marks[1:]))[repeats // 2]


def measure(spec: Spec, model: nn.Module, loop: Callable[..., Tensor], session: Any) -> list[Run]:
    """Draw the pictures of every size; the original also draws with fewer steps where a time to match is given."""
    images, shorter = [], []
    for width, height in spec.sizes:
        drawn = [draw(spec, model, loop, session, width, height, spec.steps, index) for index in range(spec.images)]
        images += drawn
        target = spec.match_seconds.get(f"{width}x{height}")
        if target is not None:
            per_step = min(image.seconds for image in drawn) / spec.steps
            steps = max(1, int(target / per_step))
            shorter += [draw(spec, model, loop, session, width, height, steps, index) for index in range(2)]
    if session is None:
        runs = [Run("dense", tuple(images), {})]
        return [*runs, Run("fewer steps", tuple(shorter), {})] if shorter else runs
    import chipmunk

    return [Run("chipmunk", tuple(images), {}, statistics=str(chipmunk.statistics(model)))]


def draw(
    spec: Spec, model: nn.Module, loop: Any, session: Any, width: int, height: int, steps: int, index: int
) -> Image:
    generator = torch.Generator().manual_seed(index + 1)
    given = loop.inputs(model, spec.batch, height // 16, width // 16, spec.text_tokens, generator)
    times = [1 - step / steps for step in range(steps + 1)]
    cuda = torch.device(spec.device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with model_calls(model, session, cuda) as calls:
        start = time.perf_counter()
        result = loop(model, given, times)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if not torch.isfinite(result).all():
        raise SystemExit(f"the picture {width}x{height} is not finite: its time means nothing")
    image = Image(
        width=width,
        height=height,
        steps=steps,
        index=index,
        seconds=seconds,
        step_ms=tuple(ms for ms, _ in calls()),
        kinds=tuple(kind for _, kind in calls()),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
    )
    say(
        event="image",
        variant="dense" if session is None else "chipmunk",
        size=image.size,
        steps=steps,
        index=index,
        seconds=seconds,
    )
    return image


@contextmanager
def model_calls(model: nn.Module, session: Any, cuda: bool) -> Iterator[Callable[[], list[tuple[float, str]]]]:
    """Time each call of the model between hooks; the kind is read from the session after the call."""
    marks: list[tuple[Any, Any]] = []
    kinds: list[str] = []

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def before(*_: object) -> None:
        marks.append((now(), None))

    def after(*_: object) -> None:
        marks[-1] = (marks[-1][0], now())
        kinds.append("dense" if session is None else kind_of_last_call(session))

    def read() -> list[tuple[float, str]]:
        if cuda:
            return [(start.elapsed_time(end), kind) for (start, end), kind in zip(marks, kinds)]
        return [(1e3 * (end - start), kind) for (start, end), kind in zip(marks, kinds)]

    handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def kind_of_last_call(session: Any) -> str:
    """Attention and MLP of the last layer, `sparse/full` say; `dense` where the whole call was."""
    for generation in session.generations:
        for slot in generation.slots.values():
            state = slot.layers[-1]
            if state is not None and slot.last_step == generation.step:
                return f"{state.attention}/{state.mlp}"
    return "dense"


def compile_counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph breaks": sum(counters["graph_break"].values()),
        "recompiles past the limit": counters["resume"].total() if hasattr(counters["resume"], "total") else 0,
    }


def describe(spec: Spec, backend: str) -> dict[str, str]:
    device = torch.device(spec.device)
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": str(torch.version.cuda),
        "sdpa": backend,
        "dtype": spec.dtype,
        "batch": str(spec.batch),
    }


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
