import re
import zlib

import torch
from torch import Tensor, nn


class WordEmbedder(nn.Module):
    """Stands in for T5 and CLIP: every word becomes a fixed random vector, seeded by the word itself.

    With `max_length`, prompts become sequences (batch, max_length, dim); without, their mean (batch, dim).
    """

    def __init__(self, dim: int, max_length: int | None = None):
        super().__init__()
        self.dim = dim
        self.max_length = max_length

    def forward(self, text: list[str]) -> Tensor:
        if self.max_length is None:
            return torch.stack([self.words(self.split(line) or [""]).mean(dim=0) for line in text])
        return torch.stack([self.words(self.pad(self.split(line), self.max_length)) for line in text])

    @staticmethod
    def split(line: str) -> list[str]:
        return line.split()

    @staticmethod
    def pad(words: list[str], length: int) -> list[str]:
        return [*words[:length], *[f"<pad {i}>" for i in range(length - len(words))]]

    def words(self, words: list[str]) -> Tensor:
        return torch.stack([self.vector(word.lower()) for word in words])

    def vector(self, word: str) -> Tensor:
        seeded = torch.Generator("cpu").manual_seed(zlib.crc32(word.encode()))
        return torch.randn(self.dim, generator=seeded)


class PhraseEmbedder(WordEmbedder):
    """Words without punctuation. In a sequence, each has the two before it and its place beside it.

    So "red" belongs to its "house", and things can be drawn in the order in which they are named.
    """

    place = 24

    @staticmethod
    def split(line: str) -> list[str]:
        return re.findall(r"[a-z]+", line.lower())

    def words(self, words: list[str]) -> Tensor:
        vectors = torch.stack([self.vector(word) for word in words])
        return vectors if self.max_length is None else in_context(vectors, self.place)

    def vector(self, word: str) -> Tensor:
        return super().vector(word)[: self.dim if self.max_length is None else (self.dim - self.place) // 3]


def in_context(x: Tensor, place: int) -> Tensor:
    """Every word (..., words, dim) with the two before it, zeros before the first, and waves of its place.

    Returns (..., words, 3 * dim + place).
    """
    padded = nn.functional.pad(x, (0, 0, 2, 0))
    frequency = 100.0 ** (-torch.arange(place // 2, device=x.device) / (place // 2))
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    waves = torch.cat((angle.cos(), angle.sin()), dim=-1).expand(*x.shape[:-1], place)
    return torch.cat((x, padded[..., 1:-1, :], padded[..., :-2, :], waves.to(x.dtype)), dim=-1)
