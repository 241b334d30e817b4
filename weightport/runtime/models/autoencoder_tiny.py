"""`AutoencoderTiny`: TAESD, a distilled image autoencoder of a few convolutions.

https://github.com/madebyollin/taesd
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..loading.config import Config
from ..loading.model import Model
from ..loading.options import configured
from ..outputs import Output
from .in_parts import InParts
from .vae import DecoderOutput

_TILE = 512  # pixels, the edge of a tile
_OVERLAP = 0.125  # of the edge
_LIMIT = 3  # beyond which latents are squeezed


class Block(nn.Module):
    """Three convolutions beside a shortcut, (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return torch.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """An image in [-1, 1] (b, in_channels, h, w) -> latents (b, latent_channels, h / 8, w / 8)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = c.encoder_block_out_channels
        self.layers = nn.Sequential()
        for stage, (width, blocks) in enumerate(zip(widths, c.num_encoder_blocks, strict=True)):
            if stage == 0:
                self.layers.append(_convolution(c.in_channels, width))
            else:
                self.layers.append(_convolution(width, width, stride=2, bias=False))
            self.layers.extend(Block(width) for _ in range(blocks))
        self.layers.append(_convolution(widths[-1], c.latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, latent_channels, h / 8, w / 8)."""
        latents: Tensor = self.layers((x + 1) / 2)
        return latents


class Decoder(nn.Module):
    """Latents (b, latent_channels, h, w) -> an image in [-1, 1] (b, out_channels, 8 h, 8 w)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = c.decoder_block_out_channels
        last = len(widths) - 1
        self.layers = nn.Sequential(_convolution(c.latent_channels, widths[0]), nn.ReLU())
        for stage, (width, blocks) in enumerate(zip(widths, c.num_decoder_blocks, strict=True)):
            self.layers.extend(Block(width) for _ in range(blocks))
            if stage < last:
                self.layers.append(nn.Upsample(scale_factor=c.upsampling_scaling_factor))
                self.layers.append(_convolution(width, width, bias=False))
        self.layers.append(_convolution(widths[-1], c.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w)."""
        x = torch.tanh(x / _LIMIT) * _LIMIT
        x = self.layers(x)
        return x * 2 - 1


def _convolution(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


@dataclass(eq=False)
class AutoencoderTinyOutput(Output):
    """What `encode` returns: latents (b, latent_channels, h / 8, w / 8)."""

    latents: Tensor


class AutoencoderTiny(InParts, Model):
    """The autoencoder. Its latents are those of the model that it was distilled from, scaled.

    With tiling, images are taken in tiles of 512 pixels.

    Its options are those of diffusers; `force_upcast`, `scaling_factor` and `shift_factor` matter
    to pipelines alone, `latent_magnitude` and `latent_shift` to those who store latents as images.

    Raises:
        ValueError: the options ask for something that is not implemented, or widths and numbers of
            blocks are not of one length.
    """

    irrelevant = frozenset({"block_out_channels"})

    @configured
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        decoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        act_fn: Literal["relu"] = "relu",
        upsample_fn: Literal["nearest"] = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        num_decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        c = self.config
        for half in ("encoder", "decoder"):
            widths = c[f"{half}_block_out_channels"]
            blocks = c[f"num_{half}_blocks"]
            if len(widths) != len(blocks):
                raise ValueError(
                    f"AutoencoderTiny: num_{half}_blocks = {blocks!r} must have a number for each"
                    f" of {half}_block_out_channels"
                )
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.register_to_config(block_out_channels=c.decoder_block_out_channels)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents -> [0, 1], as an image could store them."""
        c = self.config
        scaled: Tensor = x / (2 * c.latent_magnitude) + c.latent_shift
        return scaled.clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """[0, 1] -> latents."""
        c = self.config
        unscaled: Tensor = (x - c.latent_shift) * (2 * c.latent_magnitude)
        return unscaled

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput:
        """An image in [-1, 1] becomes its latents.

        (b, in_channels, h, w) -> (b, latent_channels, h / 8, w / 8).
        """
        latents = self._in_parts(self.encoder, x, 1 / self._edge)
        return AutoencoderTinyOutput.asked(return_dict, latents)

    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput:
        """Latents become an image, about in [-1, 1].

        (b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w).
        """
        return DecoderOutput.asked(return_dict, self._in_parts(self.decoder, x, self._edge))

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput:
        """An image encoded, rounded to the bytes of an image of latents, and decoded again."""
        latents = self.encode(sample).latents
        stored = (self.scale_latents(latents) * 255).round().byte()
        return self.decode(self.unscale_latents(stored / 255.0), return_dict=return_dict)

    @property
    def _edge(self) -> int:
        """Pixels for each latent, on an edge."""
        stages = len(self.config.decoder_block_out_channels)
        factor: int = self.config.upsampling_scaling_factor ** (stages - 1)
        return factor

    def _in_parts(self, function: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
        """`function` of whole images or, as slicing and tiling ask for, of parts of them."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_parts(function, one, scale) for one in x.chunk(len(x))])
        tile_in = _TILE if scale < 1 else _TILE // self._edge
        if self.use_tiling:
            return in_tiles(function, x, tile_in, scale)
        return function(x)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile_in: int, scale: float) -> Tensor:
    """`function` of tiles of `x` that overlap by an eighth, where one result fades into the next.

    Args:
        function: maps tiles of any edge to tiles that are `scale` times as large.
        x: (b, c, h, w).
        tile_in: the edge of a tile of `x`.
        scale: how much larger the result is than `x`.
    """
    overlap = int(tile_in * _OVERLAP)
    stride = tile_in - overlap
    edge = torch.arange(int(tile_in * scale), device=x.device) / (int(overlap * scale) - 1)
    share = edge.clamp(0, 1)
    height, width = (int(size * scale) for size in x.shape[-2:])
    out: Tensor | None = None
    for top in range(0, x.shape[-2], stride):
        for left in range(0, x.shape[-1], stride):
            tile = function(x[..., top : top + tile_in, left : left + tile_in])
            rows, columns = tile.shape[-2:]
            if out is None:
                out = tile.new_zeros(*tile.shape[:2], height, width)
            first_row, first_column = int(top * scale), int(left * scale)
            before = out[..., first_row : first_row + rows, first_column : first_column + columns]
            down = share[:rows, None] if top else torch.ones(rows, 1, device=x.device)
            right = share[None, :columns] if left else torch.ones(1, columns, device=x.device)
            mask = (down * right).to(tile)
            before.copy_(mask * tile + (1 - mask) * before)
    assert out is not None
    return out
