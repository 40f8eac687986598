"""What the outputs of the two processes say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chipmunk.rewrite.plan import ModelFacts
from chipmunk.verify.report import Check

KEPT_LIMIT = 1e-5
"""Largest relative L2 error in float32 when every key and neuron is kept."""
ORACLE_LIMIT = 1e-4
"""Largest relative L2 error in float32 between the sparse run and the oracle's."""
FLOOR_FACTOR = 2.0
"""How much larger than the difference of two dense runs an error in half precision may be: everything kept rounds at
other places than dense in the MLPs too, and not in attention alone."""
NEAR_TIE = 3e-7
"""Where the last score chosen and the first left out are as close as this, relative to the largest (of an MLP: to the
largest mean, two of which a score is the difference of), rounding decides, and two correct runs go different ways."""

REPEATED = "a second call from the same place in one step"
"""How the runtime's reason begins for calls that are not a step of their own: a loop that iterates inside its steps."""

SPARSE = {"attention": ("column_sparse_attention",), "mlp": ("sparse_mlp_in", "sparse_swiglu_in")}
"""The operators of which a sparse call of a part makes one."""


class Outputs:
    """Tensors of one worker, by job, scenario, image, and number of the model call (or `latents`)."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.tensors: dict[str, Any] = load_file(folder / "outputs.safetensors")

    def of(self, job: str, scenario: str, image: int) -> dict[str, Any]:
        prefix = f"{job}/{scenario}/{image}/"
        return {name.removeprefix(prefix): t for name, t in sorted(self.tensors.items()) if name.startswith(prefix)}


class Comparison:
    """The results of an original and a patched worker."""

    def __init__(self, facts: ModelFacts, original: Path, patched: Path, results: list[dict[str, Any]]) -> None:
        self.facts = facts
        self.original, self.patched = Outputs(original), Outputs(patched)
        self.results = results
        self.scenarios: list[dict[str, Any]] = results[0]["scenarios"]
        self.margins = {name: found["smallest_margin"] for name, found in results[0]["oracle"].items()}
        """The closest decision of each scenario's selections."""
        self.oracle_errors = self._errors(self.patched, "sparse", self.original, "oracle") if self.margins else {}

    def checks(self) -> list[Check]:
        as_it_is, ours = (result.get("failed", {}) for result in self.results)
        broken = {name: why for name, why in ours.items() if name not in as_it_is}
        return [
            *(Check("runs", False, f"{name} does not run any more: {why}") for name, why in broken.items()),
            self.off(),
            self.everything_kept(),
            self.parameters(),
            self.coverage(),
            *([self.oracle()] if self.margins else []),
            self.sparse_error(),
            *([self.half_precision(), self.kernels()] if self.results[1].get("kernels") else []),
        ]

    def off(self) -> Check:
        """Chipmunk off: every output has the original's bits."""
        import torch

        # with a configuration of the user's own in reach, Chipmunk was on until it was disabled
        jobs = ["off", "off again"] if self.results[1]["found_configuration"] else ["untouched", "off", "off again"]
        compared, different = 0, []
        for job in jobs:
            for scenario, image in self._images():
                ours = self.patched.of(job, scenario, image)
                if job != "off" and not ours:
                    continue  # run for some scenarios only
                theirs = self.original.of("dense", scenario, image)
                compared += len(theirs)
                different += [
                    f"{job}/{scenario}/{image}/{name}"
                    for name in sorted({*theirs, *ours})
                    if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
                ]
        holds = not different and compared > 0
        says = f"{compared} outputs with Chipmunk off have the original's bits"
        if different:
            says = f"{len(different)} of {compared} outputs differ with Chipmunk off, first {different[0]}"
        scenarios = [scenario["name"] for scenario in self.scenarios]
        return Check("off", holds, says, {"scenarios": scenarios, "compared": compared, "different": different})

    def everything_kept(self) -> Check:
        """Every key and neuron kept: the sparse path computes what the dense one does."""
        errors = self._errors(self.patched, "kept", self.original, "dense")
        worst, where = _worst(errors)
        says = f"with every key and neuron kept, the largest error is {worst:.1e} (limit {KEPT_LIMIT:.0e}; {where})"
        return Check("everything kept", worst <= KEPT_LIMIT, says, {"limit": KEPT_LIMIT, "errors": errors})

    def oracle(self) -> Check:
        """The sparse run equals the plain statement of the algorithm on the unpatched model."""
        worst, where = _worst(self.oracle_errors)
        figures = {"limit": ORACLE_LIMIT, "errors": self.oracle_errors, "smallest_margin": self.margins}
        says = f"the largest difference from the oracle is {worst:.1e} (limit {ORACLE_LIMIT:.0e}; {where})"
        return Check("oracle", worst <= ORACLE_LIMIT, says, figures)

    def notes(self) -> list[str]:
        """Loops that no check covers, attention that never runs sparse, and calls that are no steps."""
        calls = [call for found in self.results[0]["oracle"].values() for call in found["calls"]]
        attention = {kind for _, part, kind, _ in calls if part == "attention"}
        masked = "masked" in attention and "sparse" not in attention
        return [
            *(
                f"{name} was not run, for it fails as it is: {why}"
                for name, why in self.results[0].get("failed", {}).items()
            ),
            *(["attention stays dense: every call of it is given a mask"] if masked else []),
            *(
                f"{repeated} model calls of {scenario['name']} run dense by design: its loop iterates inside a step, "
                "and of the calls from one place all but the step's first are no steps of their own"
                for scenario in self.scenarios
                if (repeated := self._repeated(scenario))
            ),
        ]

    def undecided(self) -> list[str]:
        """Scenarios that differ from the oracle where rounding may have decided a selection."""
        failed = {name.rpartition("/")[0] for name, found in self.oracle_errors.items() if _over(found, ORACLE_LIMIT)}
        return [name for name in self.margins if name in failed and self.margins[name] < NEAR_TIE]

    def decide(self, again: Comparison) -> None:
        """Take the verdict on undecided scenarios from another run of them, with other inputs."""
        self.margins |= again.margins
        self.oracle_errors |= again.oracle_errors

    def sparse_error(self) -> Check:
        """What sparsity costs on this model; there is no limit, but the numbers have to be numbers."""
        errors = self._errors(self.patched, "sparse", self.original, "dense")
        # those with the default configuration, if there are any
        default = {s["name"] for s in self.scenarios if s["config"] == "default"}
        chosen = [e for name, e in errors.items() if name.rpartition("/")[0] in default] or list(errors.values())
        worst_call = max((error for found in chosen for error in found["calls"]), default=math.inf)
        worst_image = max((found["latents"] for found in chosen), default=math.inf)
        finite = math.isfinite(worst_call) and math.isfinite(worst_image)
        says = (
            f"sparse against dense, reported without a limit: a step differs by at most {worst_call:.1%}, "
            f"the image by at most {worst_image:.1%}"
        )
        if not finite:
            says = "the sparse run gives numbers that are not finite"
        return Check("sparse error", finite, says, {"errors": errors})

    def half_precision(self) -> Check:
        """In half precision everything kept is as near to dense as dense under another attention backend."""
        name, kernels = self.scenarios[0]["name"], self.results[1]["kernels"]
        dense = self.patched.of("half off", name, 0)
        floors = {
            backend: _largest_error(self.patched.of(f"half off {backend}", name, 0), dense)
            for backend in kernels["backends"]
        }
        floor = max(floors.values(), default=0.0)
        error = _largest_error(self.patched.of("half kept", name, 0), dense)
        says = (
            f"with everything kept in {kernels['dtype']}, the largest error is {error:.1e}; two dense runs under "
            f"different attention backends differ by {floor:.1e} (limit: {FLOOR_FACTOR:g} times that)"
        )
        holds = floor > 0 and error <= FLOOR_FACTOR * floor
        return Check("half precision", holds, says, {"error": error, "floors": floors, "factor": FLOOR_FACTOR})

    def kernels(self) -> Check:
        """Each Triton operator computes what the reference does, on the numbers of a sparse run."""
        found = self.results[1]["kernels"]["operators"]
        wrong = [operator for operator, each in found.items() if not each["holds"]]
        calls = sum(each["calls"] for each in found.values())
        worst = max(found, key=lambda operator: found[operator]["error"], default="")
        says = f"{calls} operator calls by Triton equal the reference's; the largest error is that of {worst}"
        if worst:
            says += f", {found[worst]['error']:.1e} (limit {found[worst]['limit']:.0e})"
        if wrong:
            each = found[wrong[0]]
            says = f"{wrong[0]}: an error of {each['error']:.1e} (limit {each['limit']:.0e}) on {each['shapes']}"
            if each["passed_over"]:
                reason, count = next(iter(each["passed_over"].items()))
                says = f"{wrong[0]} did not run in Triton {count} times: {reason}"
        holds = not wrong and {"attention_with_column_sums", "column_sparse_attention"} <= set(found)
        return Check("triton", holds, says, {"operators": found})

    def parameters(self) -> Check:
        """The patched model has the original's parameters and takes a state_dict back."""
        before, after = ([tuple(entry) for entry in result["parameters"]] for result in self.results)
        lost = sorted({name for name, _ in set(before) - set(after)})
        added = sorted({name for name, _ in after} - {name for name, _ in before})
        loading = self.results[1]["loading"]
        says = f"{len(before)} state_dict entries are the same and load strictly"
        if lost or added:
            says = f"state_dict entries were changed or lost: {lost[:3]}, or added: {added[:3]}"
        elif before != after:
            says = "the order of state_dict entries changed"
        elif loading is not None:
            says = f"the state_dict does not load: {loading}"
        figures = {"count": len(before), "changed": lost, "added": added}
        return Check("parameters", before == after and loading is None, says, figures)

    def coverage(self) -> Check:
        """Every block that should have run sparse did, as often as the oracle, and through the operators."""
        problems: list[str] = []
        counts: dict[str, Any] = {}
        for scenario in self.scenarios:
            name = scenario["name"]
            expected: Counter[tuple[int, str, str]] | None = None
            if name in self.results[0]["oracle"]:
                calls = self.results[0]["oracle"][name]["calls"]
                expected = Counter({(layer, part, kind): count for layer, part, kind, count in calls})
            found = self.results[1]["coverage"][name]
            counts[name] = found["operators"]
            problems += [f"{name}: {problem}" for problem in self._coverage(scenario, expected, found)]
            skipped = found["statistics"]["skipped_model_calls"]
            if expected is not None and skipped != self.results[0]["oracle"][name]["skipped"]:
                wanted = self.results[0]["oracle"][name]["skipped"]
                problems.append(f"{name}: step caching skipped {skipped} model calls, not {wanted}")
        sparse = sum(
            c.get(operator, 0) for c in counts.values() for operators in SPARSE.values() for operator in operators
        )
        says = f"every block ran sparse when it was its turn: {sparse} sparse operator calls"
        if not sparse:
            problems.append("nothing ran sparse")
        if problems:
            says = problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        return Check("coverage", not problems, says, {"operators": counts, "problems": problems})

    def _coverage(
        self, scenario: dict[str, Any], expected: Counter[tuple[int, str, str]] | None, found: dict[str, Any]
    ) -> Iterator[str]:
        dense = found["statistics"]["dense_model_calls"]
        repeated = sum(count for reason, count in dense.items() if reason.startswith(REPEATED))
        if repeated != (wanted := self._repeated(scenario)):
            yield f"{repeated} model calls ran dense as {REPEATED}, not {wanted}"
        for reason, count in dense.items():
            if not reason.startswith(REPEATED):
                yield f"{count} model calls ran dense: {reason}"
        totals: Counter[str] = Counter()
        layers = found["statistics"]["layers"]
        for layer, statistics in enumerate(layers):
            for part in ("attention", "mlp"):
                slots = statistics[part].values()
                counted = {kind: sum(slot[kind] for slot in slots) for kind in ("sparse", "full")}
                totals[part] += counted["sparse"]
                for kind in ("sparse", "full"):
                    if expected is not None and counted[kind] != expected[layer, part, kind]:
                        reasons = {reason for slot in slots for reason in slot["dense"]}
                        why = f" (dense: {', '.join(sorted(reasons))})" if reasons else ""
                        yield (
                            f"{part} of {statistics['name']} ran {kind} {counted[kind]} times, "
                            f"not {expected[layer, part, kind]}{why}"
                        )
        operators = found["operators"]
        for part, names in SPARSE.items():
            reached = sum(operators.get(name, 0) for name in names)
            if reached != totals[part]:
                yield f"{totals[part]} sparse {part} calls were counted, but {reached} reached {' or '.join(names)}"
        yield from self._never_sparse(scenario, layers, expected or Counter())

    def _repeated(self, scenario: dict[str, Any]) -> int:
        """How many model calls of the original are not the first of their step from their place in the loop."""
        count = 0
        for image in range(len(scenario["images"])):
            seen: set[str] = set()
            last = -1
            for step, place in self.results[0]["labels"][f"{scenario['name']}/{image}"]:
                if step != last:  # a loop that runs again, to noise and back, begins again at step 0
                    seen.clear()
                count += place in seen
                seen.add(place)
                last = step
        return count

    def _never_sparse(
        self, scenario: dict[str, Any], layers: list[dict[str, Any]], expected: Counter[tuple[int, str, str]]
    ) -> Iterator[str]:
        """Blocks of the patched classes that never ran sparse, whatever the oracle thinks of them.

        Attention that the model asked for with a mask at every call is dense by its own doing.
        """
        facts = self.facts
        if scenario["model"] not in ("model", "channels"):
            return  # a subclass may hold layers that are rightly left alone
        for index, layer in enumerate(layers):
            block = facts.double_block if layer["name"].startswith(facts.double) else facts.single_block
            parts = {"attention": block.attention, "mlp": block.mlp is not None or block.linear_in is not None}
            for part, patched in parts.items():
                ran = sum(slot["sparse"] for slot in layer[part].values())
                masked = expected[index, part, "masked"] and not expected[index, part, "sparse"]
                if patched and index >= 2 and not ran and not masked:
                    yield f"{part} of {layer['name']} never ran sparse"

    def _images(self) -> Iterator[tuple[str, int]]:
        for scenario in self.scenarios:
            for image in range(len(scenario["images"])):
                yield scenario["name"], image

    def _errors(self, ours: Outputs, job: str, theirs: Outputs, reference: str) -> dict[str, Any]:
        """By scenario and image: relative L2 error of every model call's output, and of the last latents."""
        errors = {}
        for scenario, image in self._images():
            got, wanted = ours.of(job, scenario, image), theirs.of(reference, scenario, image)
            found = {name: relative_error(got[name], wanted[name]) if name in got else math.inf for name in wanted}
            if len(got) != len(wanted):
                found["latents"] = math.inf
            latents = found.pop("latents", math.inf)
            errors[f"{scenario}/{image}"] = {"calls": list(found.values()), "latents": latents}
        return errors


def relative_error(got: Any, wanted: Any) -> float:
    """‖got − wanted‖₂ / ‖wanted‖₂ in float64; infinite for another shape or numbers that are not finite."""
    if got.shape != wanted.shape:
        return math.inf
    got, wanted = got.double(), wanted.double()
    error = float((got - wanted).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf


def _largest_error(got: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative L2 error of a run's outputs; infinite where one is missing."""
    if set(got) != set(wanted):
        return math.inf
    return max((relative_error(got[name], wanted[name]) for name in wanted), default=math.inf)


def _worst(errors: dict[str, Any]) -> tuple[float, str]:
    """The largest error of all, and where: infinite if there is nothing to compare."""
    found = [
        (error, f"{name}, {what}")
        for name, image in errors.items()
        for what, error in [("latents", image["latents"]), *((f"call {i}", e) for i, e in enumerate(image["calls"]))]
    ]
    return max(found, default=(math.inf, "nothing was compared"))


def _over(image: dict[str, Any], limit: float) -> bool:
    return any(error > limit for error in [image["latents"], *image["calls"]])
