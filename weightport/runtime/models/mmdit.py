"""`SD3Transformer2DModel`: the denoiser of Stable Diffusion 3 and 3.5.

Esser et al. 2024, https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.model import Model
from ..loading.options import configured
from .layers import RMSNorm, check_heads, split_heads
from .streams import (
    EPS,
    CombinedEmbedding,
    FeedForward,
    Modulation,
    Transformer2DModelOutput,
    modulated,
    refuse_attention_options,
)

Norm = Literal[None, "rms_norm"]


def position_table(side: int, dim: int, base: int) -> Tensor:
    """Sines and cosines of the places of a square of `side` patches, float32 (1, side², dim).

    Columns make the first half of the features, rows the second. `base` patches are as far apart as
    pixels of an image of that size.
    """
    quarter = dim // 4
    places = torch.arange(side, dtype=torch.float32) / (side / base)
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(places, frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves[None].expand(side, side, -1)
    rows = waves[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).float().flatten(0, 1)[None]


class PatchEmbed(nn.Module):
    """Latents in patches, and where these are: the middle of a table of places."""

    pos_embed: Tensor

    def __init__(self, channels: int, dim: int, patch: int, side: int, base: int) -> None:
        super().__init__()
        self.side = side
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.register_buffer("pos_embed", position_table(side, dim, base))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> (b, h / patch · w / patch, dim).

        Raises:
            ValueError: the table has fewer places.
        """
        height, width = (edge // self.patch for edge in x.shape[-2:])
        if max(height, width) > self.side:
            raise ValueError(
                f"{height} x {width} patches are more than pos_embed_max_size = {self.side} on an"
                " edge; make a smaller image"
            )
        top = (self.side - height) // 2
        left = (self.side - width) // 2
        table = torch.unflatten(self.pos_embed, 1, (self.side, self.side))
        places = table[:, top : top + height, left : left + width].flatten(1, 2)
        patches: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        placed: Tensor = patches + places
        return placed.to(patches.dtype).contiguous()


class Attention(nn.Module):
    """Attention of the image to itself; subclasses let the text take part.

    The order of the parts is that of the state dict.
    """

    def __init__(self, dim: int, heads: int, norm: Norm) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.norm_q = _norm(dim // heads, norm)
        self.norm_k = _norm(dim // heads, norm)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of the image, (b, heads, n, dim / heads) each."""
        query = self.norm_q(split_heads(self.to_q(x), self.heads))
        key = self.norm_k(split_heads(self.to_k(x), self.heads))
        value = split_heads(self.to_v(x), self.heads)
        return [query, key, value]


class SelfAttention(Attention):
    """The second attention of some blocks of SD 3.5 medium."""

    def __init__(self, dim: int, heads: int, norm: Norm) -> None:
        super().__init__(dim, heads, norm)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        x = self.to_out(_attend(*self.project(x)))
        return x


class JointAttention(Attention):
    """Attention of image and text to both; in the last block nothing comes of the text."""

    def __init__(self, dim: int, heads: int, norm: Norm, is_last: bool) -> None:
        super().__init__(dim, heads, norm)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.to_add_out = nn.Identity() if is_last else nn.Linear(dim, dim)
        self.norm_added_q = _norm(dim // heads, norm)
        self.norm_added_k = _norm(dim // heads, norm)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, dim), (b, m, dim) -> the same."""
        query = self.norm_added_q(split_heads(self.add_q_proj(text), self.heads))
        key = self.norm_added_k(split_heads(self.add_k_proj(text), self.heads))
        value = split_heads(self.add_v_proj(text), self.heads)
        both = zip(self.project(x), (query, key, value), strict=True)
        mixed = _attend(*(torch.cat(pair, dim=2) for pair in both))
        n = x.shape[1]
        return self.to_out(mixed[:, :n]), self.to_add_out(mixed[:, n:])


def _norm(dim: int, norm: Norm) -> nn.Module:
    return nn.Identity() if norm is None else RMSNorm(dim, EPS)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(b, heads, n, c) each -> (b, n, heads · c)."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class JointTransformerBlock(nn.Module):
    """Joint attention, and a feed-forward layer for image and text each.

    A dual block has a second attention of the image to itself; the last block gives no text.
    """

    def __init__(self, dim: int, heads: int, norm: Norm, is_dual: bool, is_last: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if is_dual else 6)
        self.norm1_context = Modulation(dim, 2 if is_last else 6)
        self.attn = JointAttention(dim, heads, norm, is_last)
        self.attn2 = SelfAttention(dim, heads, norm) if is_dual else None
        self.ff = FeedForward(dim)
        self.ff_context = None if is_last else FeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, dim), (b, m, dim), (b, dim) -> image and text, as they were."""
        shift, scale, gate, *mlp = self.norm1(condition)
        text_shift, text_scale, *rest = self.norm1_context(condition)
        if self.ff_context is None:  # where the scale comes first
            text_shift, text_scale = text_scale, text_shift
        seen = modulated(text, text_shift, text_scale)
        mixed, mixed_text = self.attn(modulated(x, shift, scale), seen)
        start = x
        x = x + gate[:, None] * mixed
        if self.attn2 is not None:
            *mlp, shift, scale, gate = mlp
            x = x + gate[:, None] * self.attn2(modulated(start, shift, scale))
        x = self.ff(x, *mlp)
        if self.ff_context is not None:
            text_gate, *mlp = rest
            text = text + text_gate[:, None] * mixed_text
            text = self.ff_context(text, *mlp)
        return x, text


class SD3Transformer2DModel(Model):
    """The denoising transformer.

    Its options are those of diffusers. `sample_size`, in latents, is what it was trained for.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    @configured
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: Norm = None,
    ) -> None:
        super().__init__()
        heads = num_attention_heads
        dim = heads * attention_head_dim
        if caption_projection_dim != dim:
            raise ValueError(
                f"caption_projection_dim = {caption_projection_dim} must be"
                f" num_attention_heads · attention_head_dim = {dim}"
            )
        if dim % 4:
            raise ValueError(f"{dim} channels cannot hold sines and cosines of two places")
        self.out_channels = in_channels if out_channels is None else out_channels
        base = sample_size // patch_size
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, pos_embed_max_size, base)
        self.time_text_embed = CombinedEmbedding(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                dim, heads, qk_norm, i in dual_attention_layers, i == num_layers - 1
            )
            for i in range(num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: Collection[int] | None = None,
    ) -> Transformer2DModelOutput:
        """Predict the velocity.

        Args:
            hidden_states: the sample, (b, in_channels, h, w).
            encoder_hidden_states: the text, (b, tokens, joint_attention_dim).
            pooled_projections: (b, pooled_projection_dim).
            timestep: (b,), of 1000.
            joint_attention_kwargs: empty or None.
            return_dict: False returns a plain tuple.
            skip_layers: the numbers of blocks to leave out.

        Raises:
            ValueError: the sample is larger than the table of places, or an option is not
                implemented.
        """
        refuse_attention_options(joint_attention_kwargs)
        x: Tensor = self.pos_embed(hidden_states)
        condition = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for i, block in enumerate(self.transformer_blocks):
            if i not in (skip_layers or ()):
                x, text = block(x, text, condition)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulated(x, shift, scale))
        patch = self.config.patch_size
        height, width = (edge // patch for edge in hidden_states.shape[-2:])
        x = torch.unflatten(x, 2, (patch, patch, self.out_channels))
        x = torch.unflatten(x, 1, (height, width)).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(len(x), self.out_channels, height * patch, width * patch)
        return Transformer2DModelOutput.asked(return_dict, x)
