"""What the transformers of SD 3 and Flux share, in which text and image are streams of their own
that attend to each other (Esser et al. 2024, https://arxiv.org/abs/2403.03206).

Sequences are (b, n, dim), conditions (b, dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import Output
from .layers import TimestepEmbedding, timestep_embedding

EPS = 1e-6  # of every norm
TIME_FEATURES = 256


@dataclass(eq=False)
class Transformer2DModelOutput(Output):
    """The prediction, in the shape of the sample."""

    sample: Tensor


class CombinedEmbedding(nn.Module):
    """The condition that time, pooled text, and for some models the guidance scale are."""

    def __init__(self, dim: int, pooled_dim: int, has_guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, dim)
        self.guidance_embedder: TimestepEmbedding | None = None
        if has_guidance:
            self.guidance_embedder = TimestepEmbedding(TIME_FEATURES, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)  # the same two layers

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Timestep (b,), pooled text (b, pooled_dim), guidance scale (b,) -> (b, dim).

        Raises:
            ValueError: the guidance scale is given and of no use, or the other way round.
        """
        if (guidance is None) != (self.guidance_embedder is None):
            raise ValueError("guidance must be given if guidance_embeds is set, and only then")
        features = timestep_embedding(timestep, TIME_FEATURES).to(pooled.dtype)
        condition: Tensor = self.timestep_embedder(features)
        if guidance is not None and self.guidance_embedder is not None:
            features = timestep_embedding(guidance, TIME_FEATURES).to(pooled.dtype)
            condition = condition + self.guidance_embedder(features)
        condition = condition + self.text_embedder(pooled)
        return condition


class Modulation(nn.Module):
    """What a condition does to the sequences of a block: so many vectors of their width."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(b, dim) -> `parts` times (b, dim)."""
        return tuple(self.linear(F.silu(condition)).chunk(self.parts, dim=1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A sequence normed, scaled and shifted."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


class TanhGELU(nn.Module):
    """A linear layer and the tanh approximation of GELU."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., inner_dim)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """To four times the width, and back.

    `net.1` is the dropout of diffusers.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(TanhGELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The sequence with what the layers make of it, modulated, added."""
        x = x + gate[:, None] * self.net(modulated(x, shift, scale))
        return x


def refuse_attention_options(given: Mapping[str, Any] | None) -> None:
    """Refuse options for attention that is not PyTorch's own.

    Raises:
        ValueError: there are some.
    """
    if given:
        raise ValueError(f"joint_attention_kwargs: {', '.join(given)} is not supported")
