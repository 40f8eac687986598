"""Chipmunk on a FLUX transformer of diffusers, whose code nobody has patched.

`adopt` changes one model object, never a class, a module of diffusers or the state_dict, and `release` takes all of it
back:

- attention: the layers' processors, through diffusers' own `set_processor` (`diffusers_attention.py`);
- MLPs and the model's forward: a `forward` in the object's own `__dict__`. A hook could not leave the dense computation
  out. The model's stands inside accelerate's wrapper, where there is one: offloading removes and adds that at will.

Nothing is remembered about weights: before each call every layer is looked at again, so LoRA, quantisation, other
processors and offloading may come and go.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chipmunk.runtime import linears
from chipmunk.runtime.block_list import blocks_of
from chipmunk.runtime.find_model import ForwardSpec
from chipmunk.runtime.layer_state import ATTRIBUTE, LayerState, state_of
from chipmunk.runtime.sparse_mlp import activate, cat_linear, mlp, mlp_linear

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

PART = "_chipmunk_part"
"""Where a module that Chipmunk works in keeps its `_Part`, in its `__dict__`."""

_MODELS = {
    "FluxTransformer2DModel": "transformer_blocks",
    "Flux2Transformer2DModel": "transformer_blocks",
    "Flux3Transformer2DModel": "mode_blocks.image",
}
"""Class → its first kind of block. In FLUX.3 these are the image's own, before it meets the text."""

_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")

Forward = Callable[..., Any]


def spec_of_class(kind: type) -> ForwardSpec | None:
    """What to know about the forward of a FLUX transformer of diffusers, or a subclass; None for any other class."""
    for base in kind.__mro__:
        if base.__name__ in _MODELS and base.__module__.startswith("diffusers.models."):
            file = getattr(sys.modules.get(base.__module__), "__file__", None) or ""
            double, single = _MODELS[base.__name__], "single_transformer_blocks"
            per_token = tuple(p for p in inspect.signature(vars(base)["forward"]).parameters if p in _RESIDUALS)
            return ForwardSpec(double, single, "hidden_states", "img_ids", file, "timestep", per_token)
    return None


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


