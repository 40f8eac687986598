"""One side of a verification, in a process of its own: `python -m chipmunk.verify.worker SPEC.json`.

The original side runs every scenario densely, and once more under the oracle. The patched side runs every scenario with
Chipmunk off, with everything kept, sparse, and off again. Outputs go to safetensors files, figures to `result.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from safetensors.torch import save_file as save_tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk
from chipmunk.ops import dispatch
from chipmunk.runtime.control import statistics
from chipmunk.verify.building import BuildError, load_file
from chipmunk.verify.checkout import CheckoutError
from chipmunk.verify.drawn import Drawn
from chipmunk.verify.operators import as_json, hold_against_reference
from chipmunk.verify.order import PROGRESS, read_order
from chipmunk.verify.placeholders import PlaceholderUsed, to_install
from chipmunk.verify.spec import CONFIGS, Scenario, Spec
from chipmunk.verify.subject import OtherModelError, Subject


class Worker:
    """One side's model, and what is run with it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.subject = Subject(spec)
        self.scenarios = self.subject.scenarios()
        self.tensors: dict[str, Tensor] = {}
        self.labels: dict[str, list[tuple[int, str]]] = {}
        """Step and slot of each model call of the last run, by scenario and image."""
        self.failed: dict[str, str] = {}
        """Loops that do not run as they are, by scenario, with what is raised."""
        self.done = 0
        self.total = len(self.scenarios) * (3 if spec.side == "patched" else 1 if spec.weights else 2)

    def run(self) -> dict[str, Any]:
        figures = self.original() if self.spec.side == "original" else self.patched()
        save_tensors(self.tensors, self.spec.out / "outputs.safetensors")
        return {
            "scenarios": [asdict(scenario) for scenario in self.scenarios],
            "failed": self.failed,
            "labels": self.labels,
            "notes": [*self.subject.notes, *self.subject.checkout.notes],
            "placeholders": sorted(self.subject.checkout.placeholders.names),
            "environment": environment(self.spec.device),
            **figures,
        }

    # The original's side.

    def original(self) -> dict[str, Any]:
        """Every scenario dense, and under the oracle unless the weights are the user's: that would take hours."""
        self.first_runs("dense")
        oracle = {} if self.spec.weights else {scenario.name: self.oracle(scenario) for scenario in self.scenarios}
        return {"parameters": self.parameters(), "oracle": oracle}

    def oracle(self, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario under the oracle, at the steps and slots of the dense run; what ran, and how close it was."""
        from chipmunk.verify.oracle import Oracle

        model = self.subject.model(scenario.model)
        with torch.no_grad(), Oracle(model, self.spec.facts, load_config(scenario.config)) as oracle:
            for index, image in enumerate(scenario.images):
                oracle.begin_generation(image.steps)
                oracle.follow(self.labels[f"{scenario.name}/{index}"])
                self.draw("oracle", scenario, index)
            calls = dict(oracle.calls)
            skipped = len(oracle.skipped)
            margin = oracle.smallest_margin
        self.progress(f"{scenario.name}: oracle")
        counts = [[*key, count] for key, count in sorted(calls.items())]
        return {"calls": counts, "skipped": skipped, "smallest_margin": margin}

    # The patched side.

    def patched(self) -> dict[str, Any]:
        """Every scenario with Chipmunk off, with everything kept and sparse; then off again, and the kernels."""
        configured = self.first_runs("off")
        for scenario in self.scenarios:
            self.enable(scenario.model, "kept")
            self.run_scenario("kept", scenario)
            self.disable(scenario.model)
        coverage = {scenario.name: self.sparse(scenario) for scenario in self.scenarios}
        # enabled, with caches made and dropped: nothing of that may show in the state_dict
        self.enable("model", "default")
        parameters, loading = self.parameters(), strict_loading(self.subject.model("model"))
        self.disable("model")
        for scenario in {scenario.model: scenario for scenario in reversed(self.scenarios)}.values():
            self.draw("off again", scenario, 0)
        kernels = None if self.spec.weights or not kernels_run(self.spec.device) else self.kernels()
        return {
            "parameters": parameters,
            "loading": loading,
            "coverage": coverage,
            "found_configuration": configured,
            "kernels": kernels,
        }

    def kernels(self) -> dict[str, Any]:
        """The Triton operators in the dtype they are made for: one image, its blocks compiled as users run them."""
        cuda = self.spec.device.startswith("cuda")
        dtype = torch.bfloat16 if cuda else torch.float16
        model = self.subject.in_dtype("model", dtype)
        scenario = replace(self.scenarios[0], model=model, images=self.scenarios[0].images[:1])
        self.draw("half off", scenario, 0)
        backends = []
        for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with suppress(RuntimeError), sdpa_kernel(backend):
                self.draw(f"half off {backend.name}", scenario, 0)
                backends.append(backend.name)
        compiled: dict[str, Any] = {"compile": "auto" if cuda else False}
        for job, config in (("half kept", "kept"), ("half sparse", "default")):
            self.enable(model, config, **compiled)
            with hold_against_reference() as found:
                self.draw(job, scenario, 0)
            self.disable(model)
        return {"dtype": str(dtype).removeprefix("torch."), "backends": backends, "operators": as_json(found)}

    def first_runs(self, job: str) -> bool:
        """Run every scenario once, as a user does who configures nothing, and leave out the loops that fail.

        Where none is left, verify's own loop takes their place. Returns whether a configuration was found all the same.
        """
        left_out, configured = [], None
        for scenario in self.scenarios:
            try:
                if configured is None and self.spec.side == "patched":
                    self.draw("untouched", scenario, 0)
                    configured = statistics(self.subject.model(scenario.model)).enabled
                    for name in {each.model for each in self.scenarios}:
                        self.disable(name)
                self.run_scenario(job, scenario)
            except (CheckoutError, PlaceholderUsed, BuildError, torch.cuda.OutOfMemoryError):
                raise
            except Exception as error:
                if scenario.loop is None:
                    raise
                left_out.append(scenario)
                self.failed[scenario.name] = f"{self.subject.checkout.place_of(error)}{type(error).__name__}: {error}"
        self.scenarios = [scenario for scenario in self.scenarios if scenario not in left_out]
        if left_out and all(scenario.loop is None for scenario in self.scenarios):
            self.scenarios.insert(0, self.subject.own_loop())
            self.run_scenario(job, self.scenarios[0])
        return bool(configured)

    def run_scenario(self, job: str, scenario: Scenario) -> None:
        for index in range(len(scenario.images)):
            drawn = self.draw(job, scenario, index)
            self.labels[f"{scenario.name}/{index}"] = [(call.step, call.slot) for call in drawn.calls]
        self.progress(f"{scenario.name}: {job}")

    def sparse(self, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario sparse; what ran, by the runtime's statistics and by the operators called."""
        model = self.enable(scenario.model, scenario.config)
        with count_operators() as calls:
            self.run_scenario("sparse", scenario)
        counted = asdict(statistics(model))
        self.disable(scenario.model)
        return {"statistics": counted, "operators": dict(calls)}

    def enable(self, name: str, config: str, **changes: Any) -> torch.nn.Module:
        model = self.subject.model(name)
        chipmunk.enable(model, str(write_config(config, self.spec.out, **changes)))
        return model

    def disable(self, name: str) -> None:
        chipmunk.disable(self.subject.model(name))

    # Both.

    def draw(self, job: str, scenario: Scenario, index: int) -> Drawn:
        """Draw one image; its outputs are kept as `job/scenario/image/…`, the model calls by number and the latents."""
        patched = self.spec.side == "patched"
        steps: Callable[[Any, Any], Any] = chipmunk.steps if patched else lambda model, iterable: iterable
        slot: Callable[[Any, str], Any] = chipmunk.slot if patched else lambda model, name: model
        drawn = self.subject.draw(scenario, index, steps, slot)
        key = f"{job}/{scenario.name}/{index}"
        for number, call in enumerate(drawn.calls):
            self.tensors[f"{key}/{number:03d}"] = call.output.cpu().contiguous()
        assert drawn.latents is not None
        self.tensors[f"{key}/latents"] = drawn.latents.detach().clone().cpu().contiguous()
        return drawn

    def parameters(self) -> list[list[str]]:
        """Name and digest of dtype, shape and content of each entry of the state_dict, in order."""
        state = self.subject.model("model").state_dict()
        return [[name, hashlib.sha256(serialise({"": tensor.cpu()})).hexdigest()] for name, tensor in state.items()]

    def progress(self, what: str) -> None:
        self.done += 1
        print(f"{PROGRESS}{json.dumps([self.done, self.total, what])}", flush=True)


@contextmanager
def count_operators() -> Iterator[Counter[str]]:
    """Count the calls that reach the implementation of an operator, whatever the runtime says about them."""
    calls: Counter[str] = Counter()
    original = dispatch.call

    def counted(operator: str, *args: Any) -> Any:
        # the same operator makes the cached difference on a full step
        subtracting = operator == "column_sparse_attention" and args[-1]
        calls[f"{operator}, subtracting" if subtracting else operator] += 1
        return original(operator, *args)

    dispatch.call = counted  # type: ignore[assignment]
    try:
        yield calls
    finally:
        dispatch.call = original


def strict_loading(model: torch.nn.Module) -> str | None:
    """Why the model does not take its own state_dict back; None if it does."""
    try:
        model.load_state_dict(model.state_dict(), strict=True)
    except RuntimeError as error:
        return str(error)
    return None


def load_config(name: str) -> Any:
    from chipmunk.config import Config

    return Config.model_validate_json(json.dumps(CONFIGS[name]))


def write_config(name: str, folder: Path, **changes: Any) -> Path:
    path = folder / f"{name}.yml"
    path.write_text(json.dumps({**CONFIGS[name], "compile": False, **changes}))  # JSON is YAML
    return path


def kernels_run(device: str) -> bool:
    """Whether Triton's kernels run on `device`: a GPU, or Triton's interpreter in place of one."""
    if device.startswith("cuda"):
        return True
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from chipmunk.ops import tuning

    return tuning.interpreted()


def require_device(device: str) -> None:
    """Raise CheckoutError for a GPU that is not there."""
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise CheckoutError(f"there is no device {device} for {sys.executable}", "chipmunk doctor")


def environment(device: str) -> dict[str, str]:
    found = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "chipmunk": f"{chipmunk.__version__} ({Path(chipmunk.__file__).parent})",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }
    return found


