"""The session of a model, its configuration, lock and running generations, and the way into it from user code."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from chipmunk import config as configuration
from chipmunk.config import Config
from chipmunk.runtime.block_list import blocks_of
from chipmunk.runtime.clock import Generation, run_steps
from chipmunk.runtime.compiling import BlockCompiler
from chipmunk.runtime.counts import MAIN_SLOT, Recorder, Statistics
from chipmunk.runtime.find_model import MARK, ForwardSpec, find_model, is_patched, mark_class, spec_of
from chipmunk.runtime.guards import is_exporting
from chipmunk.runtime.model_call import run_model_call
from chipmunk.runtime.timestep_clock import TimestepClock
from chipmunk.runtime.weight_layout import WeightLayout

if TYPE_CHECKING:
    from chipmunk.runtime.diffusers import Adopted
    from chipmunk.runtime.diffusers_clock import SchedulerClock

ATTRIBUTE = "_chipmunk_session"
"""Where a model keeps its session, in its `__dict__`: a `Session`, or False after `disable`."""

_log = logging.getLogger("chipmunk")

_slot_name: ContextVar[tuple[Session, str] | None] = ContextVar("chipmunk_slot", default=None)

_beginning = threading.Lock()
"""A server's first requests may come at once: one of them begins the session."""

Function = TypeVar("Function", bound=Callable[..., Any])
Item = TypeVar("Item")


class Session:
    """Chipmunk on one model. Everything that changes during a model call is guarded by the lock."""

    def __init__(self, model: nn.Module, spec: ForwardSpec, config: Config) -> None:
        self.model = weakref.ref(model)
        self.spec = spec
        self.config = config
        self.is_chosen = False
        """Whether `enable` was given the configuration, rather than it being found in a file."""
        self.lock = threading.RLock()
        self.recorder = Recorder()
        self.compiler = BlockCompiler(config.compile)
        self.compiler.prepare()
        _keep_out_of_graphs()
        self.layout = WeightLayout()
        self.installed: list[nn.Module] = []
        """The blocks that hold a state now: not empty while a sparse call runs."""
        self.keep_order: str | None = None
        """Why the order of tokens is left alone, once the model's output turned out not to be tokens."""
        self.own_features: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        """What the model itself left in its arguments while tokens were moved: a cache of features, say."""
        self.generations: weakref.WeakSet[Generation] = weakref.WeakSet()
        self.clock: TimestepClock | SchedulerClock | None = None if spec.timesteps is None else TimestepClock(self)
        """Counts steps where no sampling loop does."""
        self.adopted: Adopted | None = None
        """What was changed about a model of diffusers whose code is not patched."""
        if not is_patched(model):
            self._adopt(model)

    def _adopt(self, model: nn.Module) -> None:
        from chipmunk.runtime.diffusers import Adopted
        from chipmunk.runtime.diffusers_clock import SchedulerClock

        self.clock = SchedulerClock(self)
        self.adopted = Adopted(self, model, _call)

    def begin(self, at_most: int | None) -> Generation:
        """A sampling loop of `at_most` steps (None: unknown) starts."""
        generation = Generation(self, at_most)
        self.generations.add(generation)
        return generation

    def close(self) -> None:
        """Leave the model as it was found."""
        with self.lock:
            for generation in list(self.generations):
                generation.drop_caches()
            if self.clock is not None:
                self.clock.free()
            self.compiler.undo()
            self.layout.undo()
            model = self.model()
            if self.adopted is not None and model is not None:
                self.adopted.release(model)

    def cache_bytes(self) -> int:
        """What the caches of all running generations take."""
        slots = [slot for generation in list(self.generations) for slot in list(generation.slots.values())]
        states = [state for slot in slots for state in slot.layers if state is not None]
        caches = [cache for state in states for cache in state.caches()]
        caches += [cache for slot in slots if slot.steps is not None for cache in slot.steps.caches()]
        return sum(cache.numel() * cache.element_size() for cache in caches)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model carries no state."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def model_forward(
    *,
    double: str,
    single: str,
    image: str,
    ids: str | None = None,
    timesteps: str | None = None,
    per_token: Sequence[str] = (),
    model: str | None = None,
) -> Callable[[Function], Function]:
    """Mark the forward of a FLUX model, as a decorator.

    double, single: attributes of the model with its double and single blocks, dotted (`lists.image`) where they lie in
    a ModuleDict. image: parameter of forward with the image tokens (B, L, C). ids: parameter with their positions,
    (L, axes) or (B, L, axes); without it their order is left alone. timesteps: parameter with the timestep, one number
    for all of the batch; with it, steps are counted by its changes wherever no `steps` loop does. per_token: parameters
    that may hold something for each image token (a ControlNet's residuals); where one of them is given, the order is
    left alone. model: of a function that is given the model and is no method of it, the first parameter, annotated with
    the model's class. While Chipmunk is off, the decorated forward is the original one.
    """

    def decorate(forward: Function) -> Function:
        signature = inspect.signature(forward)
        spec = ForwardSpec(double, single, image, ids, forward.__code__.co_filename, timesteps, tuple(per_token))
        for name in (image, ids, timesteps, *per_token):
            if name is not None and name not in signature.parameters:
                raise TypeError(f"{forward.__qualname__} has no parameter {name!r}")

        call = _way_in(forward, signature, spec)
        if model is not None:
            return _decorated_function(forward, signature, model, spec, call)

        @functools.wraps(forward)
        def chipmunk_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(self, args, kwargs)

        setattr(chipmunk_forward, MARK, spec)
        return chipmunk_forward  # type: ignore[return-value]

    return decorate


