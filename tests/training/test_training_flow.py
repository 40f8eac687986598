"""Training learns, guidance is what it says, weights survive their file, and the sampler goes where the flow points."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import data, measure, train, weights
from training.card import card
from training.data import Words
from training.flow import GUIDANCE, Example, draw, grid, guided_velocity, predict, start, times
from training.photographs import PHOTOGRAPHS

# the starter's modules; `training` makes them importable
from flux import util  # isort: skip
from flux.model import Flux  # isort: skip

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    util.configs["flux-mini"].params, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1
)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(util.load_t5("flux-mini"), util.load_clip("flux-mini"), CPU)


def small_model(seed: int = 0) -> Flux:
    model = Flux(SMALL)
    start(model, seed)
    return model


def batch(words: Words, n: int = 4, tokens: int = 16) -> Example:
    rng = torch.Generator().manual_seed(1)
    text, vector = words.embed(words.encode(["a red fish", "two boats", "a cat", "the sea"][:n]))
    x, noise = (torch.randn(n, tokens, 64, generator=rng) for _ in range(2))
    return Example(0.5 * x, text, vector, noise, torch.linspace(0.1, 0.9, n))


def test_the_reference_model_is_of_the_size_that_it_claims() -> None:
    params = util.configs["flux-mini"].params
    with torch.device("meta"):
        model = Flux(params)
    assert 12e6 <= sum(p.numel() for p in model.parameters()) <= 15e6
    assert params.hidden_size // params.num_heads == sum(params.axes_dim) == 128
    assert params.depth >= 3
    assert params.depth_single_blocks >= 6
    assert params.guidance_embed


def test_steps_on_one_batch_lower_its_loss(words: Words) -> None:
    model, given = small_model(), batch(words)
    guidance = torch.ones(4)
    first = predict(model, given, guidance)
    assert not first.any()  # the last layer starts at zero
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = (predict(model, given, guidance) - given.velocity).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_times_lie_around_the_samplers_shift() -> None:
    drawn = times(20_000, 1024, torch.Generator().manual_seed(0))
    assert drawn.min() > 0
    assert drawn.max() < 1
    mu = 0.5 + 0.65 * (1024 - 256) / (4096 - 256)
    assert abs(drawn.median().item() - 1 / (1 + math.exp(-mu))) < 0.02
    assert 0.005 < (drawn < 0.05).float().mean() < 0.02  # both ends are seen
    assert 0.02 < (drawn > 0.95).float().mean() < 0.05


def test_guidance_is_the_examples_velocity_and_what_the_text_adds(words: Words) -> None:
    teacher, given = small_model(), batch(words)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.05)
    one, two, three = (guided_velocity(teacher, given, torch.full((4,), g), words.empty) for g in (1.0, 2.0, 3.0))
    assert torch.equal(one, given.velocity)
    torch.testing.assert_close(three - one, 2 * (two - one))
    nothing = dataclasses.replace(given, text=words.empty[0].expand(4, -1, -1), vector=words.empty[1].expand(4, -1))
    torch.testing.assert_close(guided_velocity(teacher, nothing, torch.full((4,), 3.0), words.empty), given.velocity)
    # what the text adds, from two calls of their own
    added = predict(teacher, given, torch.ones(4)) - predict(teacher, nothing, torch.ones(4))
    assert added.abs().max() > 1e-3
    torch.testing.assert_close(two - one, added, atol=1e-5, rtol=1e-4)


class Straight(nn.Module):
    """The exact velocity where there is one picture only."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = nn.Parameter(target)
        self.in_channels = target.shape[-1]

    def forward(self, img: Tensor, timesteps: Tensor, **_: Tensor) -> Tensor:
        return (img - self.target) / timesteps[:, None, None]


def test_the_sampler_follows_the_flow_to_the_picture(words: Words) -> None:
    target = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    drawn = draw(Straight(target), words, ["a fish", "a boat"], 2.0, seed=0, tokens=16, steps=5)  # type: ignore[arg-type]
    torch.testing.assert_close(drawn, target.expand(2, -1, -1), atol=1e-5, rtol=1e-4)
    example = Example(target, *words.empty, torch.randn(1, 16, 64), torch.tensor([0.3]))
    velocity = Straight(target)(example.mixed, timesteps=example.time)
    torch.testing.assert_close(velocity, example.velocity, atol=1e-4, rtol=1e-4)


def test_ids_are_those_of_the_starters_sampler(words: Words) -> None:
    from flux.sampling import prepare

    given = prepare(util.load_t5("flux-mini"), util.load_clip("flux-mini"), torch.zeros(1, 16, 8, 8), "a fish")
    ids, text_ids = grid(16, 32, CPU)
    assert torch.equal(ids, given["img_ids"])
    assert torch.equal(text_ids, given["txt_ids"])


