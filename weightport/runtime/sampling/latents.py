"""Images to latents and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Literal

import torch
from torch import Tensor

from ..images import VaeImageProcessor
from ..models.asymmetric_vae import AsymmetricAutoencoderKL
from ..models.autoencoder_tiny import AutoencoderTinyOutput
from ..models.autoencoders import Autoencoder
from ..models.vae import drawn
from .arguments import Size, require
from .noise import Noise

_WIDENING = RLock()  # whose VAE is in float32 for a while


@dataclass(frozen=True)
class Statistics:
    """What makes the VAE's latents those that the model was trained on: a mean and a deviation for
    each channel, and a scale."""

    mean: Tensor | float
    std: Tensor | float
    scale: float

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the VAE -> of the model."""
        return (latents - self.mean) * self.scale / self.std

    def restore(self, latents: Tensor) -> Tensor:
        """Latents of the model -> of the VAE."""
        return latents * self.std / self.scale + self.mean


@dataclass(frozen=True)
class Codec:
    """A VAE with the statistics of its latents, and what images go through on the way.

    Attributes:
        vae: None where a pipeline has none, which then makes latents only.
        may_widen: whether the VAE's config decides if 16 bits are enough for it: SDXL's.
        resample: the filter for PIL images.
        latent_channels: an image of so many channels is taken for latents; those of the VAE if
            None.
        processor: what images go through in place of what the VAE needs.
        is_shifted: whether the VAE's latents have a mean, as those of flows.
    """

    vae: Autoencoder | None
    may_widen: bool = False
    resample: Literal["lanczos", "bicubic"] = "lanczos"
    latent_channels: int | None = None
    processor: VaeImageProcessor | None = None
    is_shifted: bool = False

    @property
    def model(self) -> Autoencoder:
        """The VAE.

        Raises:
            ValueError: there is none.
        """
        if self.vae is None:
            raise ValueError("the pipeline has no vae")
        return self.vae

    @property
    def scale_factor(self) -> int:
        """Pixels for each latent, on an edge; without a VAE 8, as in most of this family."""
        if self.vae is None:
            return 8
        halvings = len(self.vae.config.block_out_channels) - 1
        return int(2**halvings)

    @property
    def multiple(self) -> int:
        """What heights and widths are multiples of, in pixels."""
        return self.scale_factor

    @property
    def images(self) -> VaeImageProcessor:
        """What images go through."""
        if self.processor is not None:
            return self.processor
        channels = self.latent_channels or self.model.config.latent_channels
        return VaeImageProcessor(True, self.multiple, channels, self.resample)

    @property
    def masks(self) -> VaeImageProcessor:
        """What masks go through."""
        return VaeImageProcessor(
            vae_scale_factor=self.multiple,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @property
    def controls(self) -> VaeImageProcessor:
        """What the images of ControlNets go through."""
        return VaeImageProcessor(vae_scale_factor=self.scale_factor, do_normalize=False)

    def shape(self, rows: int, channels: int, size: Size) -> tuple[int, ...]:
        """Of the latents of so many images."""
        height, width = (edge // self.multiple * self.multiple for edge in size)
        return (rows, channels, height // self.scale_factor, width // self.scale_factor)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the model takes them: here as they are."""
        return latents

    def pack_mask(self, mask: Tensor, channels: int) -> Tensor:
        """A mask (b, 1, h, w) for latents of so many channels, as the model takes these."""
        return mask

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """Latents of images of a size, as the VAE takes them."""
        return latents

    def pixels(self, latents: Tensor) -> Size:
        """The height and width of what the VAE makes of latents."""
        height, width = latents.shape[-2:]
        return height * self.scale_factor, width * self.scale_factor

    def is_encoded(self, image: Tensor) -> bool:
        """Whether an image comes as latents."""
        config = self.model.config
        return bool(image.shape[1] == config.latent_channels != config.in_channels)

    def statistics(self, latents: Tensor) -> Statistics:
        """Those of the VAE's config, where and in what the latents are."""
        config = self.model.config
        scale = float(config.scaling_factor)
        mean = config.get("latents_mean")
        std = config.get("latents_std")
        if self.is_shifted:
            return Statistics(float(config.get("shift_factor") or 0.0), 1.0, scale)
        if mean is None or std is None:
            return Statistics(0.0, 1.0, scale)
        means = torch.tensor(mean).view(1, -1, 1, 1).to(latents)
        deviations = torch.tensor(std).view(1, -1, 1, 1).to(latents)
        return Statistics(means, deviations, scale)

    @contextmanager
    def _wide(self, *dtypes: torch.dtype) -> Iterator[tuple[Autoencoder, torch.dtype]]:
        """The VAE and its dtype; if that is one of these, and its config asks for it, the VAE is in
        float32 meanwhile, and no other thread has it."""
        vae = self.model
        if not (self.may_widen and vae.config.get("force_upcast", True)):
            yield vae, vae.dtype
            return
        with _WIDENING:
            dtype = vae.dtype
            try:
                yield vae.to(torch.float32) if dtype in dtypes else vae, dtype
            finally:
                if dtype in dtypes:
                    vae.to(dtype)

    def encode(self, image: Tensor, noise: Noise | None) -> Tensor:
        """Pixels (b, 3, h, w) -> unscaled latents: random ones, or without noise the most
        probable."""
        generator = None if noise is None else noise.generator
        seeds = generator if isinstance(generator, list) else [generator]
        with self._wide(torch.float16, torch.bfloat16) as (vae, dtype):
            image = image.to(vae.device, dtype)  # rounded even where the VAE computes in more
            image = image.to(vae.dtype)
            parts = image.chunk(len(image)) if isinstance(generator, list) else [image]
            found = []
            for part, seed in zip(parts, seeds, strict=False):
                found.append(_drawn(vae, part, noise is not None, seed))
            return torch.cat(found)

    def to_latents(self, image: Tensor, noise: Noise, rows: int) -> Tensor:
        """An image as scaled latents, one row for each result; what comes as latents stays what it
        is."""
        if not self.is_encoded(image):
            latents = self.encode(image, noise).to(noise.dtype)
            image = self.statistics(latents).normalise(latents)
        return tile(image.to(noise.device, noise.dtype), rows).contiguous()

    def decode(
        self, latents: Tensor, original: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Scaled latents -> pixels (b, 3, h, w).

        Args:
            latents: (b, c, h, w).
            original: the image that was painted on, for a decoder that takes it.
            mask: where it was painted, likewise.
        """
        with self._wide(torch.float16) as (vae, _):
            latents = latents.to(vae.dtype)
            unscaled = self.statistics(latents).restore(latents)
            if not isinstance(vae, AsymmetricAutoencoderKL) or original is None or mask is None:
                return vae.decode(unscaled).sample
            image = tile(original.to(latents), len(latents))
            painted = tile(mask.to(latents), len(latents))
            return vae.decode(unscaled, image=image, mask=painted).sample


@dataclass(frozen=True)
class PackedCodec(Codec):
    """A VAE for a model that takes latents as a sequence of patches of 2 x 2, as Flux does."""

    @property
    def multiple(self) -> int:
        """Two latents, in pixels."""
        return 2 * self.scale_factor

    def pack(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h / 2 · w / 2, c · 4)."""
        rows, channels, height, width = latents.shape
        split = latents.view(rows, channels, height // 2, 2, width // 2, 2)
        patches = split.permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(rows, height // 2 * (width // 2), channels * 4)

    def pack_mask(self, mask: Tensor, channels: int) -> Tensor:
        """(b, 1, h, w) -> (b, h / 2 · w / 2, channels · 4)."""
        return self.pack(mask.repeat(1, channels, 1, 1))

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """The way back.

        Raises:
            ValueError: there is another number of patches.
        """
        rows, channels, height, width = self.shape(len(latents), latents.shape[-1] // 4, size)
        patches = height // 2 * (width // 2)
        fits = latents.shape[1] == patches
        require(fits, f"latents must have {patches} patches, as height and width ask for")
        split = latents.view(rows, height // 2, width // 2, channels, 2, 2)
        return split.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def _drawn(
    vae: Autoencoder, image: Tensor, at_random: bool, generator: torch.Generator | None
) -> Tensor:
    """The latents of an image: random ones, or the most probable; a tiny VAE has no others."""
    encoded = vae.encode(image)
    if isinstance(encoded, AutoencoderTinyOutput):
        return encoded.latents
    return drawn(encoded.latent_dist, at_random, generator)


def tile(x: Tensor, rows: int) -> Tensor:
    """Repeat a batch as a whole up to `rows`.

    Raises:
        ValueError: it does not divide them.
    """
    require(rows % len(x) == 0, f"{len(x)} images cannot be shared by {rows} results")
    return torch.cat([x] * (rows // len(x)))
