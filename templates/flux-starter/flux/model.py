from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux.modules.layers import (
    DoubleStreamBlock,
    EmbedND,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    timestep_embedding,
)


@dataclass
class FluxParams:
    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list[int]
    theta: int
    qkv_bias: bool
    guidance_embed: bool


class Flux(nn.Module):
    """Transformer that predicts the velocity of a rectified flow on sequences of latent patches."""

    def __init__(self, params: FluxParams):
        super().__init__()
        head_dim, rest = divmod(params.hidden_size, params.num_heads)
        if rest:
            raise ValueError(f"hidden_size {params.hidden_size} is not a multiple of num_heads {params.num_heads}")
        if sum(params.axes_dim) != head_dim:
            raise ValueError(f"axes_dim {params.axes_dim} must add up to the head dimension {head_dim}")

        self.params = params
        self.in_channels = params.in_channels
        self.out_channels = params.out_channels
        self.hidden_size = params.hidden_size
        self.num_heads = params.num_heads

        self.pe_embedder = EmbedND(dim=head_dim, theta=params.theta, axes_dim=params.axes_dim)
        self.img_in = nn.Linear(self.in_channels, self.hidden_size)
        self.txt_in = nn.Linear(params.context_in_dim, self.hidden_size)
        self.time_in = MLPEmbedder(256, self.hidden_size)
        self.vector_in = MLPEmbedder(params.vec_in_dim, self.hidden_size)
        self.guidance_in = MLPEmbedder(256, self.hidden_size) if params.guidance_embed else nn.Identity()

        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(self.hidden_size, self.num_heads, params.mlp_ratio, params.qkv_bias)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(self.hidden_size, self.num_heads, params.mlp_ratio)
            for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(self.hidden_size, 1, self.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (batch, image tokens, out_channels).

        img: (batch, image tokens, in_channels) with img_ids (batch, image tokens, 3); txt: (batch, text tokens,
        context_in_dim) with txt_ids likewise; timesteps and guidance: (batch,); y: (batch, vec_in_dim).
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"img and txt must be (batch, tokens, channels), got {img.shape} and {txt.shape}")

        vec = self.time_in(timestep_embedding(timesteps, 256)) + self.vector_in(y)
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("This model is guidance distilled: pass guidance")
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256))

        img = self.img_in(img)
        txt = self.txt_in(txt)
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))

        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)

        img = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        img = img[:, txt.shape[1] :]

        return self.final_layer(img, vec)