class _WholeMlp(nn.Module):
    """An MLP seen as two linears, under names that do not depend on the release; a call is the module's own."""

    def __init__(self, module: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.__dict__["module"] = module  # no sub-module: what is looked at are the two linears

    def forward(self, x: Tensor) -> Tensor:
        module: nn.Module = self.__dict__["module"]
        out: Tensor = type(module).forward(module, x)
        return out


class _Whole:
    """A result of diffusers' own class, carried past code that expects a tuple."""

    def __init__(self, result: Any) -> None:
        self.result = result


class Adopted:
    """What was changed about one model, and how each of its layers takes part in the call that is running."""

    def __init__(self, session: Session, model: nn.Module, call: Forward) -> None:
        """call: `session._call`, which runs a forward under the session."""
        # Not before: it imports diffusers.
        from chipmunk.runtime import diffusers_attention

        self.session = session
        self._attention = diffusers_attention
        self._checked: dict[tuple[object, ...], str | None] = {}
        """By what a layer's computation depends on, why Chipmunk's statement of it is another one."""
        where = "_old_forward" if "_old_forward" in model.__dict__ else "forward"
        self._previous = model.__dict__.get(where)
        self._forward = self._make_forward(model, call)
        model.__dict__[where] = self._forward
        self._set_aside: list[tuple[nn.Module, str, Any]] = []
        self.set_aside(model)

    def set_aside(self, holder: object) -> None:
        """Call the model as it is where `holder`, it or something that holds it, has it compiled as a whole.

        Its graph has no place for caches, and with `fullgraph=True` what has none is an error. The blocks are compiled
        instead, where the configuration and the device ask for it.
        """
        model = self.session.model()
        found = [holder, *getattr(holder, "__dict__", {}).values()]
        for module in found:
            if not isinstance(module, nn.Module):
                continue
            if module is model and module._compiled_call_impl is not None:
                self._set_aside.append((module, "_compiled_call_impl", module._compiled_call_impl))
                module._compiled_call_impl = None
            elif model is not None and module._modules.get("_orig_mod") is model:
                self._set_aside.append((module, "forward", module.__dict__["forward"]))
                module.__dict__["forward"] = model.__call__

    def release(self, model: nn.Module) -> None:
        """Leave the model as it was found."""
        for where in ("forward", "_old_forward"):
            if model.__dict__.get(where) is self._forward:
                model.__dict__[where] = self._previous or MethodType(type(model).forward, model)
                if self._previous is None and where == "forward":
                    del model.__dict__[where]
        for module, name, value in reversed(self._set_aside):
            module.__dict__[name] = value
        for module in model.modules():
            self._attention.uninstall(module)
            _uninstall(module)

    # The model's forward.

    def _make_forward(self, model: nn.Module, call: Forward) -> MethodType:
        original = type(model).forward
        signature = inspect.signature(original)
        previous = self._previous
        adopted = self

        def inner(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            given = _by_name(signature, (model, *args), kwargs)
            adopted._prepare(model, given["hidden_states"].device)
            result = original(model, **given) if previous is None else previous(**given)
            return result if type(result) is tuple else (result.sample, _Whole(result))

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if adopted.session.model() is not self:  # a copy, or a replica on another device
                return original(self, *args, **kwargs)
            if kwargs.get("kv_cache_mode") is not None:
                recorder = adopted.session.recorder
                recorder.model_calls += 1
                recorder.dense_model_calls["reference tokens are kept in a key-value cache"] += 1
                return original(self, *args, **kwargs) if previous is None else previous(*args, **kwargs)
            result = call(inner, signature, self, args, kwargs)
            if type(result) is tuple and isinstance(result[-1], _Whole):
                result[-1].result.sample = result[0]
                return result[-1].result
            return result

        # Where the model is compiled as a whole after this, the compiler stops here.
        return MethodType(torch.compiler.disable(forward), model)  # type: ignore[no-untyped-call]

    # The layers, as they are in this call.

    def _prepare(self, model: nn.Module, device: torch.device) -> None:
        """Look at every layer that has a state in this call; what cannot take part says why, and runs as it is.

        device: that of the activations; weights may still be elsewhere.
        """
        for _, block in blocks_of(model, self.session.spec):
            state = block.__dict__.get(ATTRIBUTE)
            if state is not None:
                self._prepare_attention(block, state, device)
                self._prepare_mlp(block, state, device)

    def _prepare_attention(self, block: Any, state: LayerState, device: torch.device) -> None:
        attn = block.attn
        reason = self._attention.install(attn)
        if reason is None:
            key = (type(attn), type(attn.processor), type(attn.processor.previous), attn.fused_projections)
            if key not in self._checked:
                with _without_state(attn):
                    self._checked[key] = self._attention.why_unlike(attn, device)
            reason = self._checked[key]
        if reason is not None:
            attn.__dict__.pop(ATTRIBUTE, None)
            state.attention, state.attention_done = "dense", reason
            if not hasattr(block, "ff") and not hasattr(block, "proj_mlp"):  # the processor has the MLP too
                state.mlp, state.mlp_done = "dense", reason

    def _prepare_mlp(self, block: Any, state: LayerState, device: torch.device) -> None:
        if hasattr(block, "ff"):
            reason = self._install_whole(block.ff, device)
            modules: tuple[nn.Module, ...] = (block.ff,)
        elif hasattr(block, "proj_mlp"):
            modules = (block.proj_mlp, block.act_mlp, block.proj_out)
            reason = _install_single(*modules)
        else:
            return
        if reason is not None:
            for module in modules:
                module.__dict__.pop(ATTRIBUTE, None)
            state.mlp, state.mlp_done = "dense", reason

    def _install_whole(self, ff: Any, device: torch.device) -> str | None:
        """Let the MLP of a block run sparse; or why it cannot."""
        found = _linears_of(ff)
        if isinstance(found, str):
            return found
        first, activation, second = found
        part = ff.__dict__.get(PART)
        if part is not None and part.view.first is first and part.view.second is second:
            return None if _is_installed(ff) else _HOOKED
        key = (type(ff), activation)
        if key not in self._checked:
            with _without_state(ff):
                self._checked[key] = _why_another_mlp(ff, first, activation, second, device)
        if self._checked[key] is None:
            view = _WholeMlp(ff, first, second)
            return _install(ff, _run_whole_mlp, view, parts=f"first, {activation}, second")
        return self._checked[key]


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call but the first, `self`, as keywords: diffusers looks for the LoRA scale among those."""
    bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    del given[next(iter(given))]
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


@contextmanager
def _without_state(module: nn.Module) -> Iterator[None]:
    state = module.__dict__.pop(ATTRIBUTE, None)
    try:
        yield
    finally:
        module.__dict__[ATTRIBUTE] = state


# What stands in for a module's forward. Its class's own is called wherever no state is there.


def _run_whole_mlp(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state = state_of(self)
    if state is None or len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    part: _Part = getattr(self, PART)
    return mlp(state, part.view, args[0], parts=part.parts, of="_WholeMlp")


def _run_first_linear(self: nn.Module, x: Tensor) -> Tensor:
    state = state_of(self)
    if state is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, PART)
    return mlp_linear(state, part.view, x)


def _run_activation(self: nn.Module, x: Tensor) -> Tensor:
    state = state_of(self)
    if state is None:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, PART)
    return activate(state, part.view, x)


def _run_second_linear(self: nn.Module, x: Tensor) -> Tensor:
    """x: (B, N, C + F), or (B, N, C + K) on a sparse step: the attention's output and what the activation gave."""
    state = state_of(self)
    if state is None or state.single_mlp == "dense":
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    part: _Part = getattr(self, PART)
    return cat_linear(state, part.view, x[..., : part.attention_width], None, x[..., part.attention_width :])


for _function in (_run_whole_mlp, _run_first_linear, _run_activation, _run_second_linear):
    _function.__name__ = "forward"  # so that a pickled method is looked up as the class's own

_HOOKED = "a hook watches or changes the MLP"


def _install(module: nn.Module, function: Forward, view: nn.Module, parts: str = "", width: int = 0) -> str | None:
    """Let `function` be the module's forward, if nothing else is; or why it cannot."""
    if PART not in module.__dict__ and _is_hooked(module):
        return _HOOKED
    forward = MethodType(function, module) if PART not in module.__dict__ else module.__dict__[PART].forward
    if PART in module.__dict__ and not _is_installed(module):
        return _HOOKED
    module.__dict__[PART] = _Part(forward, view, parts, width)
    module.__dict__["forward"] = forward
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _name_of(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _is_installed(module: nn.Module) -> bool:
    """Whether our forward is the module's, and nothing else watches or changes it."""
    part = module.__dict__.get(PART)
    watched = module._forward_hooks or module._forward_pre_hooks
    return part is not None and module.__dict__.get("forward") is part.forward and not watched


def _uninstall(module: nn.Module) -> None:
    part = module.__dict__.pop(PART, None)
    if part is None:
        return
    if module.__dict__.get("forward") is part.forward:
        del module.__dict__["forward"]
    elif module.__dict__.get("_old_forward") is part.forward:  # accelerate has put its own around ours
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def _install_single(first: Any, activation: Any, second: Any) -> str | None:
    """Let the MLP of a single block of FLUX.1 run sparse, whose three pieces these are; or why it cannot."""
    for linear in (first, second):
        if type(linear) is not nn.Linear:
            return f"the linear layer is a {_name_of(linear)}"
    if type(activation) is not nn.GELU:
        return f"the activation is a {_name_of(activation)} that is not understood"
    if all(_is_current(module) for module in (first, activation, second)):
        return None
    return (
        _install(first, _run_first_linear, _view_of(first))
        or _install(activation, _run_activation, nn.GELU(activation.approximate))
        or _install(second, _run_second_linear, _view_of(second), width=second.in_features - first.out_features)
    )


def _is_current(module: Any) -> bool:
    """Whether the module is installed, with the parameters that it has now."""
    part = module.__dict__.get(PART)
    if part is None or not _is_installed(module):
        return False
    return not isinstance(module, nn.Linear) or (part.view.weight is module.weight and part.view.bias is module.bias)


def _view_of(linear: nn.Linear) -> nn.Linear:
    """Another linear layer with the same parameters."""
    view = nn.Linear(1, 1, device="meta")
    view.in_features, view.out_features = linear.in_features, linear.out_features
    view.weight, view.bias = linear.weight, linear.bias
    return view


def _linears_of(ff: Any) -> tuple[nn.Module, str, nn.Module] | str:
    """The two linears of a block's MLP and the name of the activation between them; or why they are not known."""
    kind = type(ff)
    unknown = f"the MLP is a {_name_of(ff)} that is not understood"
    if not kind.__module__.startswith("diffusers."):
        return unknown
    if kind.__name__ == "FeedForward" and len(ff.net) == 3:
        gelu, dropout, second = ff.net
        if type(gelu).__name__ != "GELU" or type(dropout) is not nn.Dropout:
            return unknown
        if _is_hooked(gelu) or _is_hooked(dropout):
            return _HOOKED
        if dropout.p > 0 and dropout.training:
            return "dropout is active in the MLP"
        return gelu.proj, "gelu_tanh" if gelu.approximate == "tanh" else "gelu", second
    if kind.__name__ in ("Flux2FeedForward", "Flux3FeedForward"):
        if type(ff.act_fn).__name__ not in ("Flux2SwiGLU", "Flux3SwiGLU"):
            return unknown
        return _HOOKED if _is_hooked(ff.act_fn) else (ff.linear_in, "swiglu", ff.linear_out)
    return unknown


def _why_another_mlp(ff: Any, first: Any, activation: str, second: Any, device: torch.device) -> str | None:
    """Why the MLP is not the three steps that Chipmunk takes it for, seen on four random rows; None if it is."""
    weight = next((p for p in ff.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2), None)
    width = getattr(first, "in_features", None)
    if weight is None or not isinstance(width, int):
        return f"the MLP is a {_name_of(ff)} that is not understood"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator)
    x = x.to(device if weight.device.type == "meta" else weight.device, weight.dtype)
    try:
        with torch.no_grad():
            theirs, ours = type(ff).forward(ff, x), second(linears.activate(activation, first(x)))
    except Exception as error:
        return f"the MLP could not be checked: {type(error).__name__}: {error}"
    if (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm():
        return None
    return f"this release's {type(ff).__name__} computes something that Chipmunk does not know"
