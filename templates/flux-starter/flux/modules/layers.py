import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux.math import attention, rope


class EmbedND(nn.Module):
    """Rotary table for ids with several axes; each axis owns `axes_dim[i]` channels of a head."""

    def __init__(self, dim: int, theta: int, axes_dim: list[int]):
        super().__init__()
        self.dim = dim
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        tables = [rope(ids[..., axis], width, self.theta) for axis, width in enumerate(self.axes_dim)]
        return torch.cat(tables, dim=-3)[:, None]


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal embedding (batch, dim) of a scalar per sample, cosines first."""
    count = dim // 2
    frequency = torch.exp(torch.arange(count, device=t.device) * (-math.log(max_period) / count))
    angle = (time_factor * t.float())[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.in_layer(x))
        return self.out_layer(x)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        power = wide.pow(2).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(power + 1e-6)).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """RMS norm of queries and keys, so that the logits stay bounded in half precision."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself runs over both streams, in the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


@dataclass
class ModulationOut:
    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Shift, scale and gate from the conditioning vector: one triple, or two for a block with attention and MLP."""

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.is_double = double
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        parts = self.lin(nn.functional.silu(vec)).unsqueeze(1).chunk(self.multiplier, dim=-1)
        first = ModulationOut(*parts[:3])
        return first, ModulationOut(*parts[3:]) if self.is_double else None


class DoubleStreamBlock(nn.Module):
    """Image and text keep their own weights and meet in one joint attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        mlp_hidden_dim = int(mlp_ratio * hidden_size)

        self.img_mod = Modulation(hidden_size, double=True)
        self.img_norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.img_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_hidden_dim, hidden_size),
        )

        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.txt_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_hidden_dim, hidden_size),
        )

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        # queries, keys and values of the image
        img_x = self.img_norm1(img) * (1 + img_mod1.scale) + img_mod1.shift
        img_qkv = self.img_attn.qkv(img_x)
        img_q, img_k, img_v = img_qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        img_q, img_k = self.img_attn.norm(img_q, img_k, img_v)

        # and of the text
        txt_x = self.txt_norm1(txt) * (1 + txt_mod1.scale) + txt_mod1.shift
        txt_qkv = self.txt_attn.qkv(txt_x)
        txt_q, txt_k, txt_v = txt_qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k, txt_v)

        # text tokens come first in the joint sequence
        q = torch.cat((txt_q, img_q), dim=2)
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        attn = attention(q, k, v, pe=pe)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_mod1.gate * self.img_attn.proj(img_attn)
        img_x = self.img_norm2(img) * (1 + img_mod2.scale) + img_mod2.shift
        img = img + img_mod2.gate * self.img_mlp(img_x)

        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_attn)
        txt_x = self.txt_norm2(txt) * (1 + txt_mod2.scale) + txt_mod2.shift
        txt = txt + txt_mod2.gate * self.txt_mlp(txt_x)
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence: one linear in, one linear out."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.mlp_hidden_dim = int(mlp_ratio * hidden_size)

        # in: queries, keys, values and the MLP's hidden layer; out: the attention's projection and the MLP's output
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + self.mlp_hidden_dim)
        self.linear2 = nn.Linear(hidden_size + self.mlp_hidden_dim, hidden_size)

        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden_size, double=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = self.modulation(vec)
        x_mod = self.pre_norm(x) * (1 + mod.scale) + mod.shift
        qkv, mlp = torch.split(self.linear1(x_mod), [3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)

        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k, v)
        attn = attention(q, k, v, pe=pe)

        output = self.linear2(torch.cat((attn, self.mlp_act(mlp)), dim=2))
        return x + mod.gate * output


class LastLayer(nn.Module):
    """From hidden states to the velocity of every packed latent patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)
