"""`UNet2DConditionModel`: the denoiser of Stable Diffusion 1, 2, XL and their relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.config import read_config
from . import unet_blocks
from .unet_blocks import (
    Conditioned,
    MidBlock,
    UpBlock,
    make_down_blocks,
    read_levels,
    skip_channels,
)

DEFAULTS: dict[str, Any] = {
    **unet_blocks.DEFAULTS,
    "out_channels": 4,
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ],
    "time_cond_proj_dim": None,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    **unet_blocks.CHOICES,
    "attention_type": ("default",),
    "time_embedding_type": ("positional",),
    "resnet_out_scale_factor": (1,),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    **dict.fromkeys(("center_input_sample", "class_embeddings_concat"), (False,)),
    **dict.fromkeys(("dual_cross_attention", "resnet_skip_time_act"), (False,)),
    **dict.fromkeys(
        ("cross_attention_norm", "reverse_transformer_layers_per_block", "timestep_post_act"),
        (None,),
    ),
    **dict.fromkeys(("time_embedding_act_fn", "time_embedding_dim"), (None,)),
}


class UNet2DConditionOutput(NamedTuple):
    """The prediction, (b, out_channels, h, w)."""

    sample: Tensor


class UNet2DConditionModel(Conditioned):
    """The denoising UNet.

    Args:
        config: the content of `unet/config.json`; absent keys take the defaults of diffusers.

    Raises:
        ValueError: the config asks for something that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(
            read_config("UNet2DConditionModel", config, DEFAULTS, CHOICES, unet_blocks.IRRELEVANT)
        )
        c = self.config
        levels = read_levels(c)
        self.down_blocks = make_down_blocks(c, levels)
        self.up_blocks = nn.ModuleList()  # before the middle, as in the state dict
        channels = levels[-1].channels
        skips = skip_channels(levels)
        self.mid_block = MidBlock(c, replace(levels[-1], only_cross_attention=False))
        for level, kind in zip(reversed(levels), c.up_block_types, strict=True):
            last = len(self.up_blocks) == len(levels) - 1
            self.up_blocks.append(UpBlock(c, level, channels, skips, kind, last))
            channels = level.channels

        width = c.block_out_channels[0]
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, c.norm_eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput:
        """Predict the noise, or what else the model was trained to predict.

        Args:
            sample: (b, in_channels, h, w); h and w need not be divisible by anything.
            timestep: one for all, or (b,).
            encoder_hidden_states: (b, tokens, cross_attention_dim).
            class_labels: (b,) for `num_class_embeds`, the upscaler's noise level.
            timestep_cond: (b, time_cond_proj_dim), the embedded guidance scale of LCM.
            added_cond_kwargs: `text_embeds` (b, d) and `time_ids` (b, k) of SDXL.
            down_block_additional_residuals: what a ControlNet adds to each skip.
            mid_block_additional_residual: what it adds to the output of the middle block.
            return_dict: of no effect; the result is a tuple with names.

        Raises:
            ValueError: a condition that the config requires is missing.
        """
        emb = self.embed(sample, timestep, class_labels, timestep_cond, added_cond_kwargs or {})
        x, skips = self.encode(self.conv_in(sample), emb, encoder_hidden_states)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        if down_block_additional_residuals:
            pairs = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + more for skip, more in pairs]
        for block in self.up_blocks:
            x = block(x, emb, encoder_hidden_states, skips)
        x = F.silu(self.conv_norm_out(x))
        return UNet2DConditionOutput(self.conv_out(x))
