# ruff: noqa: B905, RUF007
import math

import torch
from torch import Tensor

from flux.model import Flux
from flux.modules.conditioner import WordEmbedder


def get_noise(
    num_samples: int,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    token_size: int = 16,
) -> Tensor:
    """Noise for images of height x width pixels: a token, token_size pixels wide, is 2 x 2 latents of 16 channels."""
    # drawn on the CPU, so that a seed means the same image on every device
    rng = torch.Generator("cpu").manual_seed(seed)
    shape = (num_samples, 16, 2 * math.ceil(height / token_size), 2 * math.ceil(width / token_size))
    return torch.randn(shape, generator=rng, dtype=dtype).to(device)


def prepare(t5: WordEmbedder, clip: WordEmbedder, img: Tensor, prompt: str | list[str]) -> dict[str, Tensor]:
    """Pack latents into 2x2 patches, one token each, and embed the prompt: the tensor arguments of denoise."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    batch = max(img.shape[0], len(prompts))
    _, _, h, w = img.shape

    img = img.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2))
    img = img.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    img_ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1).float()

    txt = t5(prompts)
    txt_ids = torch.zeros(txt.shape[1], 3)
    vec = clip(prompts)

    def batched(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape[1:]).to(img.device)

    return {
        "img": batched(img),
        "img_ids": batched(img_ids[None]),
        "txt": batched(txt.to(img.dtype)),
        "txt_ids": batched(txt_ids[None]),
        "vec": batched(vec.to(img.dtype)),
    }


def get_schedule(num_steps: int, image_seq_len: int, shift: bool = True) -> list[float]:
    """Times from 1 (noise) to 0 (image), num_steps + 1 of them; larger images spend more steps near the noise."""
    times = torch.linspace(1, 0, num_steps + 1)
    if shift:
        # 0.5 at 256 tokens, 1.15 at 4096 tokens, linear in between
        mu = 0.5 + (1.15 - 0.5) * (image_seq_len - 256) / (4096 - 256)
        times = 1 / (1 + math.exp(-mu) * (1 / times - 1))
    return times.tolist()


def denoise(
    model: Flux,
    # model input
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    # sampling parameters
    timesteps: list[float],
    guidance: float = 4.0,
) -> Tensor:
    """Follow the flow from noise to image with Euler steps."""
    guidance_vec = img.new_full((img.shape[0],), guidance)
    for t_curr, t_prev in zip(timesteps[:-1], timesteps[1:]):
        t_vec = img.new_full((img.shape[0],), t_curr)
        pred = model(
            img=img,
            img_ids=img_ids,
            txt=txt,
            txt_ids=txt_ids,
            y=vec,
            timesteps=t_vec,
            guidance=guidance_vec,
        )
        img = img + (t_prev - t_curr) * pred
    return img


def unpack(x: Tensor, height: int, width: int, token_size: int = 16) -> Tensor:
    """Tokens (batch, h * w, 64) back to latents (batch, 16, 2h, 2w)."""
    h, w = math.ceil(height / token_size), math.ceil(width / token_size)
    x = x.unflatten(2, (-1, 2, 2)).unflatten(1, (h, w))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
