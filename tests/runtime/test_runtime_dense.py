"""Where the runtime stays dense: exactly the original computation, with the reason counted."""

from __future__ import annotations

from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, build, denoise, error, inputs, same, small
from torch import Tensor, nn
from torch.nn.utils import parametrize

import chipmunk
from chipmunk.runtime.counts import Calls

pytestmark = pytest.mark.usefixtures("no_gradients")


def reasons(model: Flux, part: str, layer: int = 2) -> Calls:
    statistics = chipmunk.statistics(model).layers[layer]
    return (statistics.attention if part == "attention" else statistics.mlp)["main"]


def with_small(model: Flux, **changes: Any) -> Flux:
    chipmunk.enable(model, small(**changes))
    return model


# The whole call.


def test_autograd() -> None:
    model = with_small(build())
    with torch.enable_grad():
        got = denoise(model, 9, **inputs())
        got[-1].sum().backward()
    assert same([x.detach() for x in got], denoise(build(), 9, **inputs()))
    assert model.img_in.weight.grad is not None
    assert chipmunk.statistics(model).dense_model_calls == {"autograd is on": 9}


def test_too_few_steps() -> None:
    model = with_small(build())
    assert same(denoise(model, 4, **inputs()), denoise(build(), 4, **inputs()))
    assert chipmunk.statistics(model).dense_model_calls == {"the loop has fewer than 8 steps (min_steps)": 4}
    with_small(model, min_steps=4)
    denoise(model, 4, **inputs())
    assert reasons(model, "mlp").sparse == 3


def test_an_unknown_number_of_steps_is_enough() -> None:
    model, given = with_small(build()), inputs()
    for _ in chipmunk.steps(model, (step for step in range(4))):
        model(**given, timesteps=torch.ones(1))
    assert reasons(model, "mlp").sparse == 3


def test_meta_device() -> None:
    model = with_small(build()).to("meta")
    given = {name: tensor.to("meta") for name, tensor in inputs().items()}
    for _ in chipmunk.steps(model, range(8)):
        assert model(**given, timesteps=torch.ones(1, device="meta")).device.type == "meta"
    assert chipmunk.statistics(model).dense_model_calls == {"the model is on the meta device": 8}


def test_data_parallel_replicas() -> None:
    model, given = with_small(build()), inputs()
    for step in chipmunk.steps(nn.DataParallel(model), range(9)):
        replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["_parameters"] = model.__dict__["_parameters"]
        if step == 3:
            expected = build()(**given, timesteps=torch.ones(1))
            assert torch.equal(replica(**given, timesteps=torch.ones(1)), expected)
        model(**given, timesteps=torch.ones(1))
    assert chipmunk.statistics(model).dense_model_calls == {"a replica of the model": 1}
    assert reasons(model, "mlp").sparse == 8


def test_autocast() -> None:
    model, given = with_small(build()), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = denoise(model, 9, **given)
        assert same(got, denoise(build(), 9, **given))
    assert chipmunk.statistics(model).dense_model_calls == {"autocast to another dtype is on": 9}


# Attention.


def test_a_mask_is_passed_on_and_honoured() -> None:
    model, given = with_small(build()), inputs()
    mask = torch.ones(1, 1, 68, 68, dtype=torch.bool)
    mask[..., 1:4] = False
    options = {**given, "attn_mask": mask}
    dense = denoise(build(), 9, **options)
    assert error(dense, denoise(build(), 9, **given)) > 1e-3
    with_small(model, mlp__is_enabled=False)
    assert error(denoise(model, 9, **options), dense) < 1e-5
    assert reasons(model, "attention") == Calls(dense={"an attention mask is given": 9})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True}, "dropout, causal or grouped-query attention is asked for"),
        ({"enable_gqa": True}, "dropout, causal or grouped-query attention is asked for"),
        ({"dropout_p": 1e-9}, "dropout, causal or grouped-query attention is asked for"),
    ],
)
def test_options_of_attention(options: dict[str, Any], reason: str) -> None:
    model, given = with_small(build(), mlp__is_enabled=False, patchify__is_enabled=False), {**inputs(), **options}
    assert same(denoise(model, 9, **given), denoise(build(), 9, **given))
    assert reasons(model, "attention").dense == {reason: 9}


def test_scale_is_honoured() -> None:
    model, given = build(), {**inputs(), "scale": 0.9}
    dense = denoise(model, 12, **given)
    with_small(model, attn__top_keys=1.0, mlp__is_enabled=False)
    assert error(denoise(model, 12, **given), dense) < 1e-5
    assert reasons(model, "attention").sparse == 9


