"""The transformer of the UNet: attention to the image itself and to the text. Sequences are (b, n,
c)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..loading.config import Config
from ..speed import ConstantContext
from .layers import GEGLU, attend


class Attention(nn.Module):
    """Attention of (b, n, dim) to (b, m, context_dim), or to itself when no context is given."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels cannot be split into {heads} attention heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.constant: ConstantContext | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        if (
            context is None or torch.compiler.is_compiling() or self.constant is None
        ):  # no guard on `constant`
            key, value = self.project(x if context is None else context)
        else:
            key, value = self.constant.get(context, self.project)
        x = self.to_out(attend(self.to_q(x), key, value, self.heads))
        return x

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to, (b, m, dim) each."""
        return self.to_k(context), self.to_v(context)


class FeedForward(nn.Sequential):
    """GEGLU to four times the width, and back: (b, n, dim) -> (b, n, dim). `net.1` is the dropout
    of diffusers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))


@dataclass(frozen=True)
class Level:
    """What a config says of one resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depth: int  # transformer blocks per attention
    context_dim: int
    only_cross_attention: bool


class BasicTransformerBlock(nn.Module):
    """Attention to itself (to the text if `only_cross_attention`), attention to the text,
    feed-forward."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        dim, self.only_cross_attention = level.channels, level.only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(
            dim, level.heads, level.context_dim if level.only_cross_attention else dim
        )
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, level.heads, level.context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) -> (b, n, dim)."""
        x = self.attn1(self.norm1(x), context if self.only_cross_attention else None) + x
        x = self.attn2(self.norm2(x), context) + x
        x = self.ff(self.norm3(x)) + x
        return x


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, between two projections that are convolutions
    or linear."""

    def __init__(self, c: Config, level: Level) -> None:
        super().__init__()
        dim, self.linear = level.channels, c.use_linear_projection
        self.norm = nn.GroupNorm(c.norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(level) for _ in range(level.depth)
        )
        self.proj_out = nn.Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(b, c, h, w), context (b, m, context_dim) -> (b, c, h, w)."""
        height, width = x.shape[-2:]
        h: Tensor = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        h = h if x.is_contiguous(memory_format=torch.channels_last) else h.contiguous()
        h = h if self.linear else self.proj_out(h)
        return h + x
