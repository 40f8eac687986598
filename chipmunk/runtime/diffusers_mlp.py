"""The MLPs of diffusers' FLUX transformers: a `forward` in a module's own `__dict__`, which lets it run sparse.

A double block has its MLP in a module, a single block of FLUX.1 in three that its own forward calls one by one. A
hook could not leave the dense computation out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chipmunk.runtime import linears
from chipmunk.runtime.layer_state import state_of
from chipmunk.runtime.linears import HOOKED, is_hooked, name_of
from chipmunk.runtime.sparse_mlp import activate, cat_linear, mlp, mlp_linear

_PART = "_chipmunk_part"
"""Where a module that Chipmunk works in keeps its `_Part`, in its `__dict__`."""

Forward = Callable[..., Any]


class WholeMlp(NamedTuple):
    """The two linears of a block's MLP and the name of the activation between them."""

    first: nn.Module
    activation: str
    second: nn.Module


def form_of(ff: Any) -> WholeMlp | str:
    """What the MLP of a block consists of; or why that is not known."""
    kind = type(ff)
    unknown = f"the MLP is a {name_of(ff)} that is not understood"
    if not kind.__module__.startswith("diffusers."):
        return unknown
    if kind.__name__ == "FeedForward" and len(ff.net) == 3:
        gelu, dropout, second = ff.net
        if type(gelu).__name__ != "GELU" or type(dropout) is not nn.Dropout:
            return unknown
        if is_hooked(gelu) or is_hooked(dropout):
            return HOOKED
        if dropout.p > 0 and dropout.training:
            return "dropout is active in the MLP"
        return WholeMlp(gelu.proj, "gelu_tanh" if gelu.approximate == "tanh" else "gelu", second)
    if kind.__name__ in ("Flux2FeedForward", "Flux3FeedForward"):
        if type(ff.act_fn).__name__ not in ("Flux2SwiGLU", "Flux3SwiGLU"):
            return unknown
        return HOOKED if is_hooked(ff.act_fn) else WholeMlp(ff.linear_in, "swiglu", ff.linear_out)
    return unknown


