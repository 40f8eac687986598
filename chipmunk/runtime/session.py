"""The session of a model: its configuration, lock and running generations; and the mark that leads to it."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from chipmunk import config as configuration
from chipmunk.config import Config
from chipmunk.runtime.clock import Generation
from chipmunk.runtime.compiling import BlockCompiler
from chipmunk.runtime.counts import MAIN_SLOT, Recorder
from chipmunk.runtime.find_model import MARK, ForwardSpec, is_patched, mark_class, spec_of
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

slot_name: ContextVar[tuple[Session, str] | None] = ContextVar("chipmunk_slot", default=None)
"""The call slot that the calls of a session's model belong to now, in this thread or task."""

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
    named = slot_name.get()
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


def session_of(model: nn.Module) -> Session | None:
    """The session of a patched model, begun here if a configuration is found; None while Chipmunk is off."""
    if ATTRIBUTE in model.__dict__ and model.__dict__[ATTRIBUTE] is not None:
        return stored(model)
    spec = spec_of(model) if is_patched(model) else None  # another one is on after `enable` alone
    config = None if spec is None else find_config(spec)
    if spec is None or config is None:
        return None
    with _beginning:
        if model.__dict__.get(ATTRIBUTE) is None:
            model.__dict__[ATTRIBUTE] = Session(model, spec, config)
    return stored(model)


def stored(model: nn.Module) -> Session | None:
    """The session of a model, if one was begun on it."""
    return model.__dict__.get(ATTRIBUTE) or None


def find_config(spec: ForwardSpec) -> Config | None:
    """The configuration that the environment, the working directory or the patched repository names."""
    path = configuration.find(spec.root)
    if path is None:
        return None
    _log.info("Chipmunk is on, configured by %s", path)
    return configuration.load(path)
