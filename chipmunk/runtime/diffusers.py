"""Chipmunk on a FLUX transformer of diffusers, whose code nobody has patched.

`adopt` changes one model object, never a class, a module of diffusers or the state_dict, and `release` takes all of it
back:

- attention: the layers' processors, through diffusers' own `set_processor` (`diffusers_attention.py`);
- MLPs and the model's forward: a `forward` in the object's own `__dict__` (`diffusers_mlp.py`). The model's stands
  inside accelerate's wrapper, where there is one: offloading removes and adds that at will.

Nothing is remembered about weights: before each call every layer is looked at again, so LoRA, quantisation, other
processors and offloading may come and go.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chipmunk.runtime import diffusers_mlp
from chipmunk.runtime.block_list import blocks_of
from chipmunk.runtime.find_model import ForwardSpec
from chipmunk.runtime.layer_state import ATTRIBUTE, LayerState

if TYPE_CHECKING:
    from chipmunk.runtime.session import Session

_MODELS = {
    "FluxTransformer2DModel": "transformer_blocks",
    "Flux2Transformer2DModel": "transformer_blocks",
    "Flux3Transformer2DModel": "mode_blocks.image",
}
"""Class → its first kind of block. In FLUX.3 these are the image's own, before it meets the text."""

_RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
_MAKERS = ("diffusers.", "accelerate.", "torch.", "peft.", "chipmunk.")
"""Packages whose forwards treat all tokens alike."""

_OURS = "_chipmunk_forward"
"""Attribute of the function that stands in for the forward of an adopted model."""

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


def why_unfit() -> str | None:
    """Why the installed release of diffusers cannot be worked with; None if it can."""
    if find_spec("diffusers.models.attention_dispatch") is not None:
        return None
    return f"diffusers {version('diffusers')} is older than 0.35, the first release that it works with"


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
        _forget_copied(model)
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
            diffusers_mlp.uninstall(module)

    # The model's forward.

    def _make_forward(self, model: nn.Module, call: Forward) -> MethodType:
        original = type(model).forward
        previous = self._previous
        signature = _signature(original, previous)
        adopted = self

        def inner(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, (model, *args), kwargs)
            adopted._prepare(model, given["hidden_states"].device)
            result = original(model, **given) if previous is None else previous(**given)
            whole = isinstance(getattr(result, "sample", None), torch.Tensor)  # else a class of the user's own
            return (result.sample, _Whole(result)) if whole else result

        @functools.wraps(original)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if adopted.session.model() is not self:  # a copy, or a replica on another device
                return type(self).forward(self, *args, **kwargs)
            reason = None
            if kwargs.get("kv_cache_mode") is not None:
                reason = "reference tokens are kept in a key-value cache"
            elif type(self).forward is not original:
                reason = "the forward of the model's class was replaced after Chipmunk was enabled"
            elif not _takes(signature, (self, *args), kwargs):
                reason = "the model's forward was called with other arguments than it takes"
            if reason is not None:
                recorder = adopted.session.recorder
                recorder.model_calls += 1
                recorder.dense_model_calls[reason] += 1
                return type(self).forward(self, *args, **kwargs) if previous is None else previous(*args, **kwargs)
            result = call(inner, signature, self, args, kwargs)
            if type(result) is tuple and isinstance(result[-1], _Whole):
                result[-1].result.sample = result[0]
                return result[-1].result
            return result

        # Where the model is compiled as a whole after this, the compiler stops here.
        outermost = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        setattr(outermost, _OURS, True)
        return MethodType(outermost, model)

    def why_in_order(self, model: nn.Module) -> str | None:
        """Why image tokens keep their order: a forward or processor that may know where they lie, or None.

        One that stores attention maps or features, say, for code that takes their rows for the picture's.
        """
        if self._previous is not None and not _is_known(self._previous):
            return "the model's forward is not diffusers' own"
        if not _is_known(type(model).forward):
            return f"{type(model).__name__}.forward is not diffusers' own"
        for name, block in blocks_of(model, self.session.spec):
            inner = getattr(block, "_orig_mod", block)  # compiled by the user
            for part in (inner, *inner.children()):
                if hasattr(part, "in_features"):  # a linear layer, quantised perhaps
                    continue
                forwards = (type(part).forward, part.forward, part.__dict__.get("_old_forward", part.forward))
                if not all(map(_is_known, forwards)):
                    return f"{name}: the forward of {type(part).__name__} is not diffusers' own"
                processor = getattr(part, "processor", None)
                processor = getattr(processor, "previous", processor)
                if processor is not None and not _is_known(type(processor).__call__):
                    return f"{name}: the attention processor {type(processor).__name__} is not diffusers' own"
        return None

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
            reason = self._checked_once(key, attn, lambda: self._attention.why_unlike(attn, device))
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
            reason = diffusers_mlp.install_single(*modules)
        else:
            return
        if reason is not None:
            for module in modules:
                module.__dict__.pop(ATTRIBUTE, None)
            state.mlp, state.mlp_done = "dense", reason

    def _install_whole(self, ff: Any, device: torch.device) -> str | None:
        """Let the MLP of a block run sparse; or why it cannot."""
        form = diffusers_mlp.form_of(ff)
        if isinstance(form, str):
            return form
        key = (type(ff), form.activation)
        reason = self._checked_once(key, ff, lambda: diffusers_mlp.why_unlike(ff, form, device))
        return reason or diffusers_mlp.install_whole(ff, form)

    def _checked_once(self, key: tuple[object, ...], module: nn.Module, check: Callable[[], str | None]) -> str | None:
        """What `check` says of a layer that takes no part in the call while it runs, asked once for each `key`."""
        if key not in self._checked:
            state = module.__dict__.pop(ATTRIBUTE, None)
            try:
                self._checked[key] = check()
            finally:
                module.__dict__[ATTRIBUTE] = state
        return self._checked[key]


def _forget_copied(model: nn.Module) -> None:
    """Take away what a copy or a pickle of an adopted model carries: forwards that are another one's."""
    diffusers_mlp.forget_forward(model, lambda function: getattr(function, _OURS, False))
    for module in model.modules():
        diffusers_mlp.forget_copied(module)


def _is_known(function: Any) -> bool:
    """Whether a function's code is written where all tokens are treated alike."""
    while isinstance(function, functools.partial):  # as accelerate wraps a forward
        function = function.func
    function = getattr(function, "__func__", function)
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return f"{home}.".startswith(_MAKERS)


def _signature(original: Forward, previous: Forward | None) -> inspect.Signature:
    """What the model's forward takes, the model first: its class's, or that of what was put in its place before."""
    signature = inspect.signature(original)
    if previous is None or _is_known(previous):
        return signature
    model = next(iter(signature.parameters.values()))
    own = list(inspect.signature(previous).parameters.values())
    kinds = {parameter.kind for parameter in own}
    names = {parameter.name for parameter in own}
    if "hidden_states" not in names or inspect.Parameter.VAR_POSITIONAL in kinds or model.name in names:
        return signature
    return inspect.Signature([model.replace(kind=inspect.Parameter.POSITIONAL_ONLY), *own])


def _takes(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call but the first, `self`, as keywords: diffusers looks for the LoRA scale among those."""
    bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    del given[next(iter(given))]
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given
