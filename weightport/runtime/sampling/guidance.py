"""Guidance: how the prompt leads away from what the model would draw without it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Dials:
    """What callbacks read and turn while a run goes on; pipelines show it under diffusers'
    names."""

    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.5
    guidance_rescale: float = 0.0
    true_cfg_scale: float = 1.0
    clip_skip: int | None = None
    num_timesteps: int = 0
    interrupt: bool = False


@dataclass
class Guide:
    """Classifier-free guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598).

    Attributes:
        dials: its weights.
        is_condition: whether the model has the scale as a condition, and needs no second branch.
        by_image: InstructPix2Pix's three branches (Brooks et al.,
            https://arxiv.org/abs/2211.09800, equation 3).
        is_beside: whether the model has a guidance scale as a condition, and is guided by another
            one beside it.
    """

    dials: Dials
    is_condition: bool
    by_image: bool = False
    is_beside: bool = False

    @property
    def scale(self) -> float:
        """Weight of the prompt against the negative prompt."""
        return self.dials.true_cfg_scale if self.is_beside else self.dials.guidance_scale

    @property
    def branches(self) -> int:
        """How often the model sees each image in a step: once without guidance, twice with it."""
        guided = self.scale > 1 and not self.is_condition
        if self.by_image:
            return 3 if guided and self.dials.image_guidance_scale >= 1 else 1
        return 2 if guided else 1

    def join(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        """The rows of a condition in the order of the branches."""
        if negative is None or self.branches == 1:
            return positive
        by_image = self.branches == 3
        return torch.cat([positive, negative, negative] if by_image else [negative, positive])

    def repeat(self, x: Tensor) -> Tensor:
        """What is the same in all branches: a row for each row of the model's batch."""
        return torch.cat([x] * self.branches)

    def guide(self, prediction: Tensor) -> Tensor:
        """Predictions of all branches -> one."""
        if self.branches == 1:
            return prediction
        scale = self.scale
        if self.branches == 3:
            text, image, none = prediction.chunk(3)
            image_scale = self.dials.image_guidance_scale
            guided = none + scale * (text - image) + image_scale * (image - none)
        else:
            none, text = prediction.chunk(2)
            guided = none + scale * (text - none)
        share = self.dials.guidance_rescale
        if share > 0:
            dims = list(range(1, text.ndim))
            rescaled = guided * (text.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
            guided = share * rescaled + (1 - share) * guided
        return guided


def embed_guidance(guidance_scale: float, dim: int) -> Tensor:
    """Sinusoidal features (1, dim) of the guidance scale, for a UNet that has it as a condition.

    Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142; the frequencies are
    LCM's.
    """
    half = dim // 2
    rate = -(math.log(10000) / (half - 1))
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * rate)
    angles = (torch.tensor([guidance_scale - 1]) * 1000)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(waves, (0, dim % 2))
