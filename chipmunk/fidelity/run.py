"""`chipmunk fidelity`: dense and sparse pictures from the same noise, each side in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chipmunk import config as configuration
from chipmunk import registry
from chipmunk.apply.errors import quoted
from chipmunk.fidelity import metrics
from chipmunk.fidelity.flops import DENSE, LayerCall, LayerShape, ModelCost
from chipmunk.fidelity.report import FIGURES, FidelityError, FidelityReport, mean
from chipmunk.fidelity.spec import Spec, Variant
from chipmunk.rewrite.plan import ModelFacts, Plan, Site
from chipmunk.verify.configurations import configurations
from chipmunk.verify.original import rebuild
from chipmunk.verify.process import Progress, run_workers
from chipmunk.verify.report import VerifyError
from chipmunk.verify.run import original_plan, patched_repository, target_of

WORKER = "chipmunk.fidelity.worker"


@dataclass(frozen=True)
class FidelityOptions:
    """What the user can choose."""

    configs: tuple[Path, ...] = ()
    """Configurations to compare; by default the one that applies to the repository, or else the defaults."""
    variants: tuple[Variant, ...] = ()
    """Further ways to draw, beside the configurations."""
    prompts: tuple[str, ...] = ()
    count: int = 2
    """Prompts of the target's own, where none are given."""
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 50
    size: tuple[int, int] | None = None
    """Width and height in pixels, multiples of 16; None: the target's choice."""
    text_tokens: int = 64
    weights: Path | None = None
    factory: str | None = None
    autoencoder: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    python: str = sys.executable
    target: str | None = None
    plugins: tuple[Path, ...] = ()
    floor: int = 1
    """Of how many pictures the dense-against-dense floor is taken; 0: none."""
    coverage: bool = True
    require_psnr: float | None = None
    seed: int = 0
    timeout: float = 24 * 3600.0
    output: Path | None = None
    """A folder for the pictures."""
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """A patched repository and what its workers are told."""

    root: Path
    plan: Plan
    sites: tuple[Site, ...]
    original: Spec
    patched: Spec


def prepare(root: Path, options: FidelityOptions, work: Path) -> Prepared:
    """Rebuild the original of the patched repository at `root` in `work`, and write down what both sides share.

    Raises VerifyError where the repository is not patched, FidelityError where a file is missing.
    """
    state = patched_repository(root)
    for path in (options.weights, options.autoencoder):
        if path is not None and not path.exists():
            raise FidelityError(f"there is no file {path}")
    originals = {file.path: file.unpatched for file in state.files if file.unpatched is not None}
    plan = original_plan(state, originals, target=options.target, plugins=options.plugins)
    facts = _model(plan.models)
    assert state.journal is not None
    width, height = options.size or (None, None)
    base = Spec(
        side="original",
        root=rebuild(state.root, originals, work / "original-repository"),
        out=work / "original",
        facts=facts,
        target=target_of(facts, plan.target, registry.load(options.plugins).targets, state.root),
        dense=work / "dense",
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        factory=options.factory,
        factory_folder=Path.cwd(),
        weights=_resolved(options.weights),
        autoencoder=_resolved(options.autoencoder),
        width=width,
        height=height,
        text_tokens=options.text_tokens,
        steps=options.steps,
        prompts=options.prompts,
        count=options.count,
        seeds=options.seeds,
        floor=options.floor,
        coverage=options.coverage,
    )
    patched = replace(base, side="patched", root=state.root, out=work / "patched", floor=0)
    return Prepared(state.root, plan, state.journal.sites, base, patched)


