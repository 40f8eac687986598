"""One side of a benchmark, in a process of its own: `python -m chipmunk.bench.worker spec.json`.

Builds the repository's model, runs the repository's own sampling loop, times every picture and every model call, and
writes each `Run` as JSON. Events go to standard output, one a line.
"""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk
from chipmunk.bench.compile_counts import CompileCounts
from chipmunk.bench.measurement import Image, Run, steady, steps_that_fit
from chipmunk.bench.spec import PROGRESS, Spec
from chipmunk.runtime.counts import Statistics
from chipmunk.runtime.layer_state import DONE, LayerState
from chipmunk.runtime.session import ATTRIBUTE, Session, statistics
from chipmunk.verify.checkout import Checkout, CheckoutError
from chipmunk.verify.placeholders import PlaceholderUsed
from chipmunk.verify.subject import installed_object, load_file, randomise

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


_LOOPS = "No sampling loop of this repository can be run by itself"


class CannotTime(Exception):
    """Nothing can be measured here; says what is needed."""

    def __init__(self, kind: str, message: str, next_command: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.next_command = next_command


def main() -> None:
    spec = Spec.read(Path(sys.argv[1]))
    try:
        runs = work(spec)
    except Exception as error:
        explain(error)
        sys.exit(1)
    with spec.out.open("a") as file:
        for run in runs:
            file.write(json.dumps(run.to_json()) + "\n")


def work(spec: Spec) -> list[Run]:
    """Build one side's model and draw its pictures."""
    need_device(spec)
    torch.set_grad_enabled(False)
    say(event="build")
    model, loop = build(spec)
    session = enable(model, spec) if spec.side == "patched" else None
    if session is None and spec.compile:
        name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, name, 64)
        for block in (*attrgetter(spec.facts.double)(model), *attrgetter(spec.facts.single)(model)):
            block.compile(dynamic=False)
    environment = describe(spec, model)
    return [replace(run, environment=environment) for run in measure(spec, model, loop, session)]


