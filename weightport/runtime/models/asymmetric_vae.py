"""`AsymmetricAutoencoderKL`: an image autoencoder whose decoder is told what must stay.

Zhu et al. 2023, https://arxiv.org/abs/2306.04632.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...io.heap import keep_freed_memory
from ..loading.config import Config
from ..loading.model import Model
from ..loading.options import configured
from .vae import (
    AutoencoderKLOutput,
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
    check_kinds,
    drawn,
)

_HALVINGS = 3  # of the condition's resolution


class MaskConditionEncoder(nn.Module):
    """The part of an image that stays, at every resolution of the decoder."""

    def __init__(self, inputs: int, first: int, deepest: int) -> None:
        super().__init__()
        widths = [min(first * 2**stage, deepest) for stage in range(_HALVINGS + 1)]
        self.layers = nn.Sequential()
        for number, width in enumerate([*widths, deepest]):
            if number < 2:
                self.layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            else:
                self.layers.append(nn.Conv2d(inputs, width, 4, stride=2, padding=1))
            inputs = width

    def forward(self, x: Tensor) -> dict[torch.Size, Tensor]:
        """(b, out_channels, h, w) -> shape -> features of that shape; the deepest layer wins."""
        features = {}
        for layer in self.layers:
            x = layer(x)
            features[x.shape] = x
            x = torch.relu(x)
        return features


class MaskConditionDecoder(Decoder):
    """Latents (b, latent_channels, h, w) -> image (b, out_channels, 8 h, 8 w), in which the part
    of another image that a mask leaves shows through."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        widths = c.block_out_channels
        self.condition_encoder = MaskConditionEncoder(c.out_channels, widths[0], widths[-1])

    def forward(self, x: Tensor, image: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w).

        Args:
            x: the latents.
            image: (b, out_channels, 8 h, 8 w), in [-1, 1].
            mask: (b, 1, 8 h, 8 w), 1 where the latents decide, 0 where the image does.
        """
        if image is None or mask is None:
            return super().forward(x)
        features = self.condition_encoder((1 - mask) * image)
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = _blended(x, features, F.interpolate(mask, size=x.shape[-2:], mode="nearest"))
            x = block(x)
        x = _blended(x, features, mask)
        x = F.silu(self.conv_norm_out(x))
        return self.conv_out(x)  # type: ignore[no-any-return]


def _blended(x: Tensor, features: dict[torch.Size, Tensor], mask: Tensor) -> Tensor:
    if x.shape not in features:
        raise ValueError(
            f"the decoder's features {[*x.shape]} have no counterpart in the image: its widths must"
            " double from stage to stage, and the image must be of the size that is decoded"
        )
    return x * mask + features[x.shape] * (1 - mask)


class AsymmetricAutoencoderKL(Model):
    """The autoencoder.

    Latents are unscaled here: callers multiply by `config.scaling_factor` on the way to the UNet.

    Its options are those of diffusers; `sample_size` and `scaling_factor` matter to pipelines
    alone.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    irrelevant = frozenset({"force_upcast", "block_out_channels"})

    @configured
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        down_block_out_channels: Sequence[int] = (64,),
        layers_per_down_block: int = 1,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        up_block_out_channels: Sequence[int] = (64,),
        layers_per_up_block: int = 1,
        act_fn: Literal["silu", "swish"] = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        c = self.config
        latents = c.latent_channels
        for half in ("down", "up"):
            check_kinds(self, f"{half}_block_types", f"{half}_block_out_channels")
        self.encoder = Encoder(_half(c, "down"))
        self.decoder = MaskConditionDecoder(_half(c, "up"))
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.register_to_config(block_out_channels=c.up_block_out_channels, force_upcast=False)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        """An image in [-1, 1] becomes the distribution of its latents.

        (b, in_channels, h, w) -> (b, latent_channels, h / 8, w / 8).
        """
        keep_freed_memory()
        moments = self.quant_conv(self.encoder(x))
        return AutoencoderKLOutput.asked(return_dict, DiagonalGaussianDistribution(moments))

    def decode(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput:
        """Latents become an image, about in [-1, 1].

        (b, latent_channels, h, w) -> (b, out_channels, 8 h, 8 w).

        Args:
            z: the latents.
            generator: of no use here.
            image: what stays where the mask is 0, (b, out_channels, 8 h, 8 w).
            mask: (b, 1, 8 h, 8 w).
            return_dict: a tuple if False.

        Raises:
            ValueError: the image is of another size than what is decoded.
        """
        keep_freed_memory()
        decoded = self.decoder(self.post_quant_conv(z), image, mask)
        return DecoderOutput.asked(return_dict, decoded)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput:
        """An image encoded and decoded again, what the mask leaves of it taken as it is."""
        latents = drawn(self.encode(sample).latent_dist, sample_posterior, generator)
        return self.decode(latents, generator, sample, mask, return_dict)


def _half(c: Config, half: str) -> Config:
    """The config of the half of an `AutoencoderKL` that this one's is like."""
    return Config(
        {
            **c,
            "block_out_channels": c[f"{half}_block_out_channels"],
            "layers_per_block": c[f"layers_per_{half}_block"],
            "mid_block_add_attention": True,
        }
    )
