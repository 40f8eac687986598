"""The smallest repository that is still FLUX: what the examples of patches stand in.

Its parts have other names than the official ones, as rules must not go by names.
"""

from __future__ import annotations

ATTENTION = """\
import torch


def attend(q, k, v, rotation):
    q, k = q * rotation, k * rotation
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)
"""

DOUBLE = """\
import torch
from torch import nn

from flow.attention import attend


class PairBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.image_qkv = nn.Linear(width, 3 * width)
        self.image_out = nn.Linear(width, width)
        self.image_norm = nn.LayerNorm(width)
        self.image_mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.text_qkv = nn.Linear(width, 3 * width)
        self.text_out = nn.Linear(width, width)
        self.text_norm = nn.LayerNorm(width)
        self.text_mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def split(self, x):
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, image, text, rotation):
        image_q, image_k, image_v = self.split(self.image_qkv(image))
        text_q, text_k, text_v = self.split(self.text_qkv(text))
        q = torch.cat((text_q, image_q), dim=2)
        k = torch.cat((text_k, image_k), dim=2)
        v = torch.cat((text_v, image_v), dim=2)
        x = attend(q, k, v, rotation)
        text_x, image_x = x[:, : text.shape[1]], x[:, text.shape[1] :]
        image = image + self.image_out(image_x)
        image = image + self.image_mlp(self.image_norm(image))
        text = text + self.text_out(text_x)
        text = text + self.text_mlp(self.text_norm(text))
        return image, text
"""

SINGLE = """\
import torch
from torch import nn

from flow.attention import attend


class JointBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.width, self.heads = width, heads
        self.enter = nn.Linear(width, 3 * width + 4 * width)
        self.leave = nn.Linear(width + 4 * width, width)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x, rotation):
        qkv, hidden = torch.split(self.enter(x), [3 * self.width, 4 * self.width], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, rotation)
        return x + self.leave(torch.cat((mixed, self.act(hidden)), 2))
"""

MODEL = """\
import torch
from torch import nn

from flow.double import PairBlock
from flow.single import JointBlock


class Painter(nn.Module):
    def __init__(self, channels, width, heads, pairs, joints):
        super().__init__()
        self.image_in = nn.Linear(channels, width)
        self.text_in = nn.Linear(channels, width)
        self.rotate = nn.Linear(3, width // heads)
        self.pairs = nn.ModuleList([PairBlock(width, heads) for _ in range(pairs)])
        self.joints = nn.ModuleList([JointBlock(width, heads) for _ in range(joints)])
        self.out = nn.Linear(width, channels)

    def forward(self, image, image_ids, text, text_ids, time):
        image = self.image_in(image) + time[:, None, None]
        text = self.text_in(text)
        rotation = self.rotate(torch.cat((text_ids, image_ids), dim=1)).unsqueeze(1)
        for block in self.pairs:
            image, text = block(image, text, rotation)
        x = torch.cat((text, image), dim=1)
        for block in self.joints:
            x = block(x, rotation)
        x = x[:, text.shape[1] :]
        return self.out(x)
"""

SAMPLING = """\
import torch

from flow.model import Painter


def sample(model: Painter, image, image_ids, text, text_ids, times):
    for now, then in zip(times[:-1], times[1:]):
        time = torch.full((image.shape[0],), now)
        velocity = model(image=image, image_ids=image_ids, text=text, text_ids=text_ids, time=time)
        image = image + (then - now) * velocity
    return image
"""

LOADING = """\
from flow.model import Painter


def load_painter(name, device="cpu"):
    return Painter(4, 32, 4, 3, 3).to(device).eval()
"""

COMMAND = """\
import torch
from fire import Fire

from flow.loading import load_painter
from flow.sampling import sample


def main(name: str = "small", steps: int = 4):
    model = load_painter(name)
    image, text = torch.randn(1, 16, 4), torch.randn(1, 5, 4)
    times = torch.linspace(1, 0, steps + 1)
    print(sample(model, image, torch.zeros(1, 16, 3), text, torch.zeros(1, 5, 3), times))


if __name__ == "__main__":
    Fire(main)
"""

FILES: dict[str, str] = {
    "flow/__init__.py": "",
    "flow/attention.py": ATTENTION,
    "flow/double.py": DOUBLE,
    "flow/single.py": SINGLE,
    "flow/model.py": MODEL,
    "flow/sampling.py": SAMPLING,
    "flow/loading.py": LOADING,
    "flow/command.py": COMMAND,
}
"""Path → text."""


def variant(text: str, *changes: tuple[str, str]) -> str:
    """`text` with each first string, which must occur, replaced by the second."""
    for old, new in changes:
        if old not in text:
            raise ValueError(f"the example's text does not hold {old!r}")
        text = text.replace(old, new)
    return text