def main(path: str) -> None:
    spec = read_order(Spec, Path(path))
    os.chdir(spec.out)
    if spec.weights is None:
        torch.set_num_threads(1)  # the model is too small to share
    worker: Worker | None = None
    try:
        require_device(spec.device)
        if spec.preload is not None:
            load_file(spec.preload, "chipmunk_verify_preload")
        worker = Worker(spec)
        result = worker.run()
    except CheckoutError as error:
        result = failure("import", error, error.next_command)
    except PlaceholderUsed as error:
        result = failure("import", error, to_install(error.name or ""))
    except BuildError as error:
        result = failure("build", error)
        result["error"]["skeleton"] = error.skeleton
    except OtherModelError as error:
        result = failure("factory", error)
    except torch.cuda.OutOfMemoryError as error:
        result = failure("memory", error)
    except Exception as error:
        result = failure("crash", error)
        if worker is not None:
            result["error"]["place"] = worker.subject.checkout.place_of(error)
            result["error"]["skeleton"] = worker.subject.skeleton(calls=True)
    (spec.out / "result.json").write_text(json.dumps(result, indent=1))


def failure(kind: str, error: Exception, next_command: str | None = None) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error))
    message = str(error) if kind != "crash" else f"{type(error).__name__}: {error}"
    return {"error": {"kind": kind, "message": message, "next_command": next_command, "trace": trace}}


if __name__ == "__main__":
    main(sys.argv[1])
