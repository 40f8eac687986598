"""Train the reference model.

    python -m training.train --minutes 9.25 --out model

Everything fits into `--minutes`: painting the scenes, compiling, training with a learning rate that falls to zero as
the time runs out, and drawing samples. The folder `--out` gets the weights (averaged over steps, float16) every minute,
a log in JSON lines, and sheets of samples at the end. In the second half of the training the model learns guidance: an
earlier state of itself tells how far the text pulls, so that later one call a step is enough.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flux.model import Flux
from flux.sampling import unpack
from flux.util import configs, load_ae, load_clip, load_t5
from safetensors.torch import load_file
from torch import Tensor

from training import photographs
from training.data import BATCH, SIZE, Words, pictures, tokens
from training.flow import GUIDANCE, Example, draw, guided_velocity, predict, start, times
from training.prompts import PROMPTS
from training.sheet import save_sheet
from training.weights import save_parts

NAME = "flux-mini"


@dataclass(frozen=True)
class Settings:
    minutes: float
    out: Path
    batch: int
    learning_rate: float
    scenes: int
    scene_seconds: float
    sample_seconds: float
    guidance_from: float
    drop_text: float
    average: float
    seed: int
    device: str
    compile: bool
    photographs: Path | None
    start_from: list[Path]


class Pool:
    """Pictures as tokens and captions as word numbers, all in the device's memory."""

    def __init__(self, settings: Settings, words: Words, seed: int, scenes: int, seconds: float):
        device = torch.device(settings.device)
        ae = load_ae(NAME, device)
        photos = photographs.load(settings.photographs)
        painted, captions = [], []
        begun = time.perf_counter()
        n = min(BATCH, scenes)
        for number in range(math.ceil(scenes / n)):
            batch = pictures(number, seed, device, photos, n)
            painted.append(tokens(ae, batch.pixels).half())
            captions.append(words.encode(batch.captions).to(device))
            if number % 13 == 12 and time.perf_counter() - begun > seconds:
                break
            if number % 13 == 12 and device.type == "cuda":
                torch.cuda.synchronize()
        self.tokens = torch.cat(painted)
        self.words = torch.cat(captions)

    def __len__(self) -> int:
        return len(self.tokens)


class Log:
    """JSON lines, in a file and on the screen."""

    def __init__(self, path: Path):
        self.file = path.open("w")
        self.begun = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def __call__(self, **what: Any) -> None:
        line = json.dumps({"seconds": round(self.seconds(), 1), **what})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def main() -> None:
    settings = arguments()
    settings.out.mkdir(parents=True, exist_ok=True)
    log = Log(settings.out / "log.jsonl")
    torch.set_float32_matmul_precision("high")
    device = torch.device(settings.device)
    log(
        event="start",
        torch=torch.__version__,
        device=device_name(device),
        settings={**asdict(settings), **text_paths(settings)},
    )

    words = Words(load_t5(NAME), load_clip(NAME), device)
    # what the model is tested on comes first, from a seed of its own, so that it is the same whatever the pool's size
    held_out = Pool(settings, words, settings.seed + 1, scenes=min(4 * BATCH, settings.scenes), seconds=math.inf)
    pool = Pool(settings, words, settings.seed, settings.scenes, settings.scene_seconds)
    log(event="painted", scenes=len(pool), gigabytes=round(pool.tokens.nbytes / 1e9, 2))

    model = Flux(configs[NAME].params)
    start(model, settings.seed)
    if settings.start_from:
        model.load_state_dict({k: v.float() for part in settings.start_from for k, v in load_file(part).items()})
    model.to(device)
    log(event="model", parameters=sum(p.numel() for p in model.parameters()))
    trained = Training(settings, model, pool, held_out, words, log).run()

    try:
        samples(trained, words, settings, log)
    except Exception:
        # the weights are on the disk; a sheet can be drawn from them at any time
        traceback.print_exc()
    log(event="end", peak_gigabytes=peak_memory(device))


