"""Latents to what the caller asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..images import VaeImageProcessor, apply_overlay
from .latents import Codec
from .state import Images, Run


@dataclass(frozen=True)
class Safety:
    """A safety checker, and what prepares images for it."""

    checker: Any
    extractor: Any

    def censor(
        self, pixels: Tensor, processor: VaeImageProcessor, dtype: torch.dtype
    ) -> tuple[Tensor, list[bool]]:
        """The images, black where the checker objects, and where it does."""
        seen = self.extractor(processor.postprocess(pixels), return_tensors="pt")
        clip_input = seen.pixel_values.to(pixels.device, dtype)
        checked, flagged = self.checker(images=pixels, clip_input=clip_input)
        return checked, [bool(flag) for flag in flagged]


def finish(run: Run, latents: Tensor, codec: Codec, safety: Safety | None) -> Images:
    """Decoded, checked, put into the image that they are a part of, and in the form that was asked
    for."""
    beginning = run.arguments.beginning
    output_type = run.arguments.result.output_type
    images: Any = latents
    flagged: list[bool] | None = None
    if output_type != "latent":
        unpacked = codec.unpack(latents, run.size)
        pixels = codec.decode(unpacked, run.beside.pixels, run.beside.pixel_mask)
        if safety is not None:
            pixels, flagged = safety.censor(pixels, codec.images, run.dtype)
        is_signed = [not flag for flag in flagged or [False] * len(pixels)]
        images = codec.images.postprocess(pixels, output_type, is_signed)
    if run.beside.crop is not None:
        mask: Any = beginning.mask_image
        original: Any = beginning.image
        images = [
            apply_overlay(codec.images, mask, original, one, run.beside.crop) for one in images
        ]
    return Images(images, flagged)
