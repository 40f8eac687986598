"""Circumstances in which a model call is left exactly as it was: training, tracing, and whatever is no plain call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_exporting() -> bool:
    """Whether `torch.export` runs the model to write its program down: that program is the dense one."""
    # Since PyTorch 2.7. Not `torch.compiler.is_exporting()`, which is true in every graph that Dynamo of 2.11 makes.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def why_dense_here(image: Any) -> str | None:
    """Why a call with these image tokens (B, L, …) runs dense, whatever the step."""
    tracer = _tracer()
    if tracer is not None:
        return f"{tracer} records the program"
    if not isinstance(image, Tensor) or image.dim() < 2:
        return "the image is not one tensor (B, L, …)"
    if torch._C._functorch.is_functorch_wrapped_tensor(image):
        return "torch.func transforms the call"
    if type(image) is not Tensor and type(image) is not nn.Parameter:
        return f"the image is a {type(image).__name__}"
    if torch.is_grad_enabled():
        return "autograd is on"
    if image.device.type == "meta":
        return "the model is on the meta device"
    if is_cast(image):
        return "autocast to another dtype is on"
    if image.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def is_cast(x: Tensor) -> bool:
    """Whether autocast would cast x, an input of a matrix product, to another dtype."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def _tracer() -> str | None:
    """What turns this call into a program of its own; such a program has no steps, and is to be the dense one."""
    if is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace"
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")  # not imported: then nobody uses it
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return "torch.fx"
    return None
