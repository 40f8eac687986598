"""Finding the patched model inside whatever the sampling code calls "the model"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

MARK = "__chipmunk__"
"""Attribute of a decorated forward: its `ForwardSpec`."""


@dataclass(frozen=True)
class ForwardSpec:
    """What `model_forward` was told about a model's forward."""

    double: str
    """Attribute of the model with the double blocks, dotted where they lie in a ModuleDict."""
    single: str
    image: str
    """Parameter of forward with the image tokens (B, L, …)."""
    ids: str | None
    """Parameter of forward with their positions; None where another spatial input forbids reordering."""
    file: str
    """Where the forward is written."""
    timesteps: str | None = None
    """Parameter of forward with the timestep; None where only marked sampling loops count steps."""
    per_token: tuple[str, ...] = ()
    """Parameters of forward: where one is given, tokens keep their order."""

    @property
    def root(self) -> Path | None:
        """The patched repository: the nearest folder above the forward's file that holds `.chipmunk/`."""
        return _root_of(self.file)


@cache
def _root_of(file: str) -> Path | None:
    return next((folder for folder in Path(file).absolute().parents if (folder / ".chipmunk").is_dir()), None)


def spec_of(model: object) -> ForwardSpec | None:
    """The spec of a model's forward: a decorated one, or that of a transformer of diffusers; None for other objects."""
    if not isinstance(model, nn.Module):
        return None
    return _spec_of_class(type(model)) or _spec_without_mark(type(model))  # type: ignore[arg-type]


def is_patched(model: nn.Module) -> bool:
    """Whether the code of the model's class is patched; a transformer of diffusers that is not has to be adopted."""
    return _spec_of_class(type(model)) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _spec_of_class(kind: type) -> ForwardSpec | None:
    # The whole ancestry, under any name: a subclass may override forward and call the decorated one.
    specs = (getattr(member, MARK, None) for base in kind.__mro__ for member in vars(base).values())
    marked = next((spec for spec in specs if isinstance(spec, ForwardSpec)), None)
    return marked or next((_by_function[base] for base in kind.__mro__ if base in _by_function), None)


_by_function: WeakKeyDictionary[type, ForwardSpec] = WeakKeyDictionary()
"""Classes whose work is done in a decorated function that is given the model."""


def mark_class(function: Callable[..., Any], parameter: str, spec: ForwardSpec) -> None:
    """Note that a decorated function does the work of the class that its parameter is annotated with."""
    annotation: Any = function.__annotations__.get(parameter)
    if isinstance(annotation, str):  # from __future__ import annotations
        first, *rest = annotation.split(".")
        annotation = getattr(function, "__globals__", {}).get(first)
        for name in rest:
            annotation = getattr(annotation, name, None)
    if isinstance(annotation, type):
        _by_function[annotation] = spec
        _spec_of_class.cache_clear()


@lru_cache(maxsize=256)
def _spec_without_mark(kind: type) -> ForwardSpec | None:
    if not any(base.__module__.startswith("diffusers.") for base in kind.__mro__):
        return None
    from chipmunk.runtime.diffusers import spec_of_class

    return spec_of_class(kind)


def find_model(model: object) -> nn.Module | None:
    """The patched model itself, from it or a wrapper around it; None if there is none, or more than one.

    Wrappers: `torch.compile`, DataParallel, DistributedDataParallel, FSDP, bound methods, partial functions, modules
    and plain objects (pipelines) that hold exactly one patched model.
    """
    model = _unwrapped(model)
    if isinstance(model, nn.Module) and spec_of(model) is not None:
        return model
    candidates = model.modules() if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).values()
    unwrapped = [_unwrapped(c) if isinstance(c, nn.Module) else c for c in candidates]
    found = [candidate for candidate in unwrapped if isinstance(candidate, nn.Module) and spec_of(candidate)]
    return found[0] if found and all(candidate is found[0] for candidate in found) else None


def _unwrapped(model: object) -> object:
    for _ in range(16):  # no real stack of wrappers is deeper, and a cycle ends here
        if isinstance(model, nn.Module) and spec_of(model) is not None:
            break
        inner = [attribute for attribute in map(partial(_attribute, model), _WRAPPED_IN) if attribute is not None]
        if not inner:
            break
        model = inner[0]
    return model


_WRAPPED_IN = ("_orig_mod", "module", "_fsdp_wrapped_module", "__self__", "func")


def _attribute(model: object, name: str) -> object | None:
    try:
        inner: object = getattr(model, name, None)
    except Exception:  # a property of user code
        return None
    return inner if isinstance(inner, nn.Module) or (name == "func" and callable(inner)) else None
