"""The two facts that Chipmunk lives on, measured on the reference model while it draws.

    python -m training.measure docs/reference-model

writes docs/reference-model-attention.png, docs/reference-model-activations.png and docs/reference-model.json:
how few keys hold the attention, how little the MLPs' activations change from step to step, and how few neurons change.
Queries and rows are taken in groups of 8 x 8 tokens, as Chipmunk's token order makes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flux.model import Flux
from flux.sampling import get_schedule
from flux.util import configs, load_clip, load_flow_model, load_t5
from torch import Tensor, nn

from training.data import Words
from training.flow import grid
from training.prompts import PROMPTS

SHARES = (0.01, 0.02, 0.05, 0.1, 0.165, 0.25, 0.35, 0.5, 0.75, 1.0)
"""Shares of the keys, or of the neurons, at which curves are read off."""


def measure(model: Flux, words: Words, prompts: list[str], steps: int, side: int, guidance: float) -> dict[str, Any]:
    """Draw each prompt on `side` x `side` tokens and measure every step and layer.

    Returns, averaged over prompts, nested lists [step][layer] of curves over SHARES: `attention` (mass that the best
    keys of each query hold), `attention_group` (the same, keys shared by a group of 64 queries), `neurons` (share of
    the squared change that the neurons which change most hold, chosen for each group; from the second step on); and
    `change` [step][layer], the relative change of the activations since the last step.
    """
    keys = ("attention", "attention_group", "neurons", "change")
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for number, prompt in enumerate(prompts):
        drawn = _draw(model, words, prompt, number, steps, side, guidance)
        for key in keys:
            found[key].append(torch.tensor(drawn[key]))
    return {"shares": list(SHARES), **{key: torch.stack(found[key]).mean(dim=0).tolist() for key in keys}}


def _draw(
    model: Flux, words: Words, prompt: str, seed: int, steps: int, side: int, guidance: float
) -> dict[str, list[Any]]:
    device = next(model.parameters()).device
    text, vector = words.embed(words.encode([prompt]).to(device))
    tokens = side * side
    order = _patches(side)
    ids, text_ids = grid(tokens, text.shape[1], device)
    rng = torch.Generator("cpu").manual_seed(seed)
    # the order of tokens makes no difference to the model, so they are put in groups before it sees them
    img = torch.randn(1, tokens, model.in_channels, generator=rng).to(device)[:, order]
    ids = ids[:, order]
    schedule = get_schedule(steps, tokens)
    found: dict[str, list[Any]] = {"attention": [], "attention_group": [], "neurons": [], "change": []}
    before: list[Tensor] = []
    for now, then in itertools.pairwise(schedule):
        masses: list[tuple[list[float], list[float]]] = []
        activations: list[Tensor] = []
        with (
            torch.inference_mode(),
            _watched_attention(masses, text.shape[1]),
            _watched_mlps(model, activations, tokens),
        ):
            time, strength = img.new_full((1,), now), img.new_full((1,), guidance)
            img = img + (then - now) * model(img, ids, text, text_ids, time, vector, strength)
        found["attention"].append([single for single, _ in masses])
        found["attention_group"].append([shared for _, shared in masses])
        if before:
            pairs = list(zip(activations, before, strict=True))
            found["change"].append([((a - b).norm() / a.norm()).item() for a, b in pairs])
            found["neurons"].append([_curve((a - b).unflatten(0, (-1, 64)).square().sum(dim=1)) for a, b in pairs])
        before = activations
    return found


def _patches(side: int) -> Tensor:
    """The order of tokens in which 8 x 8 neighbours follow one another."""
    numbers = torch.arange(side * side).reshape(side // 8, 8, side // 8, 8)
    return numbers.permute(0, 2, 1, 3).flatten()


def _curve(weight: Tensor) -> list[float]:
    """Share of the whole that the largest entries along the last dimension hold, at SHARES, averaged over the rest."""
    ordered = weight.float().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    ordered = ordered / ordered[..., -1:].clamp(min=1e-12)
    count = weight.shape[-1]
    return [ordered[..., max(1, round(share * count)) - 1].mean().item() for share in SHARES]


@contextmanager
def _watched_attention(masses: list[tuple[list[float], list[float]]], text: int) -> Iterator[None]:
    """Notes for every attention call how its probabilities are spread over the keys: for single queries, for groups."""
    original: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probability = (q[:, :, text:].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        masses.append((_curve(probability), _curve(probability.unflatten(2, (-1, 64)).sum(dim=3))))
        return original(q, k, v)

    nn.functional.scaled_dot_product_attention = watched
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


@contextmanager
def _watched_mlps(model: Flux, activations: list[Tensor], tokens: int) -> Iterator[None]:
    """Notes the image's activations (tokens, neurons) of every MLP."""

    def note(_module: nn.Module, _given: Any, activation: Tensor) -> None:
        activations.append(activation[0, -tokens:].float())

    watched = [block.img_mlp[1] for block in model.double_blocks] + [block.mlp_act for block in model.single_blocks]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plot(measured: dict[str, Any], double: int, prefix: Path) -> None:
    """Write the two pictures, PREFIX-attention.png and PREFIX-activations.png."""
    import matplotlib.pyplot as plt

    shares = [100 * share for share in measured["shares"]]
    attention, group = torch.tensor(measured["attention"]), torch.tensor(measured["attention_group"])
    neurons, change = torch.tensor(measured["neurons"]), torch.tensor(measured["change"])
    steps, layers = attention.shape[:2]
    names = [f"double {i}" if i < double else f"single {i - double}" for i in range(layers)]
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, layers).numpy())

    def frame(axes: Any, title: str, x: str, y: str) -> None:
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    def curves(axes: Any, values: Tensor) -> None:
        for layer, name in enumerate(names):
            axes.plot(shares, 100 * values[:, layer].mean(dim=0), color=colours[layer], label=name, lw=1.6)
        axes.plot([0, 100], [0, 100], color="grey", ls=":", lw=1, label="even")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    curves(left, group)
    frame(left, "Keys shared by 8 × 8 queries", "best keys, % of all", "attention they hold, %")
    left.legend(fontsize=8, ncols=2, frameon=False)
    at = list(SHARES).index(0.165)
    for values, style, name in ((attention, "--", "per query"), (group, "-", "per group")):
        right.plot(range(steps), 100 * values[:, :, at].mean(dim=1), style, color="C0", label=name)
        low, high = values[:, :, at].amin(dim=1), values[:, :, at].amax(dim=1)
        if style == "-":
            right.fill_between(range(steps), 100 * low, 100 * high, color="C0", alpha=0.15, lw=0, label="all layers")
    right.set_ylim(0, 100)
    frame(right, "Attention held by the best 16.5 % of keys", "step", "%")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(f"{prefix}-attention.png", dpi=110)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for layer, name in enumerate(names):
        left.plot(range(1, steps), 100 * change[:, layer], color=colours[layer], label=name, lw=1.6)
    left.set_ylim(bottom=0)
    frame(left, "Change of the MLP activations since the last step", "step", "% of their norm")
    left.legend(fontsize=8, ncols=2, frameon=False)
    curves(right, neurons)
    frame(
        right,
        "Neurons that make the change, chosen by 8 × 8 tokens",
        "neurons that change most, % of all",
        "squared change, %",
    )
    figure.savefig(f"{prefix}-activations.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.measure", description="Measure the reference model.")
    parser.add_argument("prefix", type=Path, help="of the files to write")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--side", type=int, default=32, help="tokens")
    arguments = parser.parse_args()
    spec = configs["flux-mini"]
    model = load_flow_model("flux-mini")
    words = Words(load_t5("flux-mini"), load_clip("flux-mini"), torch.device("cpu"))
    prompts = PROMPTS[: arguments.prompts]
    measured = measure(model, words, prompts, arguments.steps, arguments.side, spec.guidance)
    measured |= {"prompts": prompts, "steps": arguments.steps, "weights": bool(spec.ckpt_path)}
    plot(measured, spec.params.depth, arguments.prefix)
    Path(f"{arguments.prefix}.json").write_text(json.dumps(rounded(measured)) + "\n")
    at = list(SHARES).index(0.165)
    group, change = torch.tensor(measured["attention_group"]), torch.tensor(measured["change"])
    print(f"attention held by the best 16.5 % of keys, shared by 64 queries: {100 * group[..., at].mean():.1f} %")
    print(f"relative change of the MLP activations from step to step: {100 * change.mean():.1f} %")


def rounded(value: Any) -> Any:
    """The same lists and dictionaries, numbers with four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return {key: rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
