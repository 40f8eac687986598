"""The training data: pictures with captions, all made from a seed.

    python -m training.data pictures.png      # a sheet of them, captions on standard output

Four kinds of drawn scene, and crops of photographs. A batch holds one kind. Captions are made of phrases; in half of
them some phrases are left out, so that a short prompt works too.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from flux.modules.autoencoder import CosineAutoEncoder
from flux.modules.conditioner import PhraseEmbedder, WordEmbedder, in_context
from torch import Tensor

from training import photographs
from training.scenes.landscape import landscape
from training.scenes.paint import Canvas, Dice
from training.scenes.portrait import portrait
from training.scenes.still_life import still_life
from training.scenes.underwater import underwater

SIZE = 256
BATCH = 128
"""Pictures that are painted at once."""

Painter = Callable[[Dice, Canvas], list[list[str]]]
PAINTERS: dict[str, Painter] = {
    "landscape": landscape,
    "still life": still_life,
    "portrait": portrait,
    "underwater": underwater,
}
KINDS = (
    *("landscape", "portrait", "still life", "landscape", "underwater", "portrait", "landscape"),
    *("still life", "underwater", "portrait", "landscape", "still life", "photograph"),
)
"""The kinds of consecutive batches, over and over."""

_WORDS = """
    a an and apple apples at ball balls bear before big blue boat boats brown bubbles by cat checked chipmunk clear
    cloudy coffee cone cones cube cubes cup dawn day deep desert dotted fish flower fox galaxies glasses green grey
    happy hat hills house in landscape left meadow middle moon mountains night of on orange photograph pine pink
    purple rabbit red right rocket round scarf sea seaweed sky sleepy small snow snowy striped sun sunset surprised
    swimming table temple the three tree trees two vase vases wall white with wooden yellow
"""
VOCABULARY = tuple(_WORDS.split())


@dataclass(frozen=True)
class Pictures:
    """Pixels (n, 3, SIZE, SIZE) in [-1, 1] and their captions."""

    pixels: Tensor
    captions: list[str]


def pictures(number: int, seed: int, device: torch.device, photos: dict[str, Tensor], n: int = BATCH) -> Pictures:
    """Batch `number` of the data set `seed`: the same on every device, up to rounding. `photos` may be empty."""
    kind = KINDS[number % len(KINDS)]
    dice = Dice(n, seed * 1_000_003 + number, device)
    if kind == "photograph" and photos:
        subjects = sorted(photos)
        subject = subjects[number // len(KINDS) % len(subjects)]
        pixels = photographs.crops(dice, photos[subject], SIZE)
        phrases = [[f"a photograph of {subject}"] for _ in range(n)]
    else:
        canvas = Canvas(n, SIZE, device)
        phrases = PAINTERS.get(kind, landscape)(dice, canvas)
        pixels = canvas.pixels.clamp(0, 1)
    spoken = random.Random(seed * 1_000_003 + number)
    return Pictures(2 * pixels - 1, [say(parts, spoken) for parts in phrases])


def say(phrases: list[str], rng: random.Random) -> str:
    """A caption: all phrases, or, every other time, the first and a random part of the others."""
    if rng.random() < 0.5:
        phrases = [phrases[0], *(phrase for phrase in phrases[1:] if rng.random() < 0.6)]
    return " ".join(" ".join(phrases).split()).replace("a orange", "an orange")


class Words:
    """Captions as numbers; their embeddings, the same as the conditioners give, are looked up on the device."""

    def __init__(self, t5: WordEmbedder, clip: WordEmbedder, device: torch.device):
        self.length = t5.max_length or 0
        self.numbers = {word: number for number, word in enumerate(sorted(set(VOCABULARY)))}
        pads = t5.pad([], self.length)
        self.known = len(self.numbers)
        words = [*self.numbers, *pads]
        self.sequence = torch.stack([t5.vector(word) for word in words]).to(device)
        self.pooled = torch.stack([clip.vector(word) for word in words]).to(device)
        self.empty = (t5([""]).to(device), clip([""]).to(device))

    def encode(self, captions: Iterable[str]) -> Tensor:
        """Word numbers (captions, length); KeyError for a word outside VOCABULARY."""
        rows = []
        for caption in captions:
            words = [self.numbers[word] for word in PhraseEmbedder.split(caption)][: self.length]
            rows.append(words + [self.known + pad for pad in range(self.length - len(words))])
        return torch.tensor(rows, dtype=torch.int16)

    def embed(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Text sequence (batch, length, channels) and vector (batch, channels) for the model."""
        numbers = numbers.long()
        is_word = (numbers < self.known)[..., None].float()
        pooled = (self.pooled[numbers] * is_word).sum(dim=1) / is_word.sum(dim=1)
        return in_context(self.sequence[numbers], PhraseEmbedder.place), pooled


def tokens(ae: CosineAutoEncoder, pixels: Tensor) -> Tensor:
    """Pictures as the model sees them: (n, tokens, channels)."""
    latents = ae.encode(pixels)
    n, channels, height, width = latents.shape
    blocks = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


__all__ = ["BATCH", "KINDS", "SIZE", "VOCABULARY", "Pictures", "Words", "pictures", "say", "tokens"]


if __name__ == "__main__":
    from training.sheet import save_sheet

    try:
        photos = photographs.load(None)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        photos = {}
    shown = [pictures(number, 0, torch.device("cpu"), photos, n=4) for number in range(len(KINDS))]
    for batch in shown:
        print(*batch.captions, sep="\n")
    save_sheet(torch.cat([batch.pixels for batch in shown]), Path(sys.argv[1]), columns=8)