def run(root: Path, options: FidelityOptions, progress: Progress | None = None) -> FidelityReport:
    """Draw the pictures of the patched repository at `root` beside its original's.

    Where it is interrupted (Ctrl-C) or fails once something is measured, the report holds that, and why. Raises
    FidelityError or VerifyError (exit code 2) where nothing can be measured, ConfigError for a wrong configuration.
    """
    metrics.need_ssim()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="chipmunk-fidelity-") as folder:
        work = Path(folder).resolve()
        prepared = prepare(root, options, work)
        configs = _sparse_variants(options.configs, prepared.root) if options.configs or not options.variants else []
        variants = (*configs, *options.variants)
        left_out = []
        if prepared.original.facts.installed and any(variant.method == "cache-dit" for variant in variants):
            variants = tuple(variant for variant in variants if variant.method != "cache-dit")
            left_out.append("cache-dit is compared on models in a repository only")
        dense = tuple(variant for variant in variants if variant.config is None)
        sparse = tuple(variant for variant in variants if variant.config is not None)
        theirs = work_on(replace(prepared.original, variants=dense), prepared, options, progress)
        stopped: BaseException | None = None
        try:
            ours = work_on(replace(prepared.patched, variants=sparse), prepared, options, progress)
        except (KeyboardInterrupt, FidelityError, VerifyError) as error:
            so_far = prepared.patched.out / "so-far.json"
            if not so_far.exists():
                raise
            ours, stopped = json.loads(so_far.read_text()), error
        results = _joined(theirs, ours, variants, options, prepared.original.facts.installed)
        results["notes"] += left_out
        images = _pictures(results, work, options.output)
    return FidelityReport(
        root=prepared.root,
        target=prepared.plan.target,
        results=results,
        command=options.command,
        require_psnr=options.require_psnr,
        sites=prepared.sites,
        seconds=time.perf_counter() - started,
        images=images,
        stopped=stopped,
    )


def work_on(spec: Spec, prepared: Prepared, options: FidelityOptions, progress: Progress | None) -> dict[str, Any]:
    """Run one worker; its result. Raises FidelityError where it has none."""
    result = run_workers([spec], options.python, progress, options.timeout, WORKER)[0]
    error = result.get("error")
    if error is None:
        return result
    message = error["message"].replace(str(prepared.original.root), str(prepared.root))
    if error["kind"] == "memory":
        raise FidelityError(f"the GPU's memory does not suffice: {message}. A smaller --size needs less")
    if error["kind"] == "crash":
        last = "\n".join(error["trace"].rstrip().splitlines()[-8:])
        raise FidelityError(
            f"the {spec.side} code fails: {message}\n\n{last}", next_command=f"chipmunk verify {quoted(prepared.root)}"
        )
    raise FidelityError(message, next_command=error["next_command"] or f"chipmunk verify {quoted(prepared.root)}")


def _sparse_variants(paths: Sequence[Path], root: Path) -> list[Variant]:
    """A variant for each configuration; by default for the one that applies. Each is read and checked."""
    return [
        Variant(name, {} if path is None else _content(configuration.load(path)), family="sparse")
        for name, path in configurations(paths, root).items()
    ]


def _content(config: configuration.Config) -> dict[str, Any]:
    """What a configuration sets, as JSON."""
    content: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return content


def _model(models: Sequence[ModelFacts]) -> ModelFacts:
    """The model to draw with: the first that a loop takes as a parameter, or else the first."""
    return next((facts for facts in models if any(loop.model_parameter for loop in facts.loops)), models[0])


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()


