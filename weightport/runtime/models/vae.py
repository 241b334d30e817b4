"""`AutoencoderKL`: the image autoencoder of latent diffusion.

Rombach et al. 2021, https://arxiv.org/abs/2112.10752.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...io.heap import keep_freed_memory
from ..loading.config import Config
from ..loading.model import Model
from ..loading.options import configured
from ..outputs import Output
from .in_parts import InParts
from .layers import Downsample2D, ResnetBlock2D, Upsample2D, attend

BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
"""Option -> the kind of block; with attention its name begins with `Attn`."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
EPS = 1e-6  # of every GroupNorm


class AttentionBlock(nn.Module):
    """Attention of an image to itself, with one head as wide as the image is deep."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        h: Tensor = self.group_norm(x.flatten(2)).transpose(1, 2)
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return h.transpose(1, 2).reshape(x.shape) + x


class MidBlock(nn.Module):
    """Residual block, attention if there is any, residual block."""

    def __init__(self, channels: int, groups: int, has_attention: bool = True) -> None:
        super().__init__()
        self.attentions = nn.ModuleList()  # first in the state dict
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups, EPS)])
        if has_attention:
            self.attentions.append(AttentionBlock(channels, groups))
        self.resnets.append(ResnetBlock2D(channels, channels, groups, EPS))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        x = self.resnets[1](x)
        return x


class AttentiveLevel(nn.Module):
    """`AttnDownEncoderBlock2D` or `AttnUpDecoderBlock2D`: attention after each residual block."""

    def __init__(
        self,
        attentions: nn.ModuleList,
        resnets: nn.Sequential,
        name: str,
        samplers: nn.Sequential,
    ) -> None:
        super().__init__()
        self.attentions = attentions
        self.resnets = resnets
        self.add_module(name, samplers)
        self._samplers = name

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, h', w')."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        samplers: nn.Sequential = getattr(self, self._samplers)
        sampled: Tensor = samplers(x)
        return sampled


def make_levels(
    config: Config, kinds: list[str], widths: list[int], layers: int, name: str
) -> nn.Sequential:
    """`DownEncoderBlock2D`s or `UpDecoderBlock2D`s: residual blocks, then another resolution.

    The last one keeps its resolution.

    Args:
        config: of the autoencoder.
        kinds: of each level, in the order of the computation.
        widths: its channels.
        layers: residual blocks of a level.
        name: what the state dict calls the samplers.
    """
    sampler = Downsample2D if name == "downsamplers" else Upsample2D
    groups = config.norm_num_groups
    levels = nn.Sequential()
    before = widths[0]
    for kind, width in zip(kinds, widths, strict=True):
        last = len(levels) == len(widths) - 1
        resnets = nn.Sequential()
        attentions = nn.ModuleList()
        for _ in range(layers):
            resnets.append(ResnetBlock2D(before, width, groups, EPS))
            if kind.startswith("Attn"):
                attentions.append(AttentionBlock(width, groups))
            before = width
        samplers = nn.Sequential() if last else nn.Sequential(sampler(width))
        if attentions:
            levels.append(AttentiveLevel(attentions, resnets, name, samplers))
        else:
            levels.append(nn.Sequential(OrderedDict({"resnets": resnets, name: samplers})))
    return levels


def check_kinds(model: Model, option: str, widths: str) -> None:
    """Refuse kinds of blocks that are not there.

    Args:
        model: an autoencoder.
        option: of its config, one of `BLOCK_TYPES`.
        widths: the option that says the channels of the same blocks.

    Raises:
        ValueError: a kind is another one, or there is not one for each width.
    """
    kinds = model.config[option]
    kind = BLOCK_TYPES[option]
    known = {kind, f"Attn{kind}"}
    if len(kinds) != len(model.config[widths]) or not known.issuperset(kinds):
        raise ValueError(
            f"{type(model).__name__}: {option} = {kinds!r} must be [Attn]{kind} for each of"
            f" {widths}"
        )


class Encoder(nn.Sequential):
    """The image becomes the moments of its latents.

    (b, in_channels, h, w) -> (b, 2 latent_channels, h / 8, w / 8).
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = list(c.block_out_channels)
        groups = c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        kinds = list(c.down_block_types)
        self.down_blocks = make_levels(c, kinds, widths, c.layers_per_block, "downsamplers")
        self.mid_block = MidBlock(widths[-1], groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)


class Decoder(nn.Module):
    """Latents (b, latent_channels, h, w) -> image (b, out_channels, 8 h, 8 w)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = list(c.block_out_channels)[::-1]
        groups = c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        kinds = list(c.up_block_types)
        self.up_blocks = nn.Sequential()  # before the middle, as in the state dict
        self.mid_block = MidBlock(widths[0], groups, c.mid_block_add_attention)
        self.up_blocks = make_levels(c, kinds, widths, c.layers_per_block + 1, "upsamplers")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w)."""
        x = self.conv_in(x)
        x = self.mid_block(x)
        x = self.up_blocks(x)
        x = F.silu(self.conv_norm_out(x))
        x = self.conv_out(x)
        return x


