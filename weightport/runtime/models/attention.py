"""The transformer of the UNet: attention to the image itself and to the text.

Sequences are (b, n, c).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..loading.config import Config
from .layers import GEGLU, attend, check_heads

Projected = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class Kept:
    """What a thread's last context gave.

    The context is held, so that no other tensor takes its memory.
    """

    seen: tuple[Any, ...]
    context: Tensor
    projected: Projected


class ConstantContext:
    """Keys and values of the text, which are the same in every step of a run.

    They are computed once for each of the threads that run the model. Bits do not change.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Kept | None] = {}  # thread -> what it keeps

    def get(self, context: Tensor, project: Callable[[Tensor], Projected]) -> Projected:
        """`project(context)`, or what that gave for the same memory with the same content."""
        thread = get_ident()
        differentiable = torch.is_grad_enabled() and context.requires_grad
        if thread not in self.kept or differentiable or context.is_inference():
            return project(context)
        seen = (context.data_ptr(), context.shape, context.stride(), context._version)
        kept = self.kept[thread]
        if kept is None or kept.seen != seen:
            kept = Kept(seen, context, project(context))
            self.kept[thread] = kept
        return kept.projected


_CHANGING = Lock()  # who may say which layers keep what


@contextmanager
def constant_context(*models: nn.Module) -> Iterator[None]:
    """Within it, the models' cross-attentions keep what they compute of the text in this thread.

    Weights must not change meanwhile.
    """
    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, Attention)]
    thread = get_ident()
    with _CHANGING:
        for layer in layers:
            layer.constant = layer.constant or ConstantContext()
            layer.constant.kept[thread] = None
    try:
        yield
    finally:
        with _CHANGING:
            for layer in layers:
                _let_go(layer, thread)


def _let_go(layer: Attention, thread: int) -> None:
    """Forget what a thread keeps; the last one leaves the layer as it was."""
    if layer.constant is None:
        return
    layer.constant.kept.pop(thread, None)
    if not layer.constant.kept:
        layer.constant = None


class Attention(nn.Module):
    """Attention of (b, n, dim) to (b, m, context_dim), or to itself when no context is given."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.constant: ConstantContext | None = None

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """(b, n, dim) -> (b, n, dim); `bias` as of `attend`."""
        # read once, as another thread may change it; and not when compiled, which would guard it
        constant = None if torch.compiler.is_compiling() else self.constant
        if context is None:
            key, value = self.project(x)
        elif constant is None:
            key, value = self.project(context)
        else:
            key, value = constant.get(context, self.project)
        x = self.to_out(attend(self.to_q(x), key, value, self.heads, bias=bias))
        return x

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to, (b, m, dim) each."""
        return self.to_k(context), self.to_v(context)


class FeedForward(nn.Sequential):
    """GEGLU to four times the width, and back: (b, n, dim) -> (b, n, dim).

    `net.1` is the dropout of diffusers.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))


@dataclass(frozen=True)
class Level:
    """What a config says of one resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depth: int | Sequence[int]  # transformer blocks per attention, or of each
    context_dim: int
    only_cross_attention: bool

    def depths(self, attentions: int) -> list[int]:
        """The transformer blocks of each of so many attentions.

        Raises:
            ValueError: the config has another number of them.
        """
        if isinstance(self.depth, int):
            return [self.depth] * attentions
        if len(self.depth) != attentions:
            raise ValueError(
                f"transformer_layers_per_block = {self.depth!r} must be one value, or"
                f" {attentions}, one for each attention of the block"
            )
        return list(self.depth)


class BasicTransformerBlock(nn.Module):
    """Attention to itself, attention to the text, feed-forward.

    With `only_cross_attention` the first attends to the text as well.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        dim = level.channels
        self.only_cross_attention = level.only_cross_attention
        first_context_dim = level.context_dim if level.only_cross_attention else dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, level.heads, first_context_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, level.heads, level.context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b, n, dim), context (b, m, context_dim) -> (b, n, dim)."""
        first_context = context if self.only_cross_attention else None
        x = self.attn1(self.norm1(x), first_context) + x
        x = self.attn2(self.norm2(x), context, bias) + x
        x = self.ff(self.norm3(x)) + x
        return x


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image, between two projections.

    The projections are convolutions or, with `use_linear_projection`, linear.
    """

    def __init__(self, config: Config, level: Level, depth: int) -> None:
        super().__init__()
        dim = level.channels
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = self._projection(dim)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(level) for _ in range(depth))
        self.proj_out = self._projection(dim)

    def _projection(self, dim: int) -> nn.Module:
        return nn.Linear(dim, dim) if self.linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b, c, h, w), context (b, m, context_dim) -> (b, c, h, w)."""
        height, width = x.shape[-2:]
        h: Tensor = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, bias)
        h = self.proj_out(h) if self.linear else h
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        h = h if x.is_contiguous(memory_format=torch.channels_last) else h.contiguous()
        h = h if self.linear else self.proj_out(h)
        return h + x
