"""Launch parameters of the Triton operators: a table for the GPUs that were measured, a short search on all others.

A search runs once for each operator, shape class and kind of GPU; its result is kept in the user's cache directory
(`$XDG_CACHE_HOME/chipmunk/tuning.json`, by default under `~/.cache`), so that the next process starts at once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from chipmunk.ops.dispatch import override
from chipmunk.ops.launch import do_not_repeat, is_ahead

Parameters = dict[str, int]

# Capability → operator and shape class → parameters. Measured on an H100 (docs/kernels.md has the attempts).
_TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
_QUERIES = 256 if _TRITON < (3, 9) else 128  # Triton 3.9 wants more registers for 256 than there are
_SUMS: Parameters = {"queries": _QUERIES, "tile": 64, "warps": 4, "stages": 3, "splits": 2, "programs": 2}
_HOPPER: dict[str, Parameters] = {
    "attention_with_column_sums/64": _SUMS,
    "attention_with_column_sums/128": _SUMS,
    "column_sparse_attention/64": {"rows": 128, "keys": 32, "warps": 4, "stages": 3},
    "column_sparse_attention/64 gluon 1": {"gluon": 1, "keys": 64, "stages": 2},
    "column_sparse_attention/64 gluon 2": {"gluon": 1, "keys": 128, "stages": 2},
    "column_sparse_attention/64 gluon 3": {"gluon": 1, "keys": 64, "stages": 4},
    "column_sparse_attention/128": {"rows": 128, "keys": 32, "warps": 4, "stages": 3},
    "column_sparse_attention/128 gluon 1": {"gluon": 1, "keys": 64, "stages": 2},
    "column_sparse_attention/128 gluon 2": {"gluon": 1, "keys": 128, "stages": 2},
    "column_sparse_attention/128 gluon 3": {"gluon": 1, "keys": 64, "stages": 3},
    "sparse_mlp_in": {"rows": 128, "neurons": 256, "depth": 64, "warps": 8, "stages": 3, "split": 4},
    "sparse_swiglu_in": {"rows": 128, "neurons": 128, "depth": 64, "warps": 8, "stages": 3, "split": 2},
    "sparse_mlp_out/gluon": {"gluon": 1, "blocks": 3, "stages": 3},
    "sparse_mlp_out": {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 3, "split": 4},
}
TABLE: dict[tuple[int, int], dict[str, Parameters]] = {(9, 0): _HOPPER}

_found: dict[str, Parameters] = {}


def interpreted() -> bool:
    """True where Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1 before triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def device_reason(x: Tensor) -> str | None:
    """Why Triton cannot run an operator on tensors like `x`; None where it can."""
    if x.device.type == "cuda":
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"{str(x.dtype).removeprefix('torch.')} (float16 and bfloat16 only)"
        if capability(x.device) < (8, 0):
            return "a GPU older than compute capability 8.0"
        return None
    if not interpreted():
        return f"a tensor on {x.device.type}"
    return None if x.dtype in (torch.float16, torch.float32) else f"{x.dtype} in Triton's interpreter"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def gluon(device: torch.device) -> bool:
    """Whether the kernels written in Gluon run here: Hopper, and a Triton whose Gluon they were tried on."""
    return device.type == "cuda" and capability(device) == (9, 0) and triton.__version__.startswith("3.6.")


def aligned(*tensors: Tensor) -> bool:
    """Whether rows of these can be copied 16 bytes at a time: by their data, which ahead of a launch is not there."""
    return is_ahead() or all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the work of a persistent grid; a few in the interpreter, to share it there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@cache
def _shared_memory(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def parameters(
    operator: str,
    shape_class: str,
    device: torch.device,
    candidates: Sequence[tuple[Parameters, int]],
    trial: Callable[[Parameters], object],
) -> Parameters:
    """The launch parameters for `operator` on inputs of `shape_class`.

    candidates: parameters with the bytes of shared memory they take, best guess first. trial: runs the operator once on
    scratch copies of what it mutates; called only where nothing is known of this GPU and no graph is being captured.
    """
    if operator in override:
        return override[operator]
    name = f"{operator}/{shape_class}" if shape_class else operator
    if device.type != "cuda":
        return candidates[-1][0]
    known = TABLE.get(capability(device), {}).get(name)
    if known is not None:
        return known
    key = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {name}"
    if not _found:
        _found.update(_read())
    if key not in _found:
        do_not_repeat()
        fitting = [each for each, needed in candidates if needed <= _shared_memory(device)] or [candidates[-1][0]]
        if torch.cuda.is_current_stream_capturing():
            return fitting[0]
        if is_ahead():
            raise RuntimeError("nothing is known of this GPU yet, and nothing can be timed without data")
        _found[key] = _fastest(fitting, trial)
        _write(_found)
    return _found[key]


def _fastest(candidates: Sequence[Parameters], trial: Callable[[Parameters], object]) -> Parameters:
    times: list[tuple[float, int]] = []
    for position, candidate in enumerate(candidates):
        try:
            trial(candidate)
            times.append((triton.testing.do_bench(lambda c=candidate: trial(c), warmup=5, rep=20), position))
        except (triton.OutOfResources, triton.CompilationError):
            continue  # this GPU or this Triton cannot build it
    if not times:
        raise RuntimeError("none of the launch parameters runs on this GPU; set `implementation: reference`")
    return candidates[min(times)[1]]


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chipmunk" / "tuning.json"


def _read() -> dict[str, Parameters]:
    try:
        stored = json.loads(_file().read_text(encoding="utf-8"))
        return {str(key): {str(k): int(v) for k, v in value.items()} for key, value in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # absent or damaged: measured again


def _write(found: dict[str, Parameters]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(found, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return  # a read-only home costs the search again next time, nothing else