class DiagonalGaussianDistribution:
    """The distribution of an image's latents, from its moments (b, 2 latent_channels, h, w)."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = (0.5 * self.logvar).exp()
        self.var = self.logvar.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents at random.

        The noise is drawn on the generator's device, so that a CPU seed gives one image.
        """
        mean = self.mean
        device = generator.device if generator else mean.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + self.std * noise.to(mean.device)

    def mode(self) -> Tensor:
        """The most probable latents."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """The divergence from another distribution, (b,); by default from the standard normal one.

        Kingma and Welling 2013, appendix B.
        """
        if other is None:
            parts = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            gap = (self.mean - other.mean) ** 2
            parts = gap / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * parts.sum((1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """The negative logarithm of the density at latents, summed over `dims`."""
        parts = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * parts.sum(tuple(dims))


def drawn(
    posterior: DiagonalGaussianDistribution, at_random: bool, generator: torch.Generator | None
) -> Tensor:
    """Latents at random, or the most probable ones."""
    return posterior.sample(generator) if at_random else posterior.mode()


@dataclass(eq=False)
class AutoencoderKLOutput(Output):
    """What `encode` returns."""

    latent_dist: DiagonalGaussianDistribution


@dataclass(eq=False)
class DecoderOutput(Output):
    """What `decode` returns: the image, (b, out_channels, 8 h, 8 w)."""

    sample: Tensor


class AutoencoderKL(InParts, Model):
    """The autoencoder. With tiling, images larger than `sample_size` are taken in tiles.

    Latents are unscaled here: callers multiply by `config.scaling_factor` on the way to the UNet.

    Its options are those of diffusers; `force_upcast`, `sample_size` and what latents are shifted
    and scaled by matter to pipelines alone.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    irrelevant = frozenset({"force_upcast"})

    @configured
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: Literal["silu", "swish"] = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] | None = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        c = self.config
        for option in BLOCK_TYPES:
            check_kinds(self, option, "block_out_channels")
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = _mixing(2 * c.latent_channels if c.use_quant_conv else 0)
        self.post_quant_conv = _mixing(c.latent_channels if c.use_post_quant_conv else 0)

    @classmethod
    def rename(cls, key: str) -> str | None:
        """Files from before diffusers 0.18 have other names in attention."""
        if ".attentions." in key:
            for old, new in OLD_ATTENTION.items():
                key = key.replace(f".{old}.", f".{new}.")
        return key

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        """An image in [-1, 1] becomes the distribution of its latents.

        (b, in_channels, h, w) -> (b, latent_channels, h / 8, w / 8).
        """
        keep_freed_memory()
        pixels, latents = self._tile_sizes()
        moments = self._in_parts(lambda x: self.quant_conv(self.encoder(x)), x, pixels, latents)
        return AutoencoderKLOutput.asked(return_dict, DiagonalGaussianDistribution(moments))

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput:
        """Latents become an image, about in [-1, 1].

        (b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w).
        """
        keep_freed_memory()
        pixels, latents = self._tile_sizes()
        image = self._in_parts(lambda z: self.decoder(self.post_quant_conv(z)), z, latents, pixels)
        return DecoderOutput.asked(return_dict, image)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput:
        """An image encoded and decoded again: by the most probable latents, or by random ones."""
        latents = drawn(self.encode(sample).latent_dist, sample_posterior, generator)
        return self.decode(latents, return_dict)

    def _tile_sizes(self) -> tuple[int, int]:
        """The edge of a tile, in pixels and in latents."""
        size = self.config.get("sample_size") or 32
        pixels = size[0] if isinstance(size, (list, tuple)) else size
        halvings = len(self.config.block_out_channels) - 1
        return pixels, int(pixels / 2**halvings)

    def _in_parts(
        self, function: Callable[[Tensor], Tensor], x: Tensor, tile_in: int, tile_out: int
    ) -> Tensor:
        """`function` of whole images or, as slicing and tiling ask for, of parts of them."""
        if self.use_slicing and len(x) > 1:
            images = x.chunk(len(x))
            return torch.cat([self._in_parts(function, x, tile_in, tile_out) for x in images])
        if self.use_tiling and max(x.shape[-2:]) > tile_in:
            return in_tiles(function, x, tile_in, tile_out)
        return function(x)


def _mixing(channels: int) -> nn.Module:
    """A 1x1 convolution of so many channels; of none, nothing."""
    return nn.Conv2d(channels, channels, 1) if channels else nn.Identity()


def in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, tile_in: int, tile_out: int
) -> Tensor:
    """`function` of tiles of `x` that overlap by a quarter, where one result fades into the next.

    Args:
        function: maps tiles of edge `tile_in` to tiles of edge `tile_out`.
        x: (b, c, h, w).
        tile_in: the edge of a tile of `x`.
        tile_out: the edge of what becomes of it.
    """
    stride = int(tile_in * 0.75)
    overlap = int(tile_out * 0.25)
    kept = tile_out - overlap
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[-2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[-1], stride):
            tile = function(x[..., top : top + tile_in, left : left + tile_in])
            if above:
                fade(above[len(row)], tile, overlap, dim=-2)
            if row:
                fade(row[-1], tile, overlap, dim=-1)
            row.append(tile)
        rows.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def fade(before: Tensor, after: Tensor, overlap: int, dim: int) -> None:
    """Let the first rows or columns of `after` come out of the last ones of `before`, in place."""
    n = min(before.shape[dim], after.shape[dim], overlap)
    share = torch.arange(n, dtype=torch.float64) / n
    shape = (-1, 1) if dim == -2 else (-1,)
    old = (1 - share).view(shape).to(after)
    new = share.view(shape).to(after)
    tail = before.narrow(dim, before.shape[dim] - n, n)
    head = after.narrow(dim, 0, n)
    head.copy_(tail * old + head * new)
