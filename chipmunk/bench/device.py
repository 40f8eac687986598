"""The device of a benchmark: whether it will do, what it is, a clock on it, and its fastest attention."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk.bench.spec import Spec

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""By the names that `fastest_sdpa` gives; another is `math`, where none of these works."""


class CannotTime(Exception):
    """Nothing can be measured here; says what is needed."""

    def __init__(self, kind: str, message: str, next_command: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.next_command = next_command


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


def mark() -> Any:
    """A point in the device's work, to tell times between two of them."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


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


def fastest_sdpa(spec: Spec, model: nn.Module, width: int, height: int) -> str:
    """The backend that computes the joint attention of a size soonest. On a CPU there is no choice."""
    if torch.device(spec.device).type != "cuda":
        return "flash"
    tokens = spec.text_tokens + (width // 16) * (height // 16)
    heads, width = attention_heads(model)
    shape = (3, spec.batch, heads, tokens, width)
    q, k, v = torch.randn(shape, device=spec.device, dtype=getattr(torch, spec.dtype))
    times: dict[str, float] = {}
    for name, backend in BACKENDS.items():
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
