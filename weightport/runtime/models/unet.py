"""`UNet2DConditionModel`: the denoiser of Stable Diffusion 1, 2, XL and their relatives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.options import configured
from ..outputs import Output
from .freeu import FreeU
from .unet_blocks import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    Blocks,
    Conditioned,
    Depths,
    Each,
    Middle,
    UpBlock,
    make_down_blocks,
    make_mid_block,
    read_levels,
    skip_channels,
    text_of,
    upwards,
)


@dataclass(eq=False)
class UNet2DConditionOutput(Output):
    """The prediction, (b, out_channels, h, w)."""

    sample: Tensor


class UNet2DConditionModel(Conditioned):
    """The denoising UNet.

    Its options are those of diffusers. Of the ones that have a single value here, others are
    refused; `attention_head_dim` is the number of heads, in spite of its name; `dropout`,
    `upcast_attention` and `sample_size` change nothing in the model.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    @configured
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: Literal[False] = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Blocks = DOWN_BLOCKS,
        mid_block_type: Middle = "UNetMidBlock2DCrossAttn",
        up_block_types: Blocks = UP_BLOCKS,
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: Each = 2,
        downsample_padding: Literal[1] = 1,
        mid_block_scale_factor: Literal[1] = 1,
        dropout: float = 0.0,
        act_fn: Literal["silu", "swish"] = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: Each = 1280,
        transformer_layers_per_block: Depths = 1,
        reverse_transformer_layers_per_block: Depths | None = None,
        encoder_hid_dim: Literal[None] = None,
        encoder_hid_dim_type: Literal[None] = None,
        attention_head_dim: Each = 8,
        num_attention_heads: Literal[None] = None,
        dual_cross_attention: Literal[False] = False,
        use_linear_projection: bool = False,
        class_embed_type: Literal[None] = None,
        addition_embed_type: Literal[None, "text_time"] = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: Literal["default"] = "default",
        resnet_skip_time_act: Literal[False] = False,
        resnet_out_scale_factor: Literal[1] = 1,
        time_embedding_type: Literal["positional"] = "positional",
        time_embedding_dim: Literal[None] = None,
        time_embedding_act_fn: Literal[None] = None,
        timestep_post_act: Literal[None] = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: Literal[3] = 3,
        conv_out_kernel: Literal[3] = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: Literal["default"] = "default",
        class_embeddings_concat: Literal[False] = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: Literal[None] = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        self._make_embeddings()
        c = self.config
        levels = read_levels(c)
        self.down_blocks = nn.ModuleList(make_down_blocks(c, levels))
        self.up_blocks = nn.ModuleList()  # before the middle, as in the state dict
        channels = levels[-1].channels
        skips = skip_channels(levels)
        self.mid_block = make_mid_block(c, levels[-1])
        for level, kind in zip(upwards(c, levels), c.up_block_types, strict=True):
            last = len(self.up_blocks) == len(levels) - 1
            self.up_blocks.append(UpBlock(c, level, channels, skips, kind, last))
            channels = level.channels

        width = c.block_out_channels[0]
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, c.norm_eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh skips by FreeU, in the two coarsest blocks on the way up.

        Args:
            s1: factor of the lowest frequencies of the skips of the coarsest block.
            s2: of those of the next one.
            b1: factor of half of what comes from below, in the coarsest block.
            b2: in the next one.
        """
        self._weigh_skips([FreeU(b1, s1), FreeU(b2, s2)])

    def disable_freeu(self) -> None:
        """Join skips as they are."""
        self._weigh_skips([])

    def _weigh_skips(self, factors: Sequence[FreeU]) -> None:
        """By factors of the first blocks on the way up."""
        for block, one in itertools.zip_longest(self.up_blocks, factors):
            if block is not None:
                block.freeu = one

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput:
        """Predict the noise, or what else the model was trained to predict.

        Args:
            sample: (b, in_channels, h, w); h and w need not be divisible by anything.
            timestep: one for all, or (b,).
            encoder_hidden_states: (b, tokens, cross_attention_dim).
            class_labels: (b,) for `num_class_embeds`, the upscaler's noise level.
            timestep_cond: (b, time_cond_proj_dim), the embedded guidance scale of LCM.
            attention_mask: None; see `text_of`.
            cross_attention_kwargs: likewise, or empty.
            added_cond_kwargs: `text_embeds` (b, d) and `time_ids` (b, k) of SDXL.
            down_block_additional_residuals: what a ControlNet adds to each skip.
            mid_block_additional_residual: what it adds to the output of the middle block.
            encoder_attention_mask: 1 on tokens to see and 0 on others, (b, tokens).
            return_dict: False returns a plain tuple.

        Raises:
            ValueError: a condition that the config requires is missing.
        """
        emb = self.embed(sample, timestep, class_labels, timestep_cond, added_cond_kwargs or {})
        mask = encoder_attention_mask
        text = text_of(encoder_hidden_states, mask, attention_mask, cross_attention_kwargs)
        x, skips = self.encode(self.conv_in(sample), emb, text)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        if down_block_additional_residuals:
            pairs = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + more for skip, more in pairs]
        for block in self.up_blocks:
            x = block(x, emb, text, skips)
        x = F.silu(self.conv_norm_out(x))
        return UNet2DConditionOutput.asked(return_dict, self.conv_out(x))
