"""`ControlNetModel`: a copy of a UNet's encoder that steers it by an image.

Zhang et al. 2023, https://arxiv.org/abs/2302.05543
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.config import Config, read_config
from . import unet_blocks
from .unet_blocks import Conditioned, MidBlock, make_down_blocks, read_levels, skip_channels

DEFAULTS: dict[str, Any] = {
    **unet_blocks.DEFAULTS,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
CHOICES: dict[str, tuple[Any, ...]] = {
    **unet_blocks.CHOICES,
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
    "global_pool_conditions": (False, True),
}


class ConditioningEmbedding(nn.Module):
    """Convolutions that shrink the conditioning image to the size of the latents."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = list(c.conditioning_embedding_out_channels)
        self.conv_in = nn.Conv2d(c.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], c.block_out_channels[0], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, conditioning_channels, 8 h, 8 w) -> (b, c, h, w)."""
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        x = self.conv_out(x)
        return x


class ControlNetOutput(NamedTuple):
    """What is added inside the UNet, (b, c, h, w) or smaller each.

    To each of its skips, and to the output of its middle block.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


class ControlNetModel(Conditioned):
    """The ControlNet.

    Args:
        config: the content of its `config.json`; absent keys take the defaults of diffusers.

    Raises:
        ValueError: the config asks for something that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        c = read_config("ControlNetModel", config, DEFAULTS, CHOICES, unet_blocks.IRRELEVANT)
        super().__init__(c)
        levels = read_levels(c)
        self.controlnet_cond_embedding = ConditioningEmbedding(c)
        self.down_blocks = make_down_blocks(c, levels)
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, 1) for channels in skip_channels(levels)
        )
        coarsest = levels[-1].channels
        self.controlnet_mid_block = nn.Conv2d(coarsest, coarsest, 1)
        self.mid_block = MidBlock(c, replace(levels[-1], only_cross_attention=False))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput:
        """What to add inside the UNet.

        Args:
            sample: (b, in_channels, h, w).
            timestep: one for all, or (b,).
            encoder_hidden_states: (b, tokens, cross_attention_dim).
            controlnet_cond: the image, (b, conditioning_channels, 8 h, 8 w).
            conditioning_scale: factor of all outputs.
            class_labels: as of the UNet.
            added_cond_kwargs: as of the UNet.
            guess_mode: weaken the outputs, from a tenth at the finest to all of it in the middle
                block.
            return_dict: of no effect; the result is a tuple with names.

        Raises:
            ValueError: a condition that the config requires is missing.
        """
        c = self.config
        emb = self.embed(sample, timestep, class_labels, None, added_cond_kwargs or {})
        image = controlnet_cond
        if c.controlnet_conditioning_channel_order == "bgr":
            image = image.flip(1)
        x = self.conv_in(sample) + self.controlnet_cond_embedding(image)
        x, skips = self.encode(x, emb, encoder_hidden_states)

        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        weakest = -1 if guess_mode and not c.global_pool_conditions else 0
        scales = torch.logspace(weakest, 0, len(convs), device=x.device) * conditioning_scale
        inputs = zip(convs, [*skips, x], scales, strict=True)
        outputs = [conv(y) * scale for conv, y, scale in inputs]
        if c.global_pool_conditions:
            outputs = [output.mean((2, 3), keepdim=True) for output in outputs]
        return ControlNetOutput(tuple(outputs[:-1]), outputs[-1])


class MultiControlNetModel(nn.Module):
    """Several ControlNets whose outputs are added.

    In a repository they are `controlnet`, `controlnet_1`, and so on.
    """

    library = "diffusers"

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)