def test_weights_survive_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(seed=3)
    monkeypatch.setattr(weights, "PART", 300_000)
    parts = weights.save_parts(model.state_dict(), tmp_path, {"seed": "3"})
    assert len(parts) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in parts)
    weights.join(parts, tmp_path / "weights" / "joined.safetensors")
    joined = load_file(tmp_path / "weights" / "joined.safetensors")
    assert joined.keys() == model.state_dict().keys()
    assert all(torch.equal(joined[name], value.half()) for name, value in model.state_dict().items())

    spec = dataclasses.replace(
        util.configs["flux-mini"], params=SMALL, ckpt_path=str(tmp_path / "weights/joined.safetensors")
    )
    monkeypatch.setitem(util.configs, "flux-mini", spec)
    loaded = util.load_flow_model("flux-mini")
    assert loaded.img_in.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.img_in.weight, model.img_in.weight, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="model-1"):
        weights.join([parts[0], parts[0]], tmp_path / "twice.safetensors")
    save_file({"img_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.setitem(
        util.configs, "flux-mini", dataclasses.replace(spec, ckpt_path=str(tmp_path / "other.safetensors"))
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        util.load_flow_model("flux-mini")


def test_training_ends_in_time_and_leaves_weights_log_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (data, train):
        monkeypatch.setattr(module, "SIZE", 32)
    monkeypatch.setitem(util.configs, "flux-mini", dataclasses.replace(util.configs["flux-mini"], params=SMALL))
    monkeypatch.setattr(train.photographs, "load", lambda path: {})
    command = "train --device cpu --batch 2 --scenes 3 --sample-seconds 0 --no-compile --guidance-from 0.5"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--minutes", "0.03", "--out", str(tmp_path)])
    train.main()
    capsys.readouterr()

    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = [line.get("event") for line in log]
    assert "teacher" in events
    assert events.count("sheet") == 2
    assert events[-1] == "end"
    assert not any("not compiled" in str(event) for event in events)
    saved = [line for line in log if line.get("event") == "saved"]
    assert math.isfinite(saved[-1]["test_loss"])
    assert saved[-1]["step"] > 2
    assert load_file(tmp_path / "model-1.safetensors").keys() == Flux(SMALL).state_dict().keys()
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.jsonl",
        "model-1.safetensors",
        "samples.png",
        "guidance.png",
    }


def test_a_loss_that_is_no_number_goes_back_to_the_last_good_weights(words: Words, tmp_path: Path) -> None:
    model = small_model(seed=1)
    with torch.inference_mode():
        settings = train.Settings(*(1.0, tmp_path, 2, 1e-3, 2, 1.0, 0.0, 0.5, 0.1, 0.9, 0, "cpu", False, None, []))
    run = train.Training(settings, model, None, None, words, train.Log(tmp_path / "log.jsonl"))  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in (*model.parameters(), *run.average.parameters()):
            parameter.fill_(math.nan)
    run.go_back()
    for restored in (model, run.average):
        assert all(torch.equal(value, before[name]) for name, value in restored.state_dict().items())


def test_what_is_measured_adds_up(words: Words) -> None:
    model = small_model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    found = measure.measure(model, words, ["a red fish"], steps=3, side=8, guidance=GUIDANCE[0])
    attention, group, neurons, change = (
        torch.tensor(found[key]) for key in ("attention", "attention_group", "neurons", "change")
    )
    curve = len(measure.SHARES)
    assert attention.shape == group.shape == (3, 2, curve)
    assert neurons.shape == (2, 2, curve)
    assert change.shape == (2, 2)
    for values in (attention, group, neurons):
        assert (values.diff(dim=-1) >= -1e-6).all()
        torch.testing.assert_close(values[..., -1], torch.ones_like(values[..., -1]))
        assert (values >= torch.tensor(measure.SHARES) - 0.02).all()  # the best are no worse than any
    assert (attention >= group - 1e-6).all()  # a list of one's own is at least as good as a shared one
    assert (change > 0).all()


def test_the_model_card_tells_what_the_log_says() -> None:
    log: list[dict[str, object]] = [
        {"seconds": 0, "event": "start", "torch": "2.11.0", "device": "a GPU", "settings": SETTINGS},
        {"seconds": 9, "event": "painted", "scenes": 66560},
        {"seconds": 9, "event": "model", "parameters": 13595200},
        {"seconds": 300, "event": "teacher", "step": 3210},
        {"seconds": 320, "event": "teacher", "step": 3500},
        {"seconds": 330, "step": 3550, "loss": 0.21},
        {"seconds": 540, "event": "saved", "step": 5000, "images": 640000, "test_loss": 0.1234},
        {"seconds": 558, "event": "end"},
    ]
    text = card(log)
    for said in ("13.6 million", "5,000 steps, 640,000 pictures", "9.3 minutes", "a GPU", "0.1234", "from step 3,210"):
        assert said in text
    assert "$" not in text
    for photograph in PHOTOGRAPHS:
        assert f"{photograph.author} | {photograph.licence}" in text


SETTINGS = {"learning_rate": 1e-3, "batch": 128, "drop_text": 0.1, "seed": 0, "average": 0.999}
