"""`FluxTransformer2DModel`: the denoiser of FLUX.1 (Black Forest Labs 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.model import Model
from ..loading.options import configured
from .layers import check_heads
from .streams import (
    EPS,
    CombinedEmbedding,
    FeedForward,
    Modulation,
    Transformer2DModelOutput,
    modulated,
    refuse_attention_options,
)

THETA = 10000.0  # the longest wave of the rotations, as a multiple of 2 pi


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which pairs of features are turned, float32 (n, c)."""

    cos: Tensor
    sin: Tensor

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys (b, n, heads, c) turned by their places."""
        even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
        across = torch.stack([-odd, even], dim=-1).flatten(-2)
        turned = x.float() * self.cos[None, :, None] + across.float() * self.sin[None, :, None]
        return turned.to(x.dtype)


def rotation_of(places: Tensor, axes: Sequence[int]) -> Rotation:
    """The rotation for places (n, axes), whose axes have so many features each.

    Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864; angles are float64.
    """
    angles = []
    for place, features in zip(places.float().unbind(-1), axes, strict=True):
        exponents = torch.arange(0, features, 2, dtype=torch.float64, device=places.device)
        frequencies = 1.0 / THETA ** (exponents / features)
        angles.append(torch.outer(place, frequencies))
    angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return Rotation(angle.cos().float(), angle.sin().float())


class Attention(nn.Module):
    """Attention of a sequence to itself, before its last projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.norm_q = nn.RMSNorm(dim // heads, EPS)
        self.norm_k = nn.RMSNorm(dim // heads, EPS)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, heads, dim / heads)."""
        return torch.unflatten(x, -1, (self.heads, -1))

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, (b, n, heads, dim / heads) each."""
        query = self.norm_q(self.split(self.to_q(x)))
        key = self.norm_k(self.split(self.to_k(x)))
        value = self.split(self.to_v(x))
        return [query, key, value]

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(b, n, dim) -> (b, n, dim)."""
        return _attend(rotation, *self.project(x))


class JointAttention(Attention):
    """Attention of text and image to both; the text comes first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.norm_added_q = nn.RMSNorm(dim // heads, EPS)
        self.norm_added_k = nn.RMSNorm(dim // heads, EPS)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.to_add_out = nn.Linear(dim, dim)

    def mix(self, x: Tensor, text: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Image (b, n, dim) and text (b, m, dim) -> the same."""
        query = self.norm_added_q(self.split(self.add_q_proj(text)))
        key = self.norm_added_k(self.split(self.add_k_proj(text)))
        value = self.split(self.add_v_proj(text))
        both = zip((query, key, value), self.project(x), strict=True)
        mixed = _attend(rotation, *(torch.cat(pair, dim=1) for pair in both))
        m = text.shape[1]
        image = self.to_out(mixed[:, m:].contiguous())
        return image, self.to_add_out(mixed[:, :m].contiguous())


def _attend(rotation: Rotation, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(b, n, heads, c) each -> (b, n, heads · c)."""
    turned = (rotation.turn(query), rotation.turn(key), value)
    q, k, v = (one.transpose(1, 2) for one in turned)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _finite(x: Tensor) -> Tensor:
    """What float16 can hold of a tensor."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x


class DoubleBlock(nn.Module):
    """Joint attention, and a feed-forward layer for image and text each."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 6)
        self.attn = JointAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """(b, n, dim), (b, m, dim), (b, dim) -> image and text, as they were."""
        shift, scale, gate, *mlp = self.norm1(condition)
        text_shift, text_scale, text_gate, *text_mlp = self.norm1_context(condition)
        seen = modulated(text, text_shift, text_scale)
        mixed, mixed_text = self.attn.mix(modulated(x, shift, scale), seen, rotation)
        x = x + gate[:, None] * mixed
        text = text + text_gate[:, None] * mixed_text
        return self.ff(x, *mlp), _finite(self.ff_context(text, *text_mlp))


class SingleBlock(nn.Module):
    """Attention and MLP side by side, of text and image as one sequence."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)
        self.attn = Attention(dim, heads)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation) -> Tensor:
        """(b, m + n, dim), (b, dim) -> (b, m + n, dim)."""
        shift, scale, gate = self.norm(condition)
        seen = modulated(x, shift, scale)
        hidden = F.gelu(self.proj_mlp(seen), approximate="tanh")
        both = torch.cat([self.attn(seen, rotation), hidden], dim=2)
        return _finite(x + gate[:, None] * self.proj_out(both))


class FluxTransformer2DModel(Model):
    """The denoising transformer, of latents in patches.

    Its options are those of diffusers.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    @configured
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__()
        heads = num_attention_heads
        dim = heads * attention_head_dim
        if sum(axes_dims_rope) != attention_head_dim or any(one % 2 for one in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope = {axes_dims_rope!r} must be even numbers that sum up to"
                f" attention_head_dim = {attention_head_dim}"
            )
        self.out_channels = out_channels or in_channels
        self.time_text_embed = CombinedEmbedding(dim, pooled_projection_dim, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, heads) for _ in range(num_single_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput:
        """Predict the velocity.

        Args:
            hidden_states: the patches, (b, n, in_channels).
            encoder_hidden_states: the text, (b, tokens, joint_attention_dim).
            pooled_projections: (b, pooled_projection_dim).
            timestep: (b,), from 0 to 1.
            img_ids: the places of patches, (n, 3).
            txt_ids: those of tokens, (tokens, 3).
            guidance: the guidance scale, (b,), for `guidance_embeds`.
            joint_attention_kwargs: empty or None.
            return_dict: False returns a plain tuple.

        Raises:
            ValueError: the guidance scale is missing or of no use, or an option is not implemented.
        """
        refuse_attention_options(joint_attention_kwargs)
        x: Tensor = self.x_embedder(hidden_states)
        scaled = timestep.to(x.dtype) * 1000
        scale = None if guidance is None else guidance.to(x.dtype) * 1000
        condition = self.time_text_embed(scaled, pooled_projections, scale)
        text: Tensor = self.context_embedder(encoder_hidden_states)
        places = torch.cat([_of_one(txt_ids), _of_one(img_ids)])
        rotation = rotation_of(places, self.config.axes_dims_rope)
        for block in self.transformer_blocks:
            x, text = block(x, text, condition, rotation)
        x = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, condition, rotation)
        x = x[:, text.shape[1] :]
        scale, shift = self.norm_out(condition)
        x = self.proj_out(modulated(x, shift, scale))
        return Transformer2DModelOutput.asked(return_dict, x)


def _of_one(places: Tensor) -> Tensor:
    """(n, axes) of what older code gives for each of a batch, (b, n, axes)."""
    return places[0] if places.ndim == 3 else places