def why_unlike(ff: Any, form: WholeMlp, device: torch.device) -> str | None:
    """Why the MLP is not the three steps that Chipmunk takes it for, seen on four random rows; None if it is.

    device: where to run it if accelerate brings its weights there.
    """
    first, activation, second = form
    weight = next((p for p in ff.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2), None)
    width = getattr(first, "in_features", None)
    if weight is None or not isinstance(width, int):
        return f"the MLP is a {name_of(ff)} that is not understood"
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator, device="cpu")
    x = x.to(device if weight.device.type == "meta" else weight.device, weight.dtype)
    try:
        with torch.no_grad():
            theirs, ours = type(ff).forward(ff, x), second(linears.activate(activation, first(x)))
    except Exception as error:
        return f"the MLP could not be checked: {type(error).__name__}: {error}"
    if (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm():
        return None
    return f"this release's {type(ff).__name__} computes something that Chipmunk does not know"


def install_whole(ff: Any, form: WholeMlp) -> str | None:
    """Let the MLP of a block run sparse; or why it cannot."""
    first, activation, second = form
    parts = f"first, {activation}, second"
    part = ff.__dict__.get(_PART)
    if part is not None and part.view.first is first and part.view.second is second and part.parts == parts:
        return None if _is_installed(ff) else HOOKED
    return _install(ff, _run_whole_mlp, _WholeView(ff, first, second), parts)


def install_single(first: Any, activation: Any, second: Any) -> str | None:
    """Let the MLP of a single block of FLUX.1 run sparse, whose three pieces these are; or why it cannot."""
    for linear in (first, second):
        if type(linear) is not nn.Linear:
            return f"the linear layer is a {name_of(linear)}"
    if type(activation) is not nn.GELU:
        return f"the activation is a {name_of(activation)} that is not understood"
    if all(_is_current(module) for module in (first, activation, second)):
        return None
    return (
        _install(first, _run_first_linear, _view_of(first))
        or _install(activation, _run_activation, nn.GELU(activation.approximate))
        or _install(second, _run_second_linear, _view_of(second), width=second.in_features - first.out_features)
    )


def _is_current(module: Any) -> bool:
    """Whether the module is installed, with the parameters that it has now."""
    part = module.__dict__.get(_PART)
    if part is None or not _is_installed(module):
        return False
    return not isinstance(module, nn.Linear) or (part.view.weight is module.weight and part.view.bias is module.bias)


def _view_of(linear: nn.Linear) -> nn.Linear:
    """Another linear layer with the same parameters."""
    view = nn.Linear(1, 1, device="meta")
    view.in_features, view.out_features = linear.in_features, linear.out_features
    view.weight, view.bias = linear.weight, linear.bias
    return view


def uninstall(module: nn.Module) -> None:
    """Give a module its class's forward back, unless another one was put there since."""
    part = module.__dict__.pop(_PART, None)
    if part is None:
        return
    if module.__dict__.get("forward") is part.forward:
        del module.__dict__["forward"]
    elif module.__dict__.get("_old_forward") is part.forward:  # accelerate has put its own around ours
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def forget_copied(module: nn.Module) -> None:
    """Take away what a copy or a pickle of an installed module carries: its forward, which is not installed."""
    if module.__dict__.get(_PART, False) is not None:
        return
    del module.__dict__[_PART]
    forget_forward(module, lambda function: function in _FORWARDS)


def forget_forward(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Take away a forward that is of the module which this one is a copy of, under accelerate's hook too."""
    for where in ("forward", "_old_forward"):
        function = getattr(module.__dict__.get(where), "__func__", None)
        if function is None or not (is_ours(function) or function is type(module).forward):
            continue
        if where == "forward":
            del module.__dict__[where]
        else:
            module.__dict__[where] = MethodType(type(module).forward, module)


# How a module is taken over.


class _Part:
    """What one module needs in order to run sparse. A copy or a pickle of the module carries none."""

    def __init__(self, forward: Forward, view: nn.Module, parts: str = "", attention_width: int = 0) -> None:
        self.forward = forward
        """What stands in the module's `__dict__` while it is installed."""
        self.view = view
        """The same parameters without that forward: what the sparse functions are given."""
        self.parts = parts
        """Of a whole MLP: where its linears are in the view, and its activation."""
        self.attention_width = attention_width
        """Of a single block's last linear: how many of its inputs are the attention's."""

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class _WholeView(nn.Module):
    """A whole MLP seen as two linears, under names that do not depend on the release; a call is the module's own."""

    def __init__(self, module: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.__dict__["module"] = module  # no sub-module: what is looked at are the two linears

    def forward(self, x: Tensor) -> Tensor:
        module: nn.Module = self.__dict__["module"]
        out: Tensor = type(module).forward(module, x)
        return out


def _install(module: nn.Module, function: Forward, view: nn.Module, parts: str = "", width: int = 0) -> str | None:
    """Let `function` be the module's forward, if nothing else is; or why it cannot."""
    if _PART not in module.__dict__ and is_hooked(module):
        return HOOKED
    forward = MethodType(function, module) if _PART not in module.__dict__ else module.__dict__[_PART].forward
    if _PART in module.__dict__ and not _is_installed(module):
        return HOOKED
    module.__dict__[_PART] = _Part(forward, view, parts, width)
    module.__dict__["forward"] = forward
    return None


def _is_installed(module: nn.Module) -> bool:
    """Whether our forward is the module's, and nothing else watches or changes it."""
    part = module.__dict__.get(_PART)
    watched = module._forward_hooks or module._forward_pre_hooks
    return part is not None and module.__dict__.get("forward") is part.forward and not watched


# What stands in for a module's forward. Its class's own is called wherever no state is there.


def _run_whole_mlp(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state = state_of(self)
    if state is None or len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    part: _Part = getattr(self, _PART)
    return mlp(state, part.view, args[0], parts=part.parts, of="_WholeView")


def _run_first_linear(self: nn.Module, x: Tensor) -> Tensor:
    state = state_of(self)
    if state is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, _PART)
    return mlp_linear(state, part.view, x)


def _run_activation(self: nn.Module, x: Tensor) -> Tensor:
    state = state_of(self)
    if state is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, _PART)
    return activate(state, part.view, x)


def _run_second_linear(self: nn.Module, x: Tensor) -> Tensor:
    """x: (B, N, C + F), or (B, N, C + K) on a sparse step: the attention's output and what the activation gave."""
    state = state_of(self)
    if state is None or state.single_mlp == "dense":
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, _PART)
    return cat_linear(state, part.view, x[..., : part.attention_width], None, x[..., part.attention_width :])


_FORWARDS = (_run_whole_mlp, _run_first_linear, _run_activation, _run_second_linear)
for _function in _FORWARDS:
    _function.__name__ = "forward"  # so that a pickled method is looked up as the class's own
