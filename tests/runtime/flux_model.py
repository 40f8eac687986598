"""A small model of FLUX's shape, patched by hand exactly as `chipmunk patch` would: what the runtime is tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import chipmunk


def rotary_table(ids: Tensor, width: int) -> Tensor:
    """Angles of each position (B, N, axes): (B, 1, N, width / 2, 2), cosine and sine."""
    axes = ids.shape[-1]
    pairs = width // 2
    frequencies = torch.arange(1, pairs + 1, device=ids.device, dtype=torch.float32) / pairs
    angles = ids[..., torch.arange(pairs, device=ids.device) % axes].float() * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = table[..., 0].to(x.dtype), table[..., 1].to(x.dtype)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, chipmunk_layer: Any = None, **options: Any) -> Tensor:
    q, k = rotate(q, pe), rotate(k, pe)
    x = chipmunk.attention(chipmunk_layer, torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)
    return x.transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** 0.5
    return nn.functional.normalize(q, dim=-1) * scale, nn.functional.normalize(k, dim=-1) * scale, v


class DoubleBlock(nn.Module):
    def __init__(self, size: int, count: int, hidden: int) -> None:
        super().__init__()
        self.count = count
        self.img_qkv, self.txt_qkv = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.img_proj, self.txt_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.img_mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, size))
        self.txt_mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, size))
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.mod = nn.Linear(size, 4 * size)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        scale, shift, gate, gate_mlp = self.mod(vec)[:, None].chunk(4, dim=-1)
        img_q, img_k, img_v = heads(self.img_qkv(self.norm(img) * (1 + scale) + shift), self.count)
        txt_q, txt_k, txt_v = heads(self.txt_qkv(self.norm(txt) * (1 + scale) + shift), self.count)
        q, k, v = (torch.cat(x, dim=2) for x in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        attn = attention(q, k, v, pe=pe, **options, **chipmunk.layer(self))
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = img + gate * self.img_proj(img_attn)
        img = img + gate_mlp * chipmunk.mlp(self, self.img_mlp, self.norm(img) * (1 + scale) + shift)
        txt = txt + gate * self.txt_proj(txt_attn)
        txt = txt + gate_mlp * self.txt_mlp(self.norm(txt))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, size: int, count: int, hidden: int) -> None:
        super().__init__()
        self.size, self.count, self.hidden = size, count, hidden
        self.linear1, self.linear2 = nn.Linear(size, 3 * size + hidden), nn.Linear(size + hidden, size)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.mod = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, **options: Any) -> Tensor:
        scale, shift, gate = self.mod(vec)[:, None].chunk(3, dim=-1)
        x_mod = self.norm(x) * (1 + scale) + shift
        qkv, mlp = chipmunk.split_linear(self, self.linear1, x_mod, [3 * self.size, self.hidden])
        q, k, v = heads(qkv, self.count)
        attn = attention(q, k, v, pe=pe, **options, **chipmunk.layer(self))
        return x + gate * chipmunk.cat_linear(self, self.linear2, attn, self.mlp_act, mlp)


class Flux(nn.Module):
    """Defaults: three double and three single blocks, head dimension 16, 32 MLP neurons, 4 channels."""

    def __init__(self, double: int = 3, single: int = 3, size: int = 32, count: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.size, self.count = size, count
        self.img_in, self.txt_in, self.vec_in = nn.Linear(4, size), nn.Linear(6, size), nn.Linear(1, size)
        self.double_blocks = nn.ModuleList(DoubleBlock(size, count, hidden) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(size, count, hidden) for _ in range(single))
        self.out = nn.Linear(size, 4)

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, **options: Any
    ) -> Tensor:
        vec = self.vec_in(timesteps[:, None].to(img.dtype)).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        if img_ids.dim() == 2:
            img_ids, txt_ids = img_ids[None], txt_ids[None]
        pe = rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.size // self.count)
        for block in chipmunk.blocks(self.double_blocks, self, img):
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, **options)
        img = torch.cat((txt, img), dim=1)
        for block in chipmunk.blocks(self.single_blocks, self):
            img = block(img, vec=vec, pe=pe, **options)
        return self.out(chipmunk.hidden(self, img[:, txt.shape[1] :]))


def build(seed: int = 0, kind: type[Flux] = Flux, **sizes: int) -> Flux:
    """A model in evaluation mode with weights large enough that layers matter."""
    torch.manual_seed(seed)
    model = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def grid_ids(height: int, width: int, image: int = 0) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.full_like(rows, image), rows, columns), dim=-1).flatten(0, 1).float()


def inputs(height: int = 9, width: int = 7, text: int = 5, batch: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of the model but for `timesteps`."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randn(batch, height * width, 4, generator=rng),
        "img_ids": grid_ids(height, width).expand(batch, -1, -1),
        "txt": torch.randn(batch, text, 6, generator=rng),
        "txt_ids": torch.zeros(batch, text, 3),
    }


def denoise(model: Any, steps: int = 12, each: Any = None, **given: Tensor) -> list[Tensor]:
    """A sampling loop with one model call a step; returns every prediction. `each(step)` runs before each call."""
    times = torch.linspace(1, 0, steps + 1).tolist()
    img, predictions = given.pop("img"), []
    for step, (t_curr, t_prev) in enumerate(chipmunk.steps(model, zip(times[:-1], times[1:]))):  # noqa: B905, RUF007
        if each is not None:
            each(step)
        pred = model(img=img, timesteps=torch.full((img.shape[0],), t_curr), **given)
        img = img + (t_prev - t_curr) * pred
        predictions.append(pred)
    return predictions


SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"bm": 16, "mbm": 16, "counts_multiple_of": 8, "first_n_dense_layers": 1, "full_step_every": 10},
    "attn": {"mbm": 16, "counts_multiple_of": 8, "first_n_dense_layers": 1, "full_step_every": 10},
}
"""A configuration with groups and counts small enough for the model: five of its six layers are sparse."""


def small(**changes: Any) -> dict[str, Any]:
    """`SMALL` with keys changed: `small(mlp__top_keys=0.5, min_steps=2)`."""
    config: dict[str, Any] = {section: dict(values) for section, values in SMALL.items()}
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config.setdefault(section, {}) if section else config)[key] = value
    return config


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 error of a run's predictions."""
    assert len(got) == len(expected)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


def sparse_calls(model: Any) -> int:
    """How many MLPs ran sparse outside of named slots."""
    return sum(layer.mlp["main"].sparse for layer in chipmunk.statistics(model).layers if layer.mlp)