class Training:
    def __init__(self, settings: Settings, model: Flux, pool: Pool, held_out: Pool, words: Words, log: Log):
        self.settings, self.model, self.pool, self.held_out, self.words, self.log = (
            settings,
            model,
            pool,
            held_out,
            words,
            log,
        )
        self.device = torch.device(settings.device)
        self.rng = torch.Generator(self.device).manual_seed(settings.seed)
        # plain copies, made before anything is compiled: the average over steps, and the teacher of guidance
        self.average, self.teacher = copy.deepcopy(model), copy.deepcopy(model)
        for frozen in (self.average, self.teacher):
            frozen.requires_grad_(False)
        self.good = {name: value.clone() for name, value in model.state_dict().items()}
        self.new_optimizer()
        self.step = 0

    def new_optimizer(self) -> None:
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.99), fused=True)

    def run(self) -> Flux:
        settings, log = self.settings, self.log
        self.warm_up()
        begin = log.seconds()
        end = max(60 * settings.minutes - settings.sample_seconds, begin + 1)
        log(event="training", seconds_left=round(end - begin, 1), peak_gigabytes=peak_memory(self.device))
        guided, saved, logged = False, begin, begin
        losses: list[Tensor] = []
        while True:
            # the clock is read when the device has caught up, so that the schedule ends in time
            if self.step % 8 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
            now = log.seconds()
            done = (now - begin) / (end - begin)
            if done >= 1:
                break
            if done >= settings.guidance_from and (not guided or self.step % 500 == 0):
                self.teacher.load_state_dict(self.average.state_dict())
                guided = True
                log(event="teacher", step=self.step)
            warm = min(1.0, (self.step + 1) / 200)
            rate = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
            losses.append(self.train_step(rate, guided))
            self.step += 1
            if self.step % 50 == 0 or now - logged > 20:
                loss = torch.stack(losses).mean().item()
                rate_images = len(losses) * settings.batch / max(log.seconds() - logged, 1e-9)
                log(
                    step=self.step,
                    loss=round(loss, 5),
                    rate=round(rate, 7),
                    guided=guided,
                    images_a_second=round(rate_images),
                )
                losses, logged = [], log.seconds()
                if not math.isfinite(loss):
                    self.go_back()
            if now - saved > 60:
                self.save()
                saved = now
        self.save()
        return self.average

    def train_step(self, rate: float, guided: bool) -> Tensor:
        """One step of the optimizer; returns the loss, a scalar on the device."""
        given = self.example(self.pool, self.settings.batch, self.rng)
        n = given.time.shape[0]
        # until guidance is learned, the model learns that it makes no difference
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(n, generator=self.rng, device=self.device)
        velocity = given.velocity
        with self.half():
            if guided:
                velocity = guided_velocity(self.teacher, given, guidance, self.words.empty)
            prediction = predict(self.model, given, guidance)
        loss = (prediction.float() - velocity).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(self.settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.detach()

    def example(self, pool: Pool, n: int, rng: torch.Generator) -> Example:
        chosen = torch.randint(len(pool), (n,), generator=rng, device=self.device)
        x = pool.tokens[chosen].float()
        text, vector = self.words.embed(pool.words[chosen])
        silent = torch.rand(n, generator=rng, device=self.device) < self.settings.drop_text
        text = torch.where(silent[:, None, None], self.words.empty[0], text)
        vector = torch.where(silent[:, None], self.words.empty[1], vector)
        noise = torch.randn(x.shape, generator=rng, device=self.device)
        return Example(x, text, vector, noise, times(n, x.shape[1], rng))

    def half(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def warm_up(self) -> None:
        """Compile the blocks, for training and for the teacher; go on without where the compiler does not work."""
        if not self.settings.compile:
            return
        blocks = [
            *self.model.double_blocks,
            *self.model.single_blocks,
            *self.teacher.double_blocks,
            *self.teacher.single_blocks,
        ]
        for block in blocks:
            block.compile(dynamic=False)
        try:
            for _ in range(2):
                given = self.example(self.pool, self.settings.batch, torch.Generator(self.device).manual_seed(1))
                guidance = torch.ones_like(given.time)
                with self.half():
                    guided_velocity(self.teacher, given, guidance, self.words.empty)
                    predict(self.model, given, guidance).float().square().mean().backward()
                self.model.zero_grad(set_to_none=True)
            self.log(event="compiled")
        except Exception:
            traceback.print_exc()
            self.model.zero_grad(set_to_none=True)
            for block in blocks:
                block._compiled_call_impl = None
            self.log(event="not compiled, going on without")

    def go_back(self) -> None:
        """The loss is no number: back to the weights that were saved last, with a fresh optimizer."""
        self.model.load_state_dict(self.good)
        self.average.load_state_dict(self.good)
        self.new_optimizer()
        self.log(event="went back", step=self.step)

    @torch.no_grad()
    def test(self) -> float:
        """Loss of the averaged weights without guidance on pictures that are not trained on, always the same noise."""
        rng = torch.Generator(self.device).manual_seed(self.settings.seed)
        total, rounds = 0.0, max(1, min(8, len(self.held_out) // 64))
        for _ in range(rounds):
            given = self.example(self.held_out, min(64, self.settings.batch), rng)
            with self.half():
                prediction = predict(self.average, given, torch.ones_like(given.time))
            total += (prediction.float() - given.velocity).square().mean().item()
        return total / rounds

    def save(self) -> None:
        test = self.test()
        if not math.isfinite(test):
            return
        self.good = {name: value.clone() for name, value in self.average.state_dict().items()}
        facts = {
            "format": "pt",
            "steps": str(self.step),
            "batch": str(self.settings.batch),
            "seed": str(self.settings.seed),
        }
        save_parts(self.good, self.settings.out, facts)
        self.log(event="saved", step=self.step, images=self.step * self.settings.batch, test_loss=round(test, 5))


def samples(model: Flux, words: Words, settings: Settings, log: Log) -> None:
    """Two sheets: prompts at the default guidance, and a few prompts (rows) under more and more guidance (columns)."""
    device = torch.device(settings.device)
    ae = load_ae(NAME, device)
    spec = configs[NAME]
    count = (SIZE // spec.token_size) ** 2

    def sheet(name: str, drawn: list[Tensor], columns: int) -> None:
        pixels = ae.decode(unpack(torch.cat(drawn).float(), SIZE, SIZE, spec.token_size)).clamp(-1, 1)
        save_sheet(pixels, settings.out / name, columns)
        log(event="sheet", name=name)

    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    few = device.type == "cpu"
    prompts = PROMPTS[:2] if few else PROMPTS
    steps = 2 if few else spec.num_steps
    with half:
        sheet("samples.png", [draw(model, words, prompts, spec.guidance, settings.seed, count, steps)], 8)
        levels = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
        rows = [draw(model, words, prompts[:8], level, settings.seed, count, steps) for level in levels]
        sheet("guidance.png", list(torch.stack(rows, dim=1)), len(levels))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> float:
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else 0.0


def text_paths(settings: Settings) -> dict[str, Any]:
    return {
        "out": str(settings.out),
        "photographs": str(settings.photographs),
        "start_from": [str(p) for p in settings.start_from],
    }


def arguments() -> Settings:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the reference model.")
    add: Callable[..., Any] = parser.add_argument
    add("--minutes", type=float, default=20.0, help="for everything together")
    add("--out", type=Path, required=True, help="a folder for weights, log and samples")
    add("--batch", type=int, default=128)
    add("--learning-rate", type=float, default=1.2e-3)
    add("--scenes", type=int, default=66_560, help="pictures to paint")
    add("--scene-seconds", type=float, default=40.0, help="begin with fewer if painting takes longer than this")
    add("--sample-seconds", type=float, default=25.0, help="kept free at the end")
    add("--guidance-from", type=float, default=0.55, help="share of the training after which guidance is learned")
    add("--drop-text", type=float, default=0.1, help="share of examples without a caption")
    add("--average", type=float, default=0.999, help="decay of the average over steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", dest="compile", action="store_false")
    add("--photographs", type=Path, help="file of python -m training.photographs; else from the packages themselves")
    add("--start-from", type=Path, nargs="*", default=[], help="parts of a checkpoint to go on from")
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
