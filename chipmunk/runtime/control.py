"""What users and patched loops call: Chipmunk on and off, steps, slots, statistics."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from chipmunk import config as configuration
from chipmunk.config import Config
from chipmunk.runtime.block_list import blocks_of
from chipmunk.runtime.clock import run_steps
from chipmunk.runtime.counts import Statistics
from chipmunk.runtime.find_model import find_model, is_patched, spec_of
from chipmunk.runtime.session import ATTRIBUTE, Session, find_config, session_of, slot_name, stored

Item = TypeVar("Item")


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
    running = stored(owner)
    if running is not None and running.model() is not owner:
        running = None  # of the model that this one is a shallow copy of
    chosen = None
    if config is not None:
        chosen = _read_config(config)
    elif running is None or not running.is_chosen:
        chosen = find_config(spec)
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
    session = None if owner is None else stored(owner)
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
        token = slot_name.set(tagged)
        try:
            return model(*args, **kwargs)
        finally:
            slot_name.reset(token)

    return call


def _take_away(model: nn.Module) -> None:
    session = stored(model)
    model.__dict__.pop(ATTRIBUTE, None)
    if session is not None and session.model() is model:
        session.close()


def _read_config(config: str | os.PathLike[str] | Config | Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config.model_validate(dict(config))
    return configuration.load(Path(config))