def need_device(spec: Spec) -> None:
    """Raise CannotTime where there is no GPU that the operators are written for."""
    if torch.device(spec.device).type != "cuda":
        return
    needs = "bench needs an NVIDIA GPU of compute capability 8.0 or newer (40 GB of memory for FLUX.1-dev in bfloat16)"
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds none"
        raise CannotTime("device", f"{needs}, but PyTorch {torch.__version__} of {sys.executable} {built}")
    capability = torch.cuda.get_device_capability(spec.device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(spec.device)
        raise CannotTime("device", f"{needs}; the {name} has {capability[0]}.{capability[1]}")


def explain(error: Exception) -> None:
    """Tell the parent why this process ends."""
    kind, message, next_command = "crash", f"{type(error).__name__}: {error}", getattr(error, "next_command", None)
    if isinstance(error, CannotTime):
        kind, message = error.kind, str(error)
    elif isinstance(error, PlaceholderUsed):
        kind, message, next_command = "import", str(error), f"{sys.executable} -m pip install {error.name}"
    elif isinstance(error, CheckoutError):
        kind, message = "import", str(error)
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        kind, message = "memory", str(error).partition("\n")[0]
    elif type(error).__name__ == "CannotRun":  # the target's own
        kind, message = "build", str(error)
    trace = "".join(traceback.format_exception(error))
    say(event="error", kind=kind, message=message, next=next_command, trace=trace)


def build(spec: Spec) -> tuple[nn.Module, Loop]:
    """The repository's model with random or given weights, and its sampling loop."""
    checkout, target = Checkout(spec.root), load_file(spec.target, "chipmunk_bench_target")
    if hasattr(target, "prepare"):
        target.prepare(checkout.load, spec.facts.file, spec.device)
    find = installed_object if spec.facts.installed else checkout.object
    model_class = find(spec.facts.file, spec.facts.name)
    dtype = getattr(torch, spec.dtype)
    torch.set_default_dtype(dtype)
    tensors: dict[str, Tensor] | None = None
    values = size_of(spec, target, model_class)
    if spec.weights is not None:
        from safetensors.torch import load_file as load_tensors

        tensors = load_tensors(spec.weights)
        values = target.values_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    values = {**values, **spec.overrides}
    need_memory(spec, lambda: target.build(model_class, values))
    with torch.device(spec.device):
        model: nn.Module = target.build(model_class, values)
    torch.set_default_dtype(torch.float32)
    if tensors is None:
        randomise(model, spec.seed)
    else:
        model.load_state_dict(tensors, strict=True)
    if spec.facts.installed:  # its loops are pipelines, which run with their encoders alone
        return model.eval().requires_grad_(False), Loop(target, target.sample, "model", "plain")
    why = []
    for facts in spec.facts.loops:
        if facts.model_parameter is None:
            why.append(f"{facts.file}:{facts.line} {facts.function}: its model is no parameter of it")
            continue
        function = checkout.object(facts.file, facts.function)
        parameter = facts.model_parameter
        try:
            variant = target.loop_variants(function, parameter)[0]
        except target.CannotRun as error:
            why.append(f"{facts.file}:{facts.line} {facts.function}: {error}")
            continue
        checkout.placeholders.arm()
        return model.eval().requires_grad_(False), Loop(target, function, parameter, variant)
    raise CannotTime("build", "; ".join([_LOOPS, *why]))


def size_of(spec: Spec, target: ModuleType, model_class: type[nn.Module]) -> dict[str, Any]:
    """Constructor arguments of the model that is to be built."""
    named: Callable[..., dict[str, Any]] | None = getattr(target, "named", None)
    small: dict[str, Any] = target.SMALL
    full: dict[str, Any] = target.FULL
    if spec.model is None and torch.device(spec.device).type == "cpu":
        return small
    if named is not None:
        return named(model_class, spec.model)
    if spec.model is not None:
        raise CannotTime("build", f"target '{target.NAME}' knows no models by name")
    return full


def need_memory(spec: Spec, build_model: Callable[[], nn.Module]) -> None:
    """Raise CannotTime where the weights alone do not fit; `build_model` is run without any memory."""
    if torch.device(spec.device).type != "cuda":
        return
    with torch.device("meta"):
        model = build_model()
    parameters = list(model.parameters())
    needed, free = sum(p.numel() * p.itemsize for p in parameters), torch.cuda.mem_get_info(spec.device)[0]
    if needed > free:
        count = _count(sum(parameter.numel() for parameter in parameters))
        raise CannotTime("weights", f"its {count} parameters take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


@dataclass(frozen=True)
class Loop:
    """The repository's own sampling loop, called through its target."""

    target: ModuleType
    function: Callable[..., Any]
    parameter: str
    """Name of the parameter that takes the model."""
    variant: str

    def inputs(self, model: nn.Module, spec: Spec, width: int, height: int, seed: int) -> dict[str, Tensor]:
        """Random arguments of one picture."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Tensor] = self.target.inputs(
            model, spec.batch, height // 16, width // 16, spec.text_tokens, generator
        )
        return given

    def __call__(self, model: nn.Module, given: dict[str, Tensor], times: Sequence[float]) -> Tensor:
        result: Tensor = self.target.run_loop(self.function, self.parameter, model, given, times, self.variant)
        return result


def enable(model: nn.Module, spec: Spec) -> Session:
    """Turn Chipmunk on, with the defaults where no configuration is given."""
    chipmunk.enable(model, spec.config or {})
    session: Session = model.__dict__[ATTRIBUTE]
    return session


def fastest_sdpa(spec: Spec, model: nn.Module, width: int, height: int) -> str:
    """The backend that computes the joint attention of a size soonest. On a CPU there is no choice."""
    if torch.device(spec.device).type != "cuda":
        return "flash"
    tokens = spec.text_tokens + (width // 16) * (height // 16)
    heads, width = attention_heads(model)
    shape = (3, spec.batch, heads, tokens, width)
    q, k, v = torch.randn(shape, device=spec.device, dtype=getattr(torch, spec.dtype))
    times: dict[str, float] = {}
    for name, backend in _BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times[name] = timed(lambda: nn.functional.scaled_dot_product_attention(q, k, v))
        except RuntimeError:
            continue  # not for this GPU, dtype or shape
    return min(times, key=lambda name: times[name], default="math")


def attention_heads(model: nn.Module) -> tuple[int, int]:
    """Number of heads and head dimension, under the names that FLUX and diffusers have for them; else FLUX.1's."""
    config: Any = getattr(model, "config", None)  # of diffusers
    if hasattr(config, "num_attention_heads") and hasattr(config, "attention_head_dim"):
        return config.num_attention_heads, config.attention_head_dim
    heads: int = getattr(model, "num_heads", 24)
    return heads, getattr(model, "hidden_size", 128 * heads) // heads


def timed(call: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds on the device."""
    for _ in range(3):
        call()
    marks = [mark()]
    for _ in range(repeats):
        call()
        marks.append(mark())
    torch.cuda.synchronize()
    return float(median(before.elapsed_time(after) for before, after in itertools.pairwise(marks)))


def mark() -> Any:
    """A point in the device's work, to tell times between two of them."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def measure(spec: Spec, model: nn.Module, loop: Loop, session: Session | None) -> list[Run]:
    """Draw the pictures of every size; the original also draws with fewer steps where a time to match is given."""
    counts = CompileCounts()
    images: list[Image] = []
    shorter: list[Image] = []
    for width, height in spec.sizes:
        of_size = partial(draw_counted, spec, model, loop, session, counts, width, height)
        backend = fastest_sdpa(spec, model, width, height)
        allowed = [SDPBackend.MATH] if backend == "math" else [_BACKENDS[backend], SDPBackend.MATH]
        with sdpa_kernel(allowed):
            ours = "dense" if session is None else "chipmunk"
            drawn = [replace(of_size(ours, spec.steps, index), sdpa=backend) for index in range(spec.images)]
            base = steady(drawn)
            fitting = {steps_that_fit(seconds, base) for seconds in spec.match_seconds.get(base.size, ())}
            for steps in sorted(fitting):
                shorter += [replace(of_size("fewer steps", steps, index), sdpa=backend) for index in range(2)]
        images += drawn
    if session is None:
        runs = [Run("dense", tuple(images), {})]
        return [*runs, Run("fewer steps", tuple(shorter), {})] if shorter else runs
    counted = statistics(model)
    return [Run("chipmunk", tuple(images), {}, statistics=str(counted), notes=tuple(notes(counted, images)))]


def draw_counted(
    spec: Spec,
    model: nn.Module,
    loop: Loop,
    session: Session | None,
    counts: CompileCounts,
    width: int,
    height: int,
    variant: str,
    steps: int,
    index: int,
) -> Image:
    """Draw a picture, say so, and note what was compiled."""
    about = {"variant": variant, "size": f"{width}x{height}", "steps": steps, "index": index}
    say(event="begin", **about)
    image = draw(spec, model, loop, session, width, height, steps, index)
    say(event="image", seconds=image.seconds, **about)
    return replace(image, compiled=counts.since())


def notes(counted: Statistics, images: Sequence[Image]) -> Iterator[str]:
    """What kept Chipmunk from running as it should."""
    for title, counts in (
        ("model calls that ran dense", counted.dense_model_calls),
        ("started over", counted.restarts),
        ("not in Triton", counted.fallbacks),
    ):
        for reason, count in counts.items():
            yield f"{title}: {reason} ({count})"
    if counted.no_step_caching is not None:
        yield f"no steps were skipped: {counted.no_step_caching}"
    for size in dict.fromkeys(image.size for image in images):
        if not any("sparse" in kind for image in images if image.size == size for kind in image.kinds):
            yield f"at {size} no step of the last layer was sparse"


def draw(
    spec: Spec, model: nn.Module, loop: Loop, session: Session | None, width: int, height: int, steps: int, index: int
) -> Image:
    given = loop.inputs(model, spec, width, height, seed=index + 1)
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
        raise CannotTime("result", f"the picture {width}x{height} is not finite: its time means nothing")
    return Image(
        width=width,
        height=height,
        steps=steps,
        index=index,
        seconds=seconds,
        step_ms=tuple(calls.milliseconds()),
        kinds=tuple(calls.kinds),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
        kept=calls.kept,
    )


class Calls:
    """What is noted about each call of the model."""

    def __init__(self, session: Session | None, cuda: bool) -> None:
        self.session = session
        self.cuda = cuda
        self.marks: list[tuple[Any, Any]] = []
        self.kinds: list[str] = []
        self.kept: dict[str, float] = {}

    def before(self, *_: object) -> None:
        self.marks.append((self._now(), None))

    def after(self, *_: object) -> None:
        self.marks[-1] = (self.marks[-1][0], self._now())
        if self.session is None:
            self.kinds.append("dense")
            return
        if was_skipped(self.session):
            self.kinds.append("skipped")
            return
        state = state_of_last_call(self.session)
        self.kinds.append("dense/dense" if state is None else kind(state))
        if state is not None and "sparse" in self.kinds[-1] and len(self.kept) < 2:
            if state.keys is not None and state.difference is not None:
                self.kept["keys"] = state.keys.shape[-1] / state.difference.shape[2]
            if state.neurons is not None and state.activations is not None:
                self.kept["neurons"] = state.neurons.shape[-1] / state.activations.shape[-1]

    def milliseconds(self) -> list[float]:
        if self.cuda:
            return [float(start.elapsed_time(end)) for start, end in self.marks]
        return [1e3 * (end - start) for start, end in self.marks]

    def _now(self) -> Any:
        return mark() if self.cuda else time.perf_counter()


@contextmanager
def model_calls(model: nn.Module, session: Session | None, cuda: bool) -> Iterator[Calls]:
    """Note each call of the model between hooks."""
    calls = Calls(session, cuda)
    handles = [model.register_forward_pre_hook(calls.before), model.register_forward_hook(calls.after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def was_skipped(session: Session) -> bool:
    """Whether no block ran in the last call."""
    return any(
        slot.skipped and slot.last_step == generation.step
        for generation in session.generations
        for slot in generation.slots.values()
    )


def state_of_last_call(session: Session) -> LayerState | None:
    """The state of the last layer after a call; None where the whole call was dense."""
    for generation in session.generations:
        for slot in generation.slots.values():
            state: LayerState | None = slot.layers[-1]
            if state is not None and slot.last_step == generation.step:
                return state
    return None


def kind(state: LayerState) -> str:
    """What a layer's attention and MLP did in the last call, `full/sparse` say.

    What was planned and then did not pay, for so few tokens say, ran dense.
    """
    attention = state.attention if state.attention_done == DONE else "dense"
    mlp = state.mlp if state.mlp_done == DONE else "dense"
    return f"{attention}/{mlp}"


def describe(spec: Spec, model: nn.Module) -> dict[str, str]:
    """Hardware and versions that a reader needs to measure the same."""
    device = torch.device(spec.device)
    found = {"device": f"CPU ({platform.machine()})", "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = str(triton.__version__)
    except ImportError:
        found["triton"] = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        found["driver"] = driver()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found["model"] = f"{spec.facts.name} of {spec.facts.file}, {_count(parameters)} parameters"
    found["weights"] = "random" if spec.weights is None else spec.weights.name
    return {**found, "dtype": spec.dtype, "batch": str(spec.batch), "text tokens": str(spec.text_tokens)}


def driver() -> str:
    """The version of the GPU's driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (answer.splitlines() or ["unknown"])[0].strip()


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters > 1e9 else f"{parameters / 1e6:.1f} million"


def say(**event: object) -> None:
    print(PROGRESS + json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
