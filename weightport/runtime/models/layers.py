"""Layers that the models share: images are (b, c, h, w), attributes diffusers' state-dict keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    is_causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head scaled dot-product attention.

    Query (b, n, c), key and value (b, m, c) -> (b, n, c); `bias`, in a shape that fits (b, heads,
    n, m), is added to scores, which are multiplied by `scale`, by default √(heads / c).
    """
    q = split_heads(query, heads)
    k = split_heads(key, heads)
    v = split_heads(value, heads)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale)
    return x.transpose(1, 2).flatten(2)


def check_heads(dim: int, heads: int) -> None:
    """Refuse channels that heads of attention cannot share.

    Raises:
        ValueError: they are no multiple of the heads.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"{dim} channels cannot be split into {heads} attention heads")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, c) -> (b, heads, n, c / heads)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class RMSNorm(nn.Module):
    """A norm that scales and does not shift, computed in float32 (Zhang and Sennrich 2019,
    https://arxiv.org/abs/1910.07467).

    In 16 bits it rounds before it multiplies by the weight, which PyTorch's own does not.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        variance = x.float().pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return x.to(self.weight.dtype) * self.weight


def timestep_embedding(
    timesteps: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Sinusoidal features of timesteps (b,) -> float32 (b, dim).

    Ho et al. 2020, https://arxiv.org/abs/2006.11239.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = (-math.log(10000) * steps / (half - freq_shift)).exp()
    angles = timesteps[:, None].float() * frequencies
    sin = angles.sin()
    cos = angles.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)


class TimestepEmbedding(nn.Module):
    """The MLP on top of sinusoidal features.

    `cond_dim` adds a projected condition first, LCM's guidance scale.
    """

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False) if cond_dim else None
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(b, in_dim), condition (b, cond_dim) -> (b, dim)."""
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond is given but the config has no time_cond_proj_dim")
            x = x + self.cond_proj(condition)
        x = self.linear_2(F.silu(self.linear_1(x)))
        return x


class ResnetBlock2D(nn.Module):
    """Two convolutions with a shortcut; the time embedding, if any, is added between them."""

    def __init__(
        self, in_channels: int, channels: int, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut: nn.Module | None = None
        if in_channels != channels:
            self.conv_shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """(b, in_channels, h, w), activated emb (b, time_dim) -> (b, channels, h, w)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h


class Downsample2D(nn.Sequential):
    """Halve the resolution: (b, c, h, w) -> (b, c, h / 2, w / 2).

    `padding` 0 pads right and bottom only, as the VAE of latent diffusion does.
    """

    def __init__(self, channels: int, padding: int = 0) -> None:
        super().__init__()
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(b, c, h, w) -> (b, c, *size), by default twice the size."""
        height, width = x.shape[-2:]
        x = F.interpolate(x, size=size or (2 * height, 2 * width), mode="nearest")
        x = self.conv(x)
        return x


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first.

    Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)
        self.gelu: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., inner_dim)."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.gelu(gate).mul_(x)
