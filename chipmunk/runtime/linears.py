"""Which linear layers are understood well enough to take over, and which MLPs.

The question is asked at every call: LoRA, quantisation and hooks come and go after a model is loaded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def why_not_linear(linear: nn.Module, x: Tensor, width: int) -> str | None:
    """Why `linear` cannot be replaced by its weight and bias, applied to (…, width) of x's dtype and device.

    None if it can.
    """
    if type(linear) is not nn.Linear:
        return f"the linear layer is a {type(linear).__name__}"
    if _is_hooked(linear):
        return "a hook watches or changes the linear layer"
    weight, bias = linear.weight, linear.bias
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype != x.dtype or not x.dtype.is_floating_point or (bias is not None and bias.dtype != x.dtype):
        return "the weight's dtype is not that of the activations"
    if weight.dim() != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
        return "the weight's shape is not (out, in)"
    if weight.device != x.device:
        return "the weight is on another device"
    return None


def activation_name(activation: object) -> str | None:
    """`gelu_tanh` or `gelu` where `activation` is exactly that module, otherwise None."""
    if type(activation) is not nn.GELU or _is_hooked(activation):
        return None
    return "gelu_tanh" if activation.approximate == "tanh" else "gelu"


def why_not_mlp(mlp: Any, x: Tensor) -> str | None:
    """Why `mlp` is not a plain Linear → GELU → Linear on x (B, N, C); None if it is."""
    if type(mlp) is not nn.Sequential or len(mlp) != 3:
        return f"the MLP is a {type(mlp).__name__} that is not understood"
    if _is_hooked(mlp):
        return "a hook watches or changes the MLP"
    if activation_name(mlp[1]) is None:
        return f"the activation is a {type(mlp[1]).__name__} that is not understood"
    if x.dim() != 3:
        return "the MLP's input is not (B, N, C)"
    first: Any = mlp[0]
    reason = why_not_linear(first, x, x.shape[-1])
    return reason if reason is not None else why_not_linear(mlp[2], x, first.weight.shape[0])


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
