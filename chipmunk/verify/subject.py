"""The model under test and the ways to run it: built by the target, driven by the repository's own loops or ours."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.rewrite.plan import LoopFacts
from chipmunk.verify.building import BuildError, installed_object, load_file, randomise, refuse_large
from chipmunk.verify.checkout import Checkout, CheckoutError
from chipmunk.verify.drawn import Drawn, loop_at, record, unwrapped
from chipmunk.verify.placeholders import missing_base, to_install
from chipmunk.verify.skeleton import skeleton
from chipmunk.verify.spec import IMAGES, LARGE_IMAGES, Image, Scenario, Spec

TWO_SLOTS = "two call slots"
OWN_LOOP = "own loop"

Steps = Callable[[Any, Any], Any]
Slot = Callable[[Any, str], Any]


class OtherModelError(Exception):
    """The factory returned a model of another class."""


class Subject:
    """Everything about one side that does not depend on Chipmunk."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.facts = spec.facts
        self.checkout = Checkout(spec.root)
        self.target = load_file(spec.target, "chipmunk_verify_target")
        self.notes: list[str] = []
        self.extra: dict[str, Any] = {}
        """Arguments of the model's forward that only the factory knows."""
        if hasattr(self.target, "prepare"):
            self.target.prepare(self.checkout.load, self.facts.file, spec.device)
        find = installed_object if self.facts.installed else self.checkout.object
        self.model_class: type[nn.Module] = find(self.facts.file, self.facts.name)
        if (package := missing_base(self.model_class)) is not None:
            raise CheckoutError(
                f"{self.facts.name} inherits from a class of '{package}', which is not installed for {sys.executable}",
                to_install(package),
            )
        self.loops = self._load_loops()
        self._models: dict[str, nn.Module] = {}
        self._calls: ModuleType = self.target
        """Whose `inputs` and `call` are used: the target's, or those beside a factory."""
        self.model("model")
        self.subclasses = self._find_subclasses()
        self.checkout.placeholders.arm()

    # Models.

    def model(self, name: str) -> nn.Module:
        """`model`, `channels`, or a subclass by name; the same instance each time. Raises BuildError."""
        if name not in self._models:
            try:
                model = self._build(name)
            except (CheckoutError, OtherModelError):
                raise
            except (BuildError, self.target.CannotRun) as error:
                raise BuildError(str(error), self.skeleton(calls=False)) from error
            except Exception as error:
                if name == "model" and self.spec.factory is not None:
                    raise  # the user's own code: its trace says more
                says = f"{self.facts.name} cannot be built: {type(error).__name__}: {error}"
                raise BuildError(says, self.skeleton(calls=False)) from error
            self._models[name] = self._callable(model.to(self.spec.device).eval().requires_grad_(False))
        return self._models[name]

    def _callable(self, model: nn.Module) -> nn.Module:
        """The model, with the function that does its work as its `forward`, where that is not a method of it."""
        if self.facts.receiver is not None:
            assert self.facts.forward_file is not None
            function = self.checkout.object(self.facts.forward_file, self.facts.forward)
            vars(model)["forward"] = functools.partial(function, **{self.facts.receiver: model})
        return model

    def skeleton(self, calls: bool) -> str:
        """A file for the user to complete: it builds the model, unless a factory does; with `calls` it calls it too."""
        return skeleton(self.model_class, calls, self.target.SMALL, builds=self.spec.factory is None)

    def in_dtype(self, name: str, dtype: torch.dtype) -> str:
        """The name of a copy of a model in another dtype."""
        copy_name = f"{name}, {str(dtype).removeprefix('torch.')}"
        if copy_name not in self._models:
            self._models[copy_name] = self._callable(copy.deepcopy(self.model(name)).to(dtype))
        return copy_name

    def _build(self, name: str) -> nn.Module:
        model: nn.Module
        if name == "model" and self.spec.factory is not None:
            model = self._from_factory(self.spec.factory)
            randomise(model, self.spec.seed)
            return model
        if name == "model" and self.spec.weights is not None:
            from safetensors.torch import load_file as load_tensors

            tensors = load_tensors(self.spec.weights)
            values = self.target.values_of({key: tuple(tensor.shape) for key, tensor in tensors.items()})
            model = self.target.build(self.model_class, values)
            model.load_state_dict(tensors, strict=True)
            return model.float()
        values = dict(self.target.SMALL)
        if name == "channels":
            values["in_channels"] += 8
        model_class = next((c for c in getattr(self, "subclasses", ()) if c.__name__ == name), self.model_class)
        with refuse_large(model_class.__name__, self.target.NAME):
            model = self.target.build(model_class, values)
        randomise(model, self.spec.seed)
        return model

    def _from_factory(self, factory: str) -> nn.Module:
        module_name, _, function = factory.partition(":")
        if self.spec.factory_folder is not None:
            sys.path.append(str(self.spec.factory_folder))
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            where = f"{self.spec.factory_folder} or the repository"
            raise CheckoutError(f"--factory {factory}: there is no module {error.name} in {where}") from error
        made = getattr(module, function or "build")()
        model, self.extra = made if isinstance(made, tuple) else (made, {})
        if not isinstance(model, self.model_class):
            where = f"{type(model).__name__} of {sys.modules[type(model).__module__].__file__}"
            raise OtherModelError(f"{factory} returned a {where}, not the {self.facts.name} of {self.facts.file}")
        if hasattr(module, "inputs") and hasattr(module, "call"):
            self._calls = module
        return model

    def _find_subclasses(self) -> list[type[nn.Module]]:
        """Classes beside the model's own that derive from it and can be built: a LoRA wrapper, say."""
        if self.spec.factory is not None or self.spec.weights is not None:
            return []
        found = []
        for other in vars(sys.modules[self.model_class.__module__]).values():
            if isinstance(other, type) and issubclass(other, self.model_class) and other is not self.model_class:
                try:
                    with refuse_large(other.__name__, self.target.NAME):
                        self.target.build(other, self.target.SMALL)
                except Exception as error:
                    self.notes.append(f"{other.__name__} was not tried: {error}")
                else:
                    found.append(other)
        return found

    # Loops and scenarios.

    def _load_loops(self) -> list[tuple[LoopFacts, Callable[..., Any], tuple[str, ...]] | None]:
        """Each of the repository's loops with its function and variants; None for one that cannot be run by itself."""
        found: list[tuple[LoopFacts, Callable[..., Any], tuple[str, ...]] | None] = []
        reasons: dict[str, list[str]] = {}
        for loop in self.facts.loops:
            reason = "its model is no parameter of it" if loop.model_parameter is None else None
            if reason is None:
                try:
                    function = self.checkout.object(loop.file, loop.function)
                    found.append((loop, function, self.target.loop_variants(function, loop.model_parameter)))
                    continue
                except (self.target.CannotRun, AttributeError, CheckoutError) as error:
                    reason = str(error)
            reasons.setdefault(reason, []).append(f"{loop.function} ({loop.file}:{loop.line})")
            found.append(None)
        for reason, where in reasons.items():
            others = f" and {len(where) - 1} more" if where[1:] else ""
            self.notes.append(f"the loop in {where[0]}{others} was not run: {reason}")
        return found

    def scenarios(self) -> list[Scenario]:
        """What is run, in order. Both sides come to the same list, because signatures do not change."""
        if self.spec.weights is not None:
            for index, entry in enumerate(self.loops):
                if entry is not None:
                    way = "channels" if "channels" in entry[2] and self._takes_more_channels("model") else entry[2][0]
                    return [Scenario(entry[0].function, "model", LARGE_IMAGES, "default", index, way)]
            return [self.own_loop()]
        found: list[Scenario] = []
        names = Counter(entry[0].function for entry in self.loops if entry is not None)
        for index, entry in enumerate(self.loops):
            if entry is None:
                continue
            loop, _, variants = entry
            function = loop.function if names[loop.function] == 1 else f"{loop.function} of {loop.file}"
            for variant in variants:
                if variant == "channels" and not self._takes_more_channels("channels"):
                    continue
                name = function if variant == "plain" else f"{function}, {variant}"
                model = "channels" if variant == "channels" else "model"
                images = IMAGES if not found else IMAGES[:1]
                found.append(Scenario(name, model, images, "default", index, variant))
        if not found or OWN_LOOP in self.spec.only:
            found.append(self.own_loop())
        # two of one size, so that the second would notice caches of the first
        found.append(Scenario(TWO_SLOTS, "model", (Image(1, 9, 10, 19, 14), Image(1, 9, 10, 19, 8)), "other"))
        found += [Scenario(c.__name__, c.__name__, IMAGES[1:], "default") for c in self.subclasses]
        chosen = [scenario for scenario in found if not self.spec.only or scenario.name in self.spec.only]
        if not chosen:
            known = ", ".join(scenario.name for scenario in found)
            raise BuildError(f"there is no scenario called {', '.join(self.spec.only)}; there are: {known}")
        return chosen

    def own_loop(self) -> Scenario:
        """What is run where none of the repository's loops can be."""
        return Scenario(OWN_LOOP, "model", IMAGES if self.spec.weights is None else LARGE_IMAGES, "default")

    def _takes_more_channels(self, name: str) -> bool:
        """Whether the model takes more channels in than it gives out; False too if it cannot be built."""
        try:
            parameters = self.model(name).named_parameters()
            values = self.target.values_of({name: tuple(parameter.shape) for name, parameter in parameters})
        except (BuildError, self.target.CannotRun):
            return False
        return bool(values["in_channels"] > values["out_channels"])

    # Running.

    def draw(self, scenario: Scenario, index: int, steps: Steps, slot: Slot) -> Drawn:
        """Run one image of a scenario. `steps` and `slot` are the runtime's, or stand-ins that do nothing."""
        model, image = self.model(scenario.model), scenario.images[index]
        generator = torch.Generator().manual_seed(1000 * self.spec.seed + 10 * index + 1)
        size = (image.batch, image.height, image.width, image.text, generator)
        entry = None if scenario.loop is None else self.loops[scenario.loop]
        given = self._inputs(entry is None, model, *size, reference=scenario.variant == "reference")
        other = self._inputs(entry is None, model, *size)
        times = [1 - step / image.steps for step in range(image.steps + 1)]
        drawn = Drawn()
        with torch.no_grad():
            if entry is None:
                loop: Callable[..., Tensor] = self._two_slots if scenario.name == TWO_SLOTS else self._own_loop
                with record(model, loop.__func__.__code__, drawn):  # type: ignore[attr-defined]
                    drawn.latents = loop(model, given, other, times, steps, slot)
            else:
                facts, function, _ = entry
                if scenario.variant == "cfg":
                    given |= {f"neg_{name}": other[name] for name in ("txt", "txt_ids", "vec")}
                with record(model, unwrapped(function).__code__, drawn, self._head(facts)):
                    drawn.latents = self.target.run_loop(
                        function, facts.model_parameter, model, given, times, scenario.variant
                    )
        return drawn

    def _head(self, loop: LoopFacts) -> ast.For | None:
        """The sampling loop itself, where its line is known: in the original."""
        if self.spec.side != "original":
            return None
        return loop_at((self.checkout.root / loop.file).read_bytes(), loop.line)

    def _own_loop(
        self,
        model: nn.Module,
        given: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        times: Sequence[float],
        steps: Steps,
        slot: Slot,
    ) -> Tensor:
        """Euler steps with one call of the model each."""
        image = given["img"]
        for now, after in steps(model, list(itertools.pairwise(times))):
            image = image + (after - now) * self._call(model, model, {**given, "img": image}, now)
        return image

    def _two_slots(
        self,
        model: nn.Module,
        given: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        times: Sequence[float],
        steps: Steps,
        slot: Slot,
    ) -> Tensor:
        """Euler steps that from the third on also call the model with another text, through a call slot of its own."""
        image = given["img"]
        for index, (now, after) in steps(model, enumerate(list(itertools.pairwise(times)))):
            velocity = self._call(model, model, {**given, "img": image}, now)
            if index >= 2:
                prompt = {name: other[name] for name in ("txt", "vec", "state") if name in other}
                second = self._call(slot(model, "second"), model, {**given, **prompt, "img": image}, now)
                velocity = second + 1.5 * (velocity - second)
            image = image + (after - now) * velocity
        return image

    def _inputs(self, own_loop: bool, model: nn.Module, *size: Any, **options: Any) -> dict[str, Any]:
        """Random arguments; of one of the repository's loops, whatever a factory says, as the target knows them."""
        module = self._calls if own_loop else self.target
        if "extra" in inspect.signature(module.inputs).parameters:
            options["extra"] = self.extra
        try:
            given: dict[str, Any] = module.inputs(model, *size, **options)
        except self.target.CannotRun as error:
            raise BuildError(str(error), self.skeleton(calls=True)) from error
        return given

    def _call(self, called: Any, model: nn.Module, given: Mapping[str, Tensor], time: float) -> Tensor:
        try:
            velocity: Tensor = self._calls.call(called, model, given, time, self.extra)
        except self.target.CannotRun as error:
            raise BuildError(str(error), self.skeleton(calls=True)) from error
        return velocity