def _joined(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    variants: Sequence[Variant],
    options: FidelityOptions,
    installed: bool,
) -> dict[str, Any]:
    """The results of both sides as one object, less the pictures."""
    cost = ours["cost"]
    dense = dict(theirs["dense"])
    dense["flops"] = cost["dense_call"] * len(dense["pictures"][0]["step_seconds"])
    dense["sparsifiable_flops"] = cost["dense_sparsifiable_call"] * len(dense["pictures"][0]["step_seconds"])
    whole = ModelCost(tuple(LayerShape(**layer) for layer in cost["layers"]), tuple(cost["blocks"]), cost["outside"])
    found = []
    for variant in variants:
        result = {**theirs["variants"], **ours["variants"]}.get(variant.name)
        if result is None:  # stopped before it was its turn
            continue
        drawn, wanted = len(result["pictures"]), len(dense["pictures"])
        if drawn < wanted:
            result["notes"] = [*result["notes"], f"stopped after {drawn} of {wanted} pictures"]
        for picture in result["pictures"]:
            if "ran" in picture:  # drawn by the original's process, which does not know what a block costs
                calls = [dict.fromkeys(layers, DENSE) for layers in picture.pop("ran")]
                picture["call_flops"] = [whole.whole(call) for call in calls]
                picture["flops"] = sum(picture["call_flops"])
                picture["sparsifiable_flops"] = sum(whole.sparsifiable(call) for call in calls)
                picture["kinds"] = [_kind(call, len(whole.blocks)) for call in calls]
        found.append({"name": variant.name, "family": variant.family, "config": variant.config, **result})
    notes = [*theirs["notes"], *ours["notes"]]
    if options.device == "cpu":
        notes.append("seconds on a CPU, where the operators are plain PyTorch, say nothing about a GPU: look at FLOPs")
    if not theirs["decodes"]:
        needs = "a pipeline with a VAE: --weights FOLDER" if installed else "--autoencoder"
        notes.append(f"pictures could not be decoded ({needs}): PSNR is that of the latents, and there is no SSIM")
    return {
        "environment": ours["environment"],
        "size": theirs["size"],
        "steps": options.steps,
        "decodes": theirs["decodes"],
        "pictures": [{"prompt": picture["prompt"], "seed": picture["seed"]} for picture in dense["pictures"]],
        "layers": ours["layers"],
        "cost": cost,
        "dense": dense,
        "floor": {name: {"pictures": pictures} for name, pictures in theirs["floor"].items()},
        "variants": found,
        "notes": list(dict.fromkeys(notes)),
    }


def _kind(calls: Mapping[int, LayerCall], layers: int) -> str:
    """Of a call of a dense model from which another library may leave blocks out."""
    return "dense/dense" if len(calls) == layers else "mostly skipped" if calls else "skipped"


def _pictures(results: dict[str, Any], work: Path, output: Path | None) -> dict[str, str]:
    """Add SSIM to the results, and write the pictures as PNG files where there is a folder for them."""
    pixels: dict[str, Any] = {}
    for side in ("original", "patched"):
        for path in (work / side / "pictures").glob("*.safetensors"):
            from safetensors.numpy import load_file

            pixels |= load_file(path)
    named = [(variant["name"], variant["pictures"]) for variant in results["variants"]]
    floors = [(name, floor["pictures"]) for name, floor in results["floor"].items()]
    for name, pictures in [*named, *floors]:
        for index, picture in enumerate(pictures):
            one, other = pixels.get(f"dense/{index}"), pixels.get(f"{name}/{index}")
            picture["ssim"] = None if one is None or other is None else metrics.ssim(one[0], other[0])
    for floor in results["floor"].values():
        floor["summary"] = {name: mean(picture[name] for picture in floor["pictures"]) for name in FIGURES}
    if output is None:
        return {}
    from PIL import Image

    (output / "pictures").mkdir(parents=True, exist_ok=True)
    images = {}
    numbers = {"dense": "dense"} | {name: f"variant-{i}" for i, (name, _) in enumerate(named)}
    for key, picture in pixels.items():
        name, _, number = key.rpartition("/")
        if name in numbers:
            images[key] = f"pictures/{numbers[name]}-{number}.png"
            Image.fromarray(picture[0]).save(output / images[key], optimize=True)
    first = next((name for name, _ in named if f"{name}/0" in images), None)
    if first is not None and "dense/0" in images:
        _side_by_side(output / images["dense/0"], output / images[f"{first}/0"], output / PAIR)
    return images


PAIR = "dense-and-sparse.png"
"""The first picture, dense on the left."""


def _side_by_side(left: Path, right: Path, path: Path) -> None:
    from PIL import Image

    one, other = Image.open(left), Image.open(right)
    pair = Image.new("RGB", (one.width + 8 + other.width, one.height), "white")
    pair.paste(one, (0, 0))
    pair.paste(other, (one.width + 8, 0))
    pair.save(path, optimize=True)


__all__ = ["FidelityOptions", "Prepared", "VerifyError", "prepare", "run", "work_on"]
