from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class AutoEncoderParams:
    z_channels: int
    ch: int
    out_ch: int
    scale_factor: float
    shift_factor: float


class AttnBlock(nn.Module):
    """Single-head attention between the positions of a feature map."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups=4, num_channels=in_channels, eps=1e-6)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def attention(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out[:, 0].transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.attention(x))


class Decoder(nn.Module):
    """Latents (batch, z_channels, h, w) to pixels (batch, out_ch, 8h, 8w)."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        ch = params.ch
        self.conv_in = nn.Conv2d(params.z_channels, ch, kernel_size=3, padding=1)
        self.mid = AttnBlock(ch)
        self.up = nn.ModuleList(nn.Conv2d(ch, ch, kernel_size=3, padding=1) for _ in range(3))
        self.conv_out = nn.Conv2d(ch, params.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for conv in self.up:
            h = nn.functional.interpolate(h, scale_factor=2.0, mode="bilinear")
            h = h + nn.functional.silu(conv(h))
        return torch.tanh(self.conv_out(h))


class AutoEncoder(nn.Module):
    """The decoding half; there is nothing to encode when images are made from noise."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.decoder = Decoder(params)
        self.scale_factor = params.scale_factor
        self.shift_factor = params.shift_factor

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.scale_factor + self.shift_factor)
