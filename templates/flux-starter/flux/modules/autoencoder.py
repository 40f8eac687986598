import math
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


@dataclass
class CosineParams:
    luma: int
    chroma: int


class CosineAutoEncoder(nn.Module):
    """Untrained: the cosine coefficients of 8 x 8 pixels that the eye misses first are left out, as in a JPEG.

    Of each block, the `luma` lowest coefficients of brightness and the `chroma` lowest of two colour differences are
    kept, scaled so that fine ones are not drowned by coarse ones. A block is one token, 2 x 2 latents, so there are
    four coefficients for every channel of the latents.
    """

    basis: Tensor

    def __init__(self, params: CosineParams):
        super().__init__()
        colours = torch.tensor(((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0)))
        colours /= colours.norm(dim=1, keepdim=True)
        wave = torch.arange(8)[:, None] * (torch.arange(8)[None] + 0.5) * math.pi / 8
        cosines = torch.where(torch.arange(8)[:, None] == 0, 0.5**0.5, 1.0) * torch.cos(wave) / 2
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        frequency = (rows**2 + columns**2).flatten().float().sqrt()
        order = torch.argsort(frequency, stable=True)

        kept, scales = [], []
        for colour, count in zip(colours, (params.luma, params.chroma, params.chroma), strict=True):
            chosen = order[:count]
            blocks = torch.einsum("kr,kc->krc", cosines[rows.flatten()[chosen]], cosines[columns.flatten()[chosen]])
            kept.append(colour[None, :, None, None] * blocks[:, None])
            scales.append(0.35 + 0.42 * frequency[chosen] ** 0.85)
        self.register_buffer("basis", torch.cat(kept), persistent=False)
        self.register_buffer("scale", torch.cat(scales)[:, None, None], persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (batch, 3, 8h, 8w) in [-1, 1] to latents (batch, channels, 2h, 2w)."""
        coefficients = nn.functional.conv2d(x, self.basis, stride=8) * self.scale
        return nn.functional.pixel_shuffle(coefficients, 2)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (batch, channels, 2h, 2w) to pixels (batch, 3, 8h, 8w)."""
        coefficients = nn.functional.pixel_unshuffle(z, 2) / self.scale
        return nn.functional.conv_transpose2d(coefficients, self.basis, stride=8)
