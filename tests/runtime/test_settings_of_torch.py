"""Settings of PyTorch that hold for the whole process: default device and dtype, hooks of all modules."""

from __future__ import annotations

import pytest
import torch
from flux_model import Flux, denoise, error, inputs, same, small
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from two_blocks import STEPS, build, call, enabled, fresh

import chipmunk

pytestmark = pytest.mark.usefixtures("no_gradients")


class Clocked(Flux):
    @chipmunk.model_forward(
        double="double_blocks", single="single_blocks", image="img", ids="img_ids", timesteps="timesteps"
    )
    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward.__wrapped__(self, img, img_ids, txt, txt_ids, timesteps)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", [Flux, Clocked])
def test_a_default_device_that_is_not_the_models(kind: type[Flux]) -> None:
    """As `torch.set_default_device("cuda")` with ids, or a whole model, on the CPU; nothing can be read from `meta`."""
    model, alone, given = build(kind=kind), build(kind=kind), inputs()
    times = [torch.full((1,), 1 - step / STEPS) for step in range(STEPS)]
    loop = chipmunk.steps if kind is Flux else lambda _, steps: steps
    got: dict[str, list[Tensor]] = {}
    for device, each in (("meta", model), ("cpu", alone)):
        chipmunk.enable(each, small())
        with torch.device(device):
            got[device] = [each(**given, timesteps=times[step]) for step in loop(each, range(STEPS))]
    assert same(got["meta"], got["cpu"])
    assert chipmunk.statistics(model).token_order == chipmunk.statistics(alone).token_order
    assert not chipmunk.statistics(model).dense_model_calls


def test_a_default_dtype() -> None:
    given = inputs()
    times = [torch.full((1,), 1 - step / STEPS) for step in range(STEPS)]
    model, alone = enabled(), enabled()
    expected = [alone(**given, timesteps=times[step]) for step in chipmunk.steps(alone, range(STEPS))]
    torch.set_default_dtype(torch.float64)
    try:
        got = [model(**given, timesteps=times[step]) for step in chipmunk.steps(model, range(STEPS))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(got, expected)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("which", [nn.Linear, nn.GELU])
def test_a_hook_of_all_modules_is_honoured(kind: str, which: type[nn.Module]) -> None:
    def change(module: nn.Module, *tensors: object) -> object:
        last = tensors[-1]
        if not isinstance(module, which):
            return None
        last = last[0] if isinstance(last, tuple) else last
        assert isinstance(last, Tensor)
        return last * 1.05

    register = getattr(all_modules, f"register_module_{kind}_hook")
    model, plain, given = enabled(attn__top_keys=1.0, mlp__top_keys=1.0), build(), inputs()
    before = denoise(model, STEPS, **given)
    handle = register(change)
    try:
        got, expected = denoise(model, STEPS, **given), denoise(plain, STEPS, **given)
    finally:
        handle.remove()
    assert error(got, expected) < 1e-5
    assert not same(got, before)
    assert same(denoise(model, STEPS, **given), before)


def test_a_hook_of_all_modules_in_the_middle_of_a_picture() -> None:
    model, plain, given = enabled(attn__top_keys=1.0, mlp__top_keys=1.0), build(), inputs()
    got, expected = [], []
    for step in chipmunk.steps(model, range(STEPS)):
        handle = None
        if step in (4, 5):
            handle = all_modules.register_module_forward_hook(
                lambda module, args, out: out * 1.05 if isinstance(module, nn.Linear) else None
            )
        got.append(call(model, step, given))
        expected.append(call(plain, step, given))
        if handle is not None:
            handle.remove()
    assert error(got, expected) < 1e-5
    assert same(denoise(enabled(), STEPS, **given), fresh(given))


def test_random_numbers_are_left_to_the_user() -> None:
    model, plain, given = enabled(mlp__random_keys=0.1, attn__random_keys=0.1), build(), inputs()
    drawn = []
    for each in (model, plain):
        torch.manual_seed(3)
        denoise(each, STEPS, **given)
        drawn.append(torch.rand(5))
    assert torch.equal(*drawn)
