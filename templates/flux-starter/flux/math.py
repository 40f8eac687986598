import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Attention over the joint sequence.

    q, k, v: (batch, heads, tokens, head_dim); pe: rotations from EmbedND. Returns (batch, tokens, heads * head_dim).
    """
    q, k = apply_rope(q, k, pe)
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)


def rope(pos: Tensor, dim: int, theta: int) -> Tensor:
    """Rotary embedding of one axis: positions (batch, tokens) become 2x2 rotations (batch, tokens, dim / 2, 2, 2)."""
    if dim % 2:
        raise ValueError(f"A rotary axis needs an even number of channels, got {dim}")
    exponent = torch.arange(0, dim, 2, device=pos.device, dtype=torch.float64) / dim
    angle = pos[..., None].double() * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).float()


def apply_rope(q: Tensor, k: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Turn every pair of channels of q and k by the angle of its token."""
    return rotate(q, pe), rotate(k, pe)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    turned = (pe * pairs).sum(dim=-1)
    return turned.flatten(-2).to(x.dtype)
