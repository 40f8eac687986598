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
            return torch.stack([self.words(line.split() or [""]).mean(dim=0) for line in text])
        return torch.stack([self.words(self.pad(line.split(), self.max_length)) for line in text])

    @staticmethod
    def pad(words: list[str], length: int) -> list[str]:
        return [*words[:length], *[f"<pad {i}>" for i in range(length - len(words))]]

    def words(self, words: list[str]) -> Tensor:
        return torch.stack([self.vector(word.lower()) for word in words])

    def vector(self, word: str) -> Tensor:
        seeded = torch.Generator("cpu").manual_seed(zlib.crc32(word.encode()))
        return torch.randn(self.dim, generator=seeded)
