"""The model that is timed and the sampling loop that draws with it, both the repository's own."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.bench.device import CannotTime, need_memory
from chipmunk.bench.spec import Spec
from chipmunk.verify.building import installed_object, load_file, randomise
from chipmunk.verify.checkout import Checkout


@dataclass(frozen=True)
class Loop:
    """The repository's own sampling loop, called through its target."""

    target: ModuleType
    function: Callable[..., Any]
    parameter: str
    """Name of the parameter that takes the model."""
    variant: str

    def inputs(self, model: nn.Module, spec: Spec, width: int, height: int, seed: int) -> dict[str, Tensor]:
        """Random arguments of one picture."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Tensor] = self.target.inputs(
            model, spec.batch, height // 16, width // 16, spec.text_tokens, generator
        )
        return given

    def __call__(self, model: nn.Module, given: dict[str, Tensor], times: Sequence[float]) -> Tensor:
        result: Tensor = self.target.run_loop(self.function, self.parameter, model, given, times, self.variant)
        return result


def build(spec: Spec) -> tuple[nn.Module, Loop]:
    """The repository's model with random or given weights, and its sampling loop."""
    checkout, target = Checkout(spec.root), load_file(spec.target, "chipmunk_bench_target")
    if hasattr(target, "prepare"):
        target.prepare(checkout.load, spec.facts.file, spec.device)
    find = installed_object if spec.facts.installed else checkout.object
    model_class = find(spec.facts.file, spec.facts.name)
    dtype = getattr(torch, spec.dtype)
    torch.set_default_dtype(dtype)
    tensors: dict[str, Tensor] | None = None
    values = size_of(spec, target, model_class)
    if spec.weights is not None:
        from safetensors.torch import load_file as load_tensors

        tensors = load_tensors(spec.weights)
        values = target.values_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    values = {**values, **spec.overrides}
    need_memory(spec, lambda: target.build(model_class, values))
    with torch.device(spec.device):
        model: nn.Module = target.build(model_class, values)
    torch.set_default_dtype(torch.float32)
    if tensors is None:
        randomise(model, spec.seed)
    else:
        model.load_state_dict(tensors, strict=True)
    if spec.facts.installed:  # its loops are pipelines, which run with their encoders alone
        return model.eval().requires_grad_(False), Loop(target, target.sample, "model", "plain")
    why = []
    for facts in spec.facts.loops:
        if facts.model_parameter is None:
            why.append(f"{facts.file}:{facts.line} {facts.function}: its model is no parameter of it")
            continue
        function = checkout.object(facts.file, facts.function)
        parameter = facts.model_parameter
        try:
            variant = target.loop_variants(function, parameter)[0]
        except target.CannotRun as error:
            why.append(f"{facts.file}:{facts.line} {facts.function}: {error}")
            continue
        checkout.placeholders.arm()
        return model.eval().requires_grad_(False), Loop(target, function, parameter, variant)
    instead = (
        f"chipmunk fidelity {shlex.quote(str(spec.root))} --device {spec.device}" if spec.side == "patched" else None
    )
    reason = "; ".join(["No sampling loop of this repository can be run by itself", *why])
    raise CannotTime("build", reason, instead if spec.side == "patched" else None)


def size_of(spec: Spec, target: ModuleType, model_class: type[nn.Module]) -> dict[str, Any]:
    """Constructor arguments of the model that is to be built."""
    named: Callable[..., dict[str, Any]] | None = getattr(target, "named", None)
    small: dict[str, Any] = target.SMALL
    full: dict[str, Any] = target.FULL
    if spec.model is None and torch.device(spec.device).type == "cpu":
        return small
    again = f"chipmunk bench {shlex.quote(str(spec.root))}" if spec.side == "patched" else None
    if named is not None:
        try:
            return named(model_class, spec.model)
        except target.CannotRun as error:
            known: Sequence[str] = getattr(error, "known", ())
            raise CannotTime("build", str(error), again and " --model ".join([again, *known[:1]])) from error
    if spec.model is not None:
        raise CannotTime("build", f"target '{target.NAME}' knows no models by name", again)
    return full