def test_keys_of_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, chipmunk_layer: Any = None) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        x = chipmunk.attention(chipmunk_layer, sdpa, q, k[:, :, :30], value=v[:, :, :30])
        return x.transpose(1, 2).flatten(2)

    monkeypatch.setattr(flux_model, "attention", attention)
    model = with_small(build(), mlp__is_enabled=False, patchify__is_enabled=False)
    assert same(denoise(model, 9, **inputs()), denoise(build(), 9, **inputs()))
    assert reasons(model, "attention").dense == {"query, key and value differ in shape": 9}


def test_another_attention_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 2

    def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, chipmunk_layer: Any = None) -> Tensor:
        return chipmunk.attention(chipmunk_layer, own, q, k, v).transpose(1, 2).flatten(2)

    monkeypatch.setattr(flux_model, "attention", attention)
    model = with_small(build(), mlp__is_enabled=False, patchify__is_enabled=False)
    assert same(denoise(model, 9, **inputs()), denoise(build(), 9, **inputs()))
    assert reasons(model, "attention").dense == {"the attention function is not one that Chipmunk knows": 9}


def test_a_callee_that_knows_nothing_of_chipmunk_works_while_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux_model, "attention", lambda q, k, v, pe: q.transpose(1, 2).flatten(2))
    denoise(build(), 2, **inputs())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn__mbm": 192}, "fewer than two query groups"),
        ({"attn__top_keys": 0.99, "attn__counts_multiple_of": 4}, "rounding keeps every key"),
        ({"attn__counts_multiple_of": 112}, "rounding keeps every key"),
        ({"attn__top_keys": 0.9, "attn__random_keys": 0.5}, "rounding keeps every key"),
        ({"attn__full_step_every": 1}, "every step is full"),
        ({"attn__first_n_dense_layers": 3}, "one of the first 3 layers"),
    ],
)
def test_attention_that_would_not_be_faster(changes: dict[str, Any], reason: str) -> None:
    model = with_small(build(), mlp__is_enabled=False, patchify__is_enabled=False, **changes)
    assert error(denoise(model, 12, **inputs())[:1], denoise(build(), 12, **inputs())[:1]) < 1e-6
    assert reasons(model, "attention") == Calls(dense={reason: 12})


# MLPs.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp__bm": 64, "mlp__mbm": 64}, "fewer than two groups of rows"),
        ({"mlp__top_keys": 0.95}, "rounding keeps every neuron"),
        ({"mlp__counts_multiple_of": 64}, "rounding keeps every neuron"),
        ({"mlp__full_step_every": 1}, "every step is full"),
        ({"mlp__first_n_dense_layers": 3}, "one of the first 3 layers"),
    ],
)
def test_mlp_that_would_not_be_faster(changes: dict[str, Any], reason: str) -> None:
    model = with_small(build(), attn__is_enabled=False, patchify__is_enabled=False, **changes)
    assert error(denoise(model, 12, **inputs())[:1], denoise(build(), 12, **inputs())[:1]) < 1e-6
    assert reasons(model, "mlp") == Calls(dense={reason: 12})


