"""cache-dit on a FLUX model of plain modules, as a rival to compare with; the package `cache_dit` is not Chipmunk's.

cache-dit finds blocks by the names and argument names of diffusers. A stand-in has those; while it is on, the model's
own lists of blocks hand every call to it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

DOUBLES, SINGLES = "transformer_blocks", "single_transformer_blocks"


class _Double(nn.Module):
    """A double block with the argument names of diffusers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.block(img=hidden_states, txt=encoder_hidden_states, **kwargs)


class _Single(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.block(hidden_states, **kwargs)


class _StandIn(nn.Module):
    """What cache-dit takes for the transformer."""

    def __init__(self, doubles: nn.ModuleList, singles: nn.ModuleList) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(map(_Double, doubles))
        self.single_transformer_blocks = nn.ModuleList(map(_Single, singles))

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class _DoubleDoor(nn.Module):
    """Stands in the model's list of double blocks and runs whatever cache-dit has put in their place."""

    def __init__(self, inner: Callable[[], _StandIn]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, img: Tensor, txt: Tensor, **kwargs: Any) -> Any:
        for block in getattr(self.inner(), DOUBLES):
            img, txt = block(img, txt, **kwargs)
        return img, txt


class _SingleDoor(nn.Module):
    def __init__(self, inner: Callable[[], _StandIn]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, img: Any, **kwargs: Any) -> Any:
        for block in getattr(self.inner(), SINGLES):
            out = block(img, **kwargs)
            img = out[0] if isinstance(out, tuple) else out
        return img


@contextmanager
def cached(
    model: nn.Module, double: str, single: str, steps: int, settings: dict[str, Any]
) -> Iterator[Callable[[], None]]:
    """While this is open, `model` runs under cache-dit; yields what to call before each picture of `steps` steps.

    double, single: attributes of the model with its blocks. settings: of `DBCacheConfig`, and `taylorseer_order`.
    """
    cache_dit: Any = importlib.import_module("cache_dit")
    given = dict(settings)
    order = given.pop("taylorseer_order", None)
    config = cache_dit.DBCacheConfig(num_inference_steps=steps, **given)
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    doubles, singles = getattr(model, double), getattr(model, single)
    stand_in = _StandIn(doubles, singles)
    adapter = cache_dit.BlockAdapter(
        transformer=stand_in,
        blocks=[stand_in.transformer_blocks, stand_in.single_transformer_blocks],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_0, cache_dit.ForwardPattern.Pattern_3],
        check_forward_pattern=False,
        has_separate_cfg=False,
    )
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    forward = model.forward
    setattr(model, double, nn.ModuleList([_DoubleDoor(lambda: stand_in)]))
    setattr(model, single, nn.ModuleList([_SingleDoor(lambda: stand_in)]))

    @functools.wraps(forward)
    def through_stand_in(*args: Any, **kwargs: Any) -> Any:
        return stand_in(lambda: forward(*args, **kwargs))

    model.forward = through_stand_in
    try:
        yield lambda: cache_dit.refresh_context(stand_in, num_inference_steps=steps)
    finally:
        del model.forward
        setattr(model, double, doubles)
        setattr(model, single, singles)
        cache_dit.disable_cache(adapter)
