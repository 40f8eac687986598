"""Weights are stored transposed on a GPU only; here the layout's own device check is satisfied by a stand-in device."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from chipmunk.runtime import weight_layout


class _SayCuda(weight_layout.WeightLayout):
    """Takes the CPU for a GPU."""

    def prepare(self, blocks, device) -> None:
        class Cuda:
            type = "cuda"

            def __eq__(self, other: object) -> bool:
                return True

        super().prepare(blocks, Cuda())


def mlp(inference: bool = False) -> nn.Sequential:
    with torch.inference_mode(inference):
        return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))


def test_a_cpu_is_left_alone() -> None:
    model = mlp()
    weight_layout.WeightLayout().prepare([model], torch.device("cpu"))
    assert model[2].weight.is_contiguous()


def test_a_subclass_is_left_alone() -> None:
    class LinearLora(nn.Linear):
        pass

    linear = LinearLora(16, 4)
    _SayCuda().prepare([linear], torch.device("cpu"))
    assert linear.weight.is_contiguous()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("call_in_inference", [False, True])
def test_only_the_strides_change_and_undo_restores_them(inference: bool, call_in_inference: bool) -> None:
    model, x = mlp(inference), torch.randn(3, 4)
    parameter, before = model[2].weight, model[2].weight.detach().clone()
    layout = _SayCuda()
    with torch.inference_mode(call_in_inference), torch.no_grad():
        expected = model(x)
        layout.prepare([model], torch.device("cpu"))
        assert model[2].weight is parameter
        assert parameter.stride() == (1, 4)
        assert model[0].weight.is_contiguous()
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(parameter, before)
    with torch.inference_mode(call_in_inference), torch.no_grad():
        layout.undo()
    assert parameter.stride() == (16, 1)
    assert torch.equal(parameter, before)
    assert parameter.is_inference() == inference


def test_safetensors_saves_and_strict_loading_works() -> None:
    model = mlp()
    plain = model.state_dict()
    _SayCuda().prepare([model], torch.device("cpu"))
    saved = load(save(model.state_dict()))
    assert list(model.state_dict()) == list(plain)
    other = mlp()
    other.load_state_dict(saved, strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    for name, tensor in plain.items():
        assert torch.equal(saved[name], tensor)


def test_a_lora_merged_into_a_state_dict_arrives() -> None:
    model = mlp()
    layout = _SayCuda()
    layout.prepare([model], torch.device("cpu"))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1.0)
    expected = model[2].weight.detach().clone()
    assert expected.mean() > 0.5
    layout.prepare([model], torch.device("cpu"))  # the next image
    assert not model[2].weight.is_contiguous()
    assert torch.equal(model[2].weight, expected)


def test_a_parameter_inside_a_larger_buffer_is_left_alone() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.data = torch.zeros(100)[:64].view(4, 16)
    _SayCuda().prepare([model], torch.device("cpu"))
    assert model[2].weight.is_contiguous()


def test_training_goes_on_after_a_layout_made_in_inference_mode() -> None:
    model = mlp()
    with torch.inference_mode():
        _SayCuda().prepare([model], torch.device("cpu"))
    model(torch.randn(2, 4)).sum().backward()
    assert model[2].weight.grad is not None


def test_copies_and_pickles_are_usable() -> None:
    model, x = mlp(), torch.randn(3, 4)
    _SayCuda().prepare([model], torch.device("cpu"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        assert other.state_dict()["2.weight"].is_contiguous()
