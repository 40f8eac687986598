"""Rectified flow: what the model learns, and how the starter's sampler draws with it.

At time t a picture x is mixed with noise, `x_t = (1 - t) x + t noise`, and the model predicts the velocity
`noise - x`. Times are logit-normal around the sampler's own shift for that number of tokens, a tenth of them uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flux.model import Flux
from flux.sampling import denoise, get_schedule
from torch import Tensor, nn

from training.data import Words

SPREAD = 1.2
MIX = 0.1
GUIDANCE = (1.0, 3.5)
"""Guidance that the finished model knows; 1 is none."""


@dataclass(frozen=True)
class Example:
    """A batch that the model is asked about: pictures, their text, noise, and times (batch,)."""

    tokens: Tensor
    text: Tensor
    vector: Tensor
    noise: Tensor
    time: Tensor

    @property
    def mixed(self) -> Tensor:
        time = self.time[:, None, None]
        return torch.lerp(self.tokens, self.noise, time)

    @property
    def velocity(self) -> Tensor:
        return self.noise - self.tokens


def times(n: int, tokens: int, rng: torch.Generator) -> Tensor:
    """Times in (0, 1) for `n` examples of `tokens` image tokens, on the generator's device."""
    # the shift of get_schedule: exp(mu) multiplies the odds t / (1 - t), which adds mu to the logit
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    normal = torch.randn(n, generator=rng, device=rng.device)
    even = torch.rand(n, generator=rng, device=rng.device)
    rare = torch.rand(n, generator=rng, device=rng.device) < MIX
    return torch.where(rare, even, torch.sigmoid(mu + SPREAD * normal)).clamp(1e-4, 1 - 1e-4)


def predict(model: Flux, given: Example, guidance: Tensor) -> Tensor:
    """The model's velocity for a batch. `guidance`: (batch,)."""
    # one set of ids for the whole batch: positions are the same in every picture
    ids, text_ids = grid(given.tokens.shape[1], given.text.shape[1], given.tokens.device)
    velocity: Tensor = model(given.mixed, ids, given.text, text_ids, given.time, given.vector, guidance)
    return velocity


def grid(tokens: int, words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids of a square picture's tokens (1, tokens, 3), and of words, all 0: (1, words, 3)."""
    side = round(tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(1, tokens, 3).float()
    return ids, torch.zeros(1, words, 3, device=device)


@torch.no_grad()
def guided_velocity(teacher: Flux, given: Example, guidance: Tensor, empty: tuple[Tensor, Tensor]) -> Tensor:
    """Velocity to learn under guidance: the example's own, and `guidance - 1` times what the text adds."""
    n = given.tokens.shape[0]
    nothing = Example(
        given.tokens, empty[0].expand_as(given.text), empty[1].expand_as(given.vector), given.noise, given.time
    )
    both = Example(
        *(torch.cat((getattr(given, name), getattr(nothing, name))) for name in Example.__dataclass_fields__)
    )
    told, untold = predict(teacher, both, torch.ones_like(both.time)).float().split(n)
    return given.velocity + (guidance - 1)[:, None, None] * (told - untold)


@torch.no_grad()
def start(model: nn.Module, seed: int) -> None:
    """Weights to train from: Xavier for every linear; zero, so that each block begins as the identity, for modulation
    and for the last layer."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
            if name.endswith("mod.lin") or ".modulation.lin" in name or name.startswith("final_layer"):
                module.weight.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.scale"):
            parameter.fill_(1.0)


@torch.no_grad()
def draw(
    model: Flux, words: Words, prompts: list[str], guidance: float, seed: int, tokens: int, steps: int = 50
) -> Tensor:
    """Tokens (prompts, tokens, channels) drawn by the starter's sampler; a seed is the same noise on every device."""
    device = next(model.parameters()).device
    text, vector = words.embed(words.encode(prompts).to(device))
    rng = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(len(prompts), tokens, model.in_channels, generator=rng).to(device)
    ids, text_ids = grid(tokens, text.shape[1], device)
    return denoise(model, noise, ids, text, text_ids, vector, get_schedule(steps, tokens), guidance)
