"""A FLUX-like model of two kinds of blocks, as small as the oracle's own tests need, and a configuration for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chipmunk.config import Config
from chipmunk.rewrite.plan import BlockFacts, ModelFacts

HIDDEN, HEADS, FEATURES = 16, 2, 48


def rotate(x: Tensor, ids: Tensor) -> Tensor:
    """Positions of a token as an angle in each pair of features of a head."""
    angle = (ids.float() * torch.tensor([1.0, 0.5, 0.3])).sum(-1)[:, None, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)


def attend(qkv: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    out = torch.nn.functional.scaled_dot_product_attention(rotate(q, ids), rotate(k, ids), v)
    return out.transpose(1, 2).flatten(2)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_qkv, self.txt_qkv = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.img_mlp = nn.Sequential(
            nn.Linear(HIDDEN, FEATURES), nn.GELU(approximate="tanh"), nn.Linear(FEATURES, HIDDEN)
        )

    def forward(self, img: Tensor, txt: Tensor, ids: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat((self.txt_qkv(self.norm(txt)), self.img_qkv(self.norm(img))), dim=1)
        attended = attend(qkv, ids)
        txt = txt + attended[:, : txt.shape[1]]
        img = img + attended[:, txt.shape[1] :]
        return img + self.img_mlp(self.norm(img) * (1 + time)), txt


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(HIDDEN, 3 * HIDDEN + FEATURES)
        self.linear2 = nn.Linear(HIDDEN + FEATURES, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, ids: Tensor, time: Tensor) -> Tensor:
        qkv, mlp = self.linear1(self.norm(x) * (1 + time)).split([3 * HIDDEN, FEATURES], dim=-1)
        return x + self.linear2(torch.cat((attend(qkv, ids), self.act(mlp)), dim=-1))


class TinyFlux(nn.Module):
    def __init__(self, double: int = 3, single: int = 3) -> None:
        super().__init__()
        self.img_in = nn.Linear(4, HIDDEN)
        self.double_blocks = nn.ModuleList(Double() for _ in range(double))
        self.single_blocks = nn.ModuleList(Single() for _ in range(single))
        self.out = nn.Linear(HIDDEN, 4)

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, t: float) -> Tensor:
        img, ids = self.img_in(img), torch.cat((txt_ids, img_ids), dim=1)
        time = torch.tensor(t).sin() * 0.1
        for block in self.double_blocks:
            img, txt = block(img, txt, ids=ids, time=time)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, ids, time)
        return self.out(x[:, txt.shape[1] :])


class Identity(nn.Module):
    """A model whose output at a token is its own position, and which remembers the order in which it saw them."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList(), nn.ModuleList()

    def forward(self, img: Tensor, img_ids: Tensor) -> tuple[Tensor, str]:
        self.seen = img_ids[0, :, 1:].int().tolist()
        return img + img_ids, "more"


FACTS = ModelFacts(
    file="tiny_flux.py",
    name="TinyFlux",
    double="double_blocks",
    single="single_blocks",
    image="img",
    ids="img_ids",
    double_block=BlockFacts("tiny_flux.py", "Double", attention=True, mlp="img_mlp"),
    single_block=BlockFacts("tiny_flux.py", "Single", attention=True, linear_in="linear1", linear_out="linear2"),
)


def grid_ids(height: int, width: int, batch: int = 1) -> Tensor:
    """(batch, height·width, 3): nothing, row, column."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.reshape(1, -1, 3).repeat(batch, 1, 1)


def inputs(height: int = 5, width: int = 7, text: int = 3, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randn(batch, height * width, 4, generator=generator),
        "img_ids": grid_ids(height, width, batch),
        "txt": torch.randn(batch, text, HIDDEN, generator=generator),
        "txt_ids": torch.zeros(batch, text, 3),
    }


def config(attn: dict[str, Any] | None = None, mlp: dict[str, Any] | None = None, **others: Any) -> Config:
    """Small tiles, so that small models have several groups; first layers sparse too unless the test says otherwise."""
    settings = {
        "attn": {
            "is_enabled": True,
            "top_keys": 0.3,
            "full_step_every": 4,
            "counts_multiple_of": 2,
            "mbm": 8,
            "first_n_dense_layers": 0,
        }
        | (attn or {}),
        "mlp": {
            "is_enabled": True,
            "top_keys": 0.3,
            "random_keys": 0.05,
            "full_step_every": 4,
            "block_mask_cache": 1,
            "bm": 8,
            "mbm": 8,
            "counts_multiple_of": 4,
            "first_n_dense_layers": 0,
        }
        | (mlp or {}),
        "patchify": {"is_enabled": True, "chunk_size_1": 4, "chunk_size_2": 2},
        "min_steps": 1,
    }
    return Config.model_validate(settings | others)
