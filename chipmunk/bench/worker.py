"""One side of a benchmark, in a process of its own: `python -m chipmunk.bench.worker spec.json`.

Builds the repository's model, runs the repository's own sampling loop, times every picture and every model call, and
writes each `Run` as JSON. Events go to standard output, one a line.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk
from chipmunk.bench.compile_counts import CompileCounts
from chipmunk.bench.device import BACKENDS, CannotTime, describe, fastest_sdpa, need_device
from chipmunk.bench.measurement import Image, Run, steady, steps_that_fit
from chipmunk.bench.model import Loop, build
from chipmunk.bench.model_calls import model_calls
from chipmunk.bench.spec import Spec
from chipmunk.runtime.compiling import methods_of
from chipmunk.runtime.control import statistics
from chipmunk.runtime.counts import Statistics
from chipmunk.runtime.session import ATTRIBUTE, Session
from chipmunk.verify.checkout import CheckoutError
from chipmunk.verify.order import PROGRESS, read_order
from chipmunk.verify.placeholders import PlaceholderUsed, to_install


def main() -> None:
    spec = read_order(Spec, Path(sys.argv[1]))
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
        compile_blocks(model, spec)
    environment = describe(spec, model)
    say(event="about", environment=environment)
    return [replace(run, environment=environment) for run in Side(spec, model, loop, session).measure()]


def explain(error: Exception) -> None:
    """Tell the parent why this process ends."""
    kind, message, next_command = "crash", f"{type(error).__name__}: {error}", getattr(error, "next_command", None)
    if isinstance(error, CannotTime):
        kind, message = error.kind, str(error)
    elif isinstance(error, PlaceholderUsed):
        kind, message, next_command = "import", str(error), to_install(error.name or "")
    elif isinstance(error, CheckoutError):
        kind, message = "import", str(error)
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        kind, message = "memory", str(error).partition("\n")[0]
    elif type(error).__name__ == "CannotRun":  # the target's own
        kind, message = "build", str(error)
    trace = "".join(traceback.format_exception(error))
    say(event="error", kind=kind, message=message, next=next_command, trace=trace)


def enable(model: nn.Module, spec: Spec) -> Session:
    """Turn Chipmunk on, with the defaults where no configuration is given."""
    chipmunk.enable(model, spec.config or {})
    session: Session = model.__dict__[ATTRIBUTE]
    return session


def compile_blocks(model: nn.Module, spec: Spec) -> None:
    """Compile the original's blocks as the runtime compiles the patched ones, for any number of sizes."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, name, 64)
    for block in (*attrgetter(spec.facts.double)(model), *attrgetter(spec.facts.single)(model)):
        for method in methods_of(block):
            setattr(block, method, torch.compile(getattr(block, method), dynamic=False))
        if not methods_of(block):
            block.compile(dynamic=False)


class Side:
    """One side's model and loop, and Chipmunk's session, which the original has none of."""

    def __init__(self, spec: Spec, model: nn.Module, loop: Loop, session: Session | None) -> None:
        self.spec = spec
        self.model = model
        self.loop = loop
        self.session = session
        self.cuda = torch.device(spec.device).type == "cuda"
        self.counts = CompileCounts()

    def measure(self) -> list[Run]:
        """Draw the pictures of every size; the original also draws with fewer steps where a time to match is given."""
        variant = "dense" if self.session is None else "chipmunk"
        images: list[Image] = []
        shorter: list[Image] = []
        for width, height in self.spec.sizes:
            backend = fastest_sdpa(self.spec, self.model, width, height)
            allowed = [SDPBackend.MATH] if backend == "math" else [BACKENDS[backend], SDPBackend.MATH]
            with sdpa_kernel(allowed):
                steps, wanted = self.spec.steps, range(self.spec.images)
                drawn = [self.draw(variant, width, height, steps, index, backend) for index in wanted]
                base = steady(drawn)
                fitting = {steps_that_fit(seconds, base) for seconds in self.spec.match_seconds.get(base.size, ())}
                for steps in sorted(fitting):
                    shorter += [self.draw("fewer steps", width, height, steps, index, backend) for index in range(2)]
            images += drawn
        if self.session is None:
            runs = [Run("dense", tuple(images), {})]
            return [*runs, Run("fewer steps", tuple(shorter), {})] if shorter else runs
        counted = statistics(self.model)
        return [Run("chipmunk", tuple(images), {}, statistics=str(counted), notes=tuple(notes(counted, images)))]

    def draw(self, variant: str, width: int, height: int, steps: int, index: int, backend: str) -> Image:
        """Draw a picture, and say so before and after. backend: what `fastest_sdpa` chose, for the record."""
        about = {"variant": variant, "size": f"{width}x{height}", "steps": steps, "index": index}
        say(event="begin", **about)
        given = self.loop.inputs(self.model, self.spec, width, height, seed=index + 1)
        times = [1 - step / steps for step in range(steps + 1)]
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with model_calls(self.model, self.session, self.cuda) as calls:
            start = time.perf_counter()
            result = self.loop(self.model, given, times)
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        if not torch.isfinite(result).all():
            raise CannotTime("result", f"the picture {width}x{height} is not finite: its time means nothing")
        image = Image(
            width=width,
            height=height,
            steps=steps,
            index=index,
            seconds=seconds,
            step_ms=tuple(calls.milliseconds()),
            kinds=tuple(calls.kinds),
            peak_bytes=torch.cuda.max_memory_allocated() if self.cuda else 0,
            compiled=self.counts.since(),
            kept=calls.kept,
            sdpa=backend,
        )
        say(event="image", seconds=seconds, image=asdict(image), **about)
        return image


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


def say(**event: object) -> None:
    print(PROGRESS + json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