class LinearLora(nn.Linear):
    """As in the official Control LoRA: a subclass whose weight alone is not what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)


def replace_linears(model: Flux, kind: type[nn.Linear]) -> None:
    for block in [*model.double_blocks, *model.single_blocks]:
        for module in list(block.modules()):
            for name, linear in list(module.named_children()):
                if type(linear) is nn.Linear:
                    new = kind(linear.in_features, linear.out_features)
                    new.load_state_dict(linear.state_dict())
                    setattr(module, name, new)


def test_control_lora_runs_as_before_with_sparse_attention() -> None:
    model, plain = build(), build()
    replace_linears(model, LinearLora)
    replace_linears(plain, LinearLora)
    dense = denoise(plain, 12, **inputs())
    with_small(model, attn__top_keys=1.0)
    assert error(denoise(model, 12, **inputs()), dense) < 1e-5
    for layer in (2, 3):  # a double and a single block
        assert reasons(model, "attention", layer).sparse == 9
        assert reasons(model, "mlp", layer) == Calls(dense={"the linear layer is a LinearLora": 12})


def quantise(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight[:1, :1].clone(), requires_grad=False)
    linear.forward = lambda x: x.new_zeros(*x.shape[:-1], linear.out_features)  # type: ignore[method-assign]


def drop_to_integers(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter((linear.weight * 10).to(torch.int8), requires_grad=False)
    linear.register_forward_pre_hook(lambda module, args: None)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.to(x.dtype))  # type: ignore[method-assign]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, tuple[Any, str]] = {
    "forward hook": (
        lambda linear: linear.register_forward_hook(lambda module, args, out: out + 1),
        "a hook watches or changes the linear layer",
    ),
    "forward pre-hook": (
        lambda linear: linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        "a hook watches or changes the linear layer",
    ),
    "parametrization": (
        lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
        "the linear layer is a ParametrizedLinear",
    ),
    "weight of another shape": (quantise, "a hook watches or changes the linear layer"),
    "integer weight": (drop_to_integers, "a hook watches or changes the linear layer"),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("which", ["first", "second"])
def test_changed_linears_stay_what_they_are(change: str, which: str) -> None:
    apply, reason = CHANGES[change]
    models = build(), build()
    for model in models:
        double, single = model.double_blocks[2], model.single_blocks[0]
        apply(double.img_mlp[0 if which == "first" else 2])
        apply(single.linear1 if which == "first" else single.linear2)
    model, plain = models
    dense = denoise(plain, 12, **inputs())
    with_small(model, mlp__top_keys=1.0, attn__is_enabled=False)
    assert error(denoise(model, 12, **inputs()), dense) < 1e-5
    for layer in (2, 3):
        assert reasons(model, "mlp", layer) == Calls(dense={reason: 12})
    assert reasons(model, "mlp", 4).sparse == 10


def test_a_weight_without_its_shape_is_left_alone() -> None:
    from chipmunk.runtime.linears import why_not_linear

    linear, x = nn.Linear(4, 6), torch.zeros(1, 3, 4)
    assert why_not_linear(linear, x, 4) is None
    assert why_not_linear(linear, x, 5) == "the weight's shape is not (out, in)"
    assert why_not_linear(linear, x.half(), 4) == "the weight's dtype is not that of the activations"
    assert why_not_linear(nn.Linear(4, 6, device="meta"), x, 4) == "the weight is on another device"
    linear.weight.data = linear.weight.data[:1, :1]
    assert why_not_linear(linear, x, 4) == "the weight's shape is not (out, in)"
    linear.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    assert why_not_linear(linear, x, 4) == "the weight's dtype is not that of the activations"


class OddActivation(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize("activation", [nn.SiLU, OddActivation])
def test_activations_that_are_not_understood(activation: type[nn.Module]) -> None:
    models = build(), build()
    for model in models:
        model.double_blocks[2].img_mlp[1] = activation()
        model.single_blocks[0].mlp_act = activation()
    dense = denoise(models[1], 12, **inputs())
    model = with_small(models[0], mlp__top_keys=1.0, attn__is_enabled=False)
    assert error(denoise(model, 12, **inputs()), dense) < 1e-5
    for layer in (2, 3):
        assert reasons(model, "mlp", layer).dense == {
            f"the activation is a {activation.__name__} that is not understood": 12
        }


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_both_forms_of_gelu(approximate: str) -> None:
    models = build(), build()
    for model in models:
        for block in model.double_blocks:
            block.img_mlp[1] = nn.GELU(approximate=approximate)
        for block in model.single_blocks:
            block.mlp_act = nn.GELU(approximate=approximate)
    model = with_small(models[0], mlp__top_keys=1.0, attn__is_enabled=False)
    assert error(denoise(model, 12, **inputs()), denoise(models[1], 12, **inputs())) < 1e-5
    assert reasons(model, "mlp").sparse == reasons(model, "mlp", 3).sparse == 10


def test_linears_without_bias() -> None:
    models = build(), build()
    for model in models:
        for block in model.double_blocks:
            block.img_mlp[0].bias = block.img_mlp[2].bias = None
        for block in model.single_blocks:
            block.linear1.bias = block.linear2.bias = None
    model = with_small(models[0], mlp__top_keys=1.0, attn__is_enabled=False)
    assert error(denoise(model, 12, **inputs()), denoise(models[1], 12, **inputs())) < 1e-5
    assert reasons(model, "mlp").sparse == reasons(model, "mlp", 3).sparse == 10


def test_a_linear_that_changes_between_two_steps() -> None:
    """A hook appears after the full step: the layer's MLP is dense from then on, and its caches are gone."""
    models = build(), build()

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 1.5

    def change(model: Flux, step: int) -> None:
        if step == 4:
            model.double_blocks[2].img_mlp[2].register_forward_hook(hook)
            model.single_blocks[0].linear2.register_forward_hook(hook)

    dense = denoise(models[1], 12, each=lambda step: change(models[1], step), **inputs())
    model = with_small(models[0], mlp__top_keys=1.0, attn__is_enabled=False)
    got = denoise(model, 12, each=lambda step: change(model, step), **inputs())
    assert error(got, dense) < 1e-5
    for layer in (2, 3):
        assert reasons(model, "mlp", layer) == Calls(3, 1, {"a hook watches or changes the linear layer": 8})
