"""The cases' times, as medians of graph replays."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from chipmunk.bench.ops.cases import Case, Run, cases
from chipmunk.ops import dispatch


def milliseconds(runs: Sequence[Run], budget: float = 0.12) -> float:
    """Milliseconds a run: median of replays of a graph that holds each of `runs`, for about `budget` seconds."""
    torch.cuda.synchronize()  # the inputs were made on another stream
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for run in runs:
            run()
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times: list[float] = []
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 400):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(runs))
    return median(times)


def _prepare(wanted: tuple[str, str]) -> None:
    """In a process of its own: compile what one case needs into Triton's cache on disk."""
    name, variants = wanted
    case = next(c for c in cases(variants) if c.name == name)
    with _using(case):
        try:
            case.build()[0]()
            torch.cuda.synchronize()
        except Exception as failure:
            print(f"{name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)


@contextmanager
def _using(case: Case) -> Iterator[None]:
    dispatch.override.clear()
    if case.parameters is not None:
        dispatch.override[case.operator] = case.parameters
    yield
    dispatch.override.clear()


def _listed(variants: str, pattern: str) -> list[Case]:
    return [case for case in cases(variants) if not pattern or any(p in case.name for p in pattern.split(","))]


def prepare(variants: str, pattern: str, workers: int) -> None:
    """Compile what the cases need, `workers` at a time."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_prepare, [(case.name, variants) for case in _listed(variants, pattern)]))


def time_cases(variants: str, pattern: str, repeats: int) -> list[dict[str, Any]]:
    """Time the cases whose name holds a word of `pattern`, `repeats` times each, and print a line for each.

    A line has `name`, `ms` (median), `spread_ms`, and where they make sense `tflops` and `ratio` (dense ms / its own).
    """
    results: list[dict[str, Any]] = []
    times: dict[str, float] = {}
    for case in _listed(variants, pattern):
        try:
            with _using(case):
                runs = case.build()
                measured = [milliseconds(runs) for _ in range(repeats)]
        except Exception as failure:  # one variant that this GPU cannot build must not cost the others
            print(f"{case.name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
            continue
        finally:
            runs = []
            torch.cuda.empty_cache()
        times[case.name] = median(measured)
        line = {"name": case.name, "ms": median(measured), "spread_ms": max(measured) - min(measured)}
        if case.flops:
            line["tflops"] = case.flops / median(measured) / 1e9
        if case.dense in times:
            line["ratio"] = times[case.dense] / median(measured)
        results.append(line)
        print(_show(line), flush=True)
    return results


def _show(line: dict[str, Any]) -> str:
    ratio = f"{line['ratio']:5.2f}×" if "ratio" in line else "      "
    rate = f"{line['tflops']:4.0f}" if "tflops" in line else "    "
    return f"{line['ms']:8.4f} ±{line['spread_ms']:.4f} ms {rate} TFLOP/s {ratio} {line['name']}"