def _decorated_function(
    forward: Function, signature: inspect.Signature, model: str, spec: ForwardSpec, call: Callable[..., Any]
) -> Function:
    """A function whose first parameter is the model, which may be given by its name."""
    if next(iter(signature.parameters), None) != model:
        raise TypeError(f"{model!r} is not the first parameter of {forward.__qualname__}")
    mark_class(forward, model, spec)

    @functools.wraps(forward)
    def chipmunk_function(*args: Any, **kwargs: Any) -> Any:
        if not args and model in kwargs:
            args = (kwargs.pop(model),)
        if not args or not isinstance(args[0], nn.Module):
            return forward(*args, **kwargs)
        return call(args[0], args[1:], kwargs)

    setattr(chipmunk_function, MARK, spec)
    return chipmunk_function  # type: ignore[return-value]


def _way_in(
    forward: Callable[..., Any], signature: inspect.Signature, spec: ForwardSpec
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """A call of the forward, under the model's session if it has one, also in a graph of the whole model."""

    def is_configured() -> bool:
        """Whether the model's first call would begin a session: asked once for each graph."""
        found = configuration.find(spec.root) is not None
        if found:
            _keep_out_of_graphs()
        return found

    # As torch.compiler.assume_constant_result does, which imports the whole compiler.
    is_configured._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() and not is_exporting():
            # The whole model is being compiled; getattr, so that Dynamo guards on the absence of a session.
            session = getattr(model, ATTRIBUTE, None)
            if session is False or (session is None and not is_configured()):
                return forward(model, *args, **kwargs)
            return _call_eagerly(forward, signature, model, args, kwargs)
        return _call(forward, signature, model, args, kwargs)

    return call


def _call(
    forward: Callable[..., Any],
    signature: inspect.Signature,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    session = session_of(model)
    if session is None:
        return forward(model, *args, **kwargs)
    named = _slot_name.get()
    name = named[1] if named is not None and named[0] is session else MAIN_SLOT
    return run_model_call(session, name, forward, signature, model, args, kwargs)


_call_eagerly: Callable[..., Any] = _call


def _keep_out_of_graphs() -> None:
    """Where the model is compiled as a whole, a call under a session ends the graph, which has no place for caches.

    Not done at import, which would import the whole compiler for those who leave Chipmunk off.
    """
    global _call_eagerly
    if _call_eagerly is _call:
        why = "Chipmunk is on: leave fullgraph=True out, compile the blocks instead, or call chipmunk.disable(model)"
        takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since PyTorch 2.8
        told = {"reason": why} if takes_reason else {}
        _call_eagerly = torch.compiler.disable(_call, **told)  # type: ignore[no-untyped-call]


def enable(model: Any, config: str | os.PathLike[str] | Config | Mapping[str, Any] | None = None) -> None:
    """Turn Chipmunk on for a patched model, or a FLUX transformer of diffusers, found through wrappers and pipelines.

    config: a file, a `chipmunk.config.Config`, its content as a mapping, or None: then one that was given before stays
    on; else it is the file that `CHIPMUNK_CONFIG` names, `chipmunk-config.yml` in the working directory, or the one in
    the root of the patched repository. Where there is none of them, the model stays as it is: turning off is what
    `disable` does. Raises TypeError if a configuration is given and `model` holds no patched model (where none is
    given, nothing happens: `steps` will warn), and ValueError (`chipmunk.config.ConfigError` for a file) for a wrong
    configuration.
    """
    owner = find_model(model)
    if owner is None:
        if config is None:
            _warn_of_empty_pipeline(model)
            return
        raise TypeError(
            f"{type(model).__name__} holds no model that Chipmunk knows (or several): its forward has no "
            "@chipmunk.model_forward. If it is an engine (TensorRT, --trt), no patched code runs in it: leave the "
            "engine or the configuration out. Otherwise patch its repository with: chipmunk patch PATH"
        )
    spec = spec_of(owner)
    assert spec is not None
    if config is None and not is_patched(owner):  # then the patched repository is the caller's
        spec = replace(spec, file=sys._getframe(1).f_code.co_filename)
    running = _stored(owner)
    if running is not None and running.model() is not owner:
        running = None  # of the model that this one is a shallow copy of
    chosen = None
    if config is not None:
        chosen = _read_config(config)
    elif running is None or not running.is_chosen:
        chosen = _find_config(spec)
    if chosen is not None or running is None:
        _take_away(owner)
    if chosen is not None and (unfit := _why_unfit(owner)) is not None:
        message = f"Chipmunk: {type(owner).__name__} runs dense, as ever: {unfit}. Update it, or leave Chipmunk out."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return
    if chosen is not None:
        running = owner.__dict__[ATTRIBUTE] = Session(owner, spec, chosen)
        running.is_chosen = config is not None
    if running is not None and running.adopted is not None:
        running.adopted.set_aside(model)


def _why_unfit(model: nn.Module) -> str | None:
    """Why a model of diffusers, whose code is not patched, has to stay as it is."""
    if is_patched(model):
        return None
    from chipmunk.runtime.diffusers import why_unfit

    return why_unfit()


def _warn_of_empty_pipeline(model: Any) -> None:
    """Say that `enable` came before a modular pipeline of diffusers was given its transformer."""
    if getattr(model, "transformer", model) is None and configuration.find(None) is not None:
        warnings.warn(
            f"Chipmunk: {type(model).__name__} has no transformer yet, so nothing was enabled. Call chipmunk.enable "
            "after load_components().",
            RuntimeWarning,
            stacklevel=3,
        )


def disable(model: Any) -> None:
    """Turn Chipmunk off: every inserted call is the original expression again, whatever configuration files exist."""
    owner = find_model(model)
    if owner is not None:
        _take_away(owner)
        if is_patched(owner):
            owner.__dict__[ATTRIBUTE] = False


def statistics(model: Any) -> Statistics:
    """What ran sparse and what stayed dense, and why, since Chipmunk was enabled on this model; `print` it."""
    owner = find_model(model)
    session = None if owner is None else _stored(owner)
    if owner is None or session is None:
        return Statistics(enabled=False)
    names = [name for name, _ in blocks_of(owner, session.spec)]
    with session.lock:
        return session.recorder.report(f"{type(owner).__name__}.forward", names, session.cache_bytes())


def steps(model: Any, iterable: Iterable[Item]) -> Iterable[Item]:
    """The iterable of a sampling loop, one item a denoising step, tied to `model`.

    While Chipmunk is off, the iterable itself; otherwise a generator: the caches of all model calls made between two
    items belong to it, and are freed when the loop ends, by `break` or an exception too.
    """
    owner = find_model(model)
    if owner is None:
        _warn_of_no_model(model)
        return iterable
    session = session_of(owner)
    return iterable if session is None else run_steps(session, iterable)


def _warn_of_no_model(model: Any) -> None:
    """Say that a loop runs without Chipmunk although there is a configuration: its model has no patched code."""
    path = configuration.find(None)
    if path is not None:
        warnings.warn(
            f"Chipmunk: {path} has no effect on this sampling loop: no patched code runs in its model, a "
            f"{type(model).__name__} (an engine of TensorRT, --trt, say). It runs as it did without Chipmunk.",
            RuntimeWarning,
            stacklevel=3,
        )


def slot(model: Any, name: str) -> Any:
    """The model, to be called from another place in the same step: `chipmunk.slot(model, "negative")(…)`.

    Each name has caches of its own. Returns the model itself while Chipmunk is off.
    """
    owner = find_model(model)
    session = None if owner is None else session_of(owner)
    if session is None:
        return model
    tagged = (session, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        token = _slot_name.set(tagged)
        try:
            return model(*args, **kwargs)
        finally:
            _slot_name.reset(token)

    return call


def session_of(model: nn.Module) -> Session | None:
    """The session of a patched model, begun here if a configuration is found; None while Chipmunk is off."""
    if ATTRIBUTE in model.__dict__ and model.__dict__[ATTRIBUTE] is not None:
        return _stored(model)
    spec = spec_of(model) if is_patched(model) else None  # another one is on after `enable` alone
    config = None if spec is None else _find_config(spec)
    if spec is None or config is None:
        return None
    with _beginning:
        if model.__dict__.get(ATTRIBUTE) is None:
            model.__dict__[ATTRIBUTE] = Session(model, spec, config)
    return _stored(model)


def _stored(model: nn.Module) -> Session | None:
    return model.__dict__.get(ATTRIBUTE) or None


def _take_away(model: nn.Module) -> None:
    session = _stored(model)
    model.__dict__.pop(ATTRIBUTE, None)
    if session is not None and session.model() is model:
        session.close()


def _find_config(spec: ForwardSpec) -> Config | None:
    path = configuration.find(spec.root)
    if path is None:
        return None
    _log.info("Chipmunk is on, configured by %s", path)
    return configuration.load(path)


def _read_config(config: str | os.PathLike[str] | Config | Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config.model_validate(dict(config))
    return configuration.load(Path(config))
