import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoder, AutoEncoderParams, CosineAutoEncoder, CosineParams
from flux.modules.conditioner import PhraseEmbedder, WordEmbedder

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass
class ModelSpec:
    params: FluxParams
    ae_params: AutoEncoderParams | CosineParams
    ckpt_path: str | None
    seed: int
    text_tokens: int
    # pixels along one side of a token, and what the command line draws if nothing else is asked for
    token_size: int
    width: int
    height: int
    num_steps: int
    guidance: float
    prompt: str


def shipped(name: str) -> str | None:
    """Path of the weights that come with this repository, if they are there."""
    path = WEIGHTS / f"{name}.safetensors"
    return str(path) if path.exists() else None


configs = {
    "flux-mini": ModelSpec(
        # trained on drawn scenes, see MODEL_CARD.md
        ckpt_path=os.getenv("FLUX_MINI") or shipped("flux-mini"),
        seed=12,
        text_tokens=32,
        token_size=8,
        width=256,
        height=256,
        num_steps=50,
        guidance=2.5,
        prompt="a happy chipmunk with a red scarf on a meadow",
        params=FluxParams(
            in_channels=64,
            out_channels=64,
            vec_in_dim=128,
            context_in_dim=192,
            hidden_size=256,
            mlp_ratio=4.0,
            num_heads=2,
            depth=3,
            depth_single_blocks=6,
            axes_dim=[16, 56, 56],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
        ),
        ae_params=CosineParams(luma=40, chroma=12),
    ),
    "flux-tiny": ModelSpec(
        # a checkpoint of your own for this architecture; random weights without one
        ckpt_path=os.getenv("FLUX_TINY"),
        seed=12,
        text_tokens=77,
        token_size=16,
        width=640,
        height=448,
        num_steps=12,
        guidance=3.5,
        prompt="a chipmunk in a red scarf reads the morning paper",
        params=FluxParams(
            in_channels=64,
            out_channels=64,
            vec_in_dim=64,
            context_in_dim=96,
            hidden_size=128,
            mlp_ratio=4.0,
            num_heads=2,
            depth=5,
            depth_single_blocks=6,
            axes_dim=[8, 28, 28],
            theta=10_000,
            qkv_bias=True,
            guidance_embed=True,
        ),
        ae_params=AutoEncoderParams(z_channels=16, ch=16, out_ch=3, scale_factor=2.0, shift_factor=0.0),
    ),
}


def load_flow_model(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Flux:
    spec = configs[name]
    with torch.device("meta"):
        model = Flux(spec.params)
    model.to_empty(device="cpu")
    randomise(model, spec.seed)
    if spec.ckpt_path is not None:
        print(f"Loading {spec.ckpt_path}")
        model.load_state_dict(load_file(spec.ckpt_path), strict=True)
    return model.to(device, dtype).eval()


def load_ae(name: str, device: str | torch.device = "cpu") -> AutoEncoder | CosineAutoEncoder:
    spec = configs[name]
    if isinstance(spec.ae_params, CosineParams):
        return CosineAutoEncoder(spec.ae_params).to(device).eval()
    ae = AutoEncoder(spec.ae_params)
    randomise(ae, spec.seed + 1)
    return ae.to(device).eval()


def load_t5(name: str) -> WordEmbedder:
    spec = configs[name]
    return embedder(spec)(spec.params.context_in_dim, max_length=spec.text_tokens)


def load_clip(name: str) -> WordEmbedder:
    spec = configs[name]
    return embedder(spec)(spec.params.vec_in_dim)


def embedder(spec: ModelSpec) -> type[WordEmbedder]:
    return PhraseEmbedder if isinstance(spec.ae_params, CosineParams) else WordEmbedder


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Seeded weights, scaled to keep the size of activations: no training, but every part has a say in the output."""
    rng = torch.Generator("cpu").manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=rng)
        else:
            # biases and norm scales; a scale above 1 makes attention pick its keys
            parameter.normal_(0.0, 0.1, generator=rng)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.scale"):
            parameter.add_(1.5)


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    save_file(model.state_dict(), path)


def save_image(x: Tensor, path: str | Path) -> None:
    """Write pixels (3, height, width) in [-1, 1] as an 8-bit PNG."""
    levels = x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    height, width, _ = levels.shape
    # every PNG row starts with the number of its filter; 0 is none
    rows = torch.cat((levels.new_zeros(height, 1), levels.flatten(1)), dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows.flatten().tolist()))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
            checksum = zlib.crc32(kind + data)
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))
