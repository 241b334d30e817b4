"""`ControlNetModel`: a copy of a UNet's encoder that steers it by an image.

Zhang et al. 2023, https://arxiv.org/abs/2302.05543
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.config import Config
from ..loading.options import configured
from ..outputs import Output
from .unet import UNet2DConditionModel
from .unet_blocks import (
    DOWN_BLOCKS,
    Blocks,
    Conditioned,
    Depths,
    Each,
    make_down_blocks,
    make_mid_block,
    read_levels,
    text_of,
)


def _silenced(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that gives zeros until it is trained; section 3.1."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _silent(channels: int) -> nn.Conv2d:
    """A layer behind an output of the encoder."""
    return _silenced(nn.Conv2d(channels, channels, 1))


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
        self.conv_out = _silenced(nn.Conv2d(widths[-1], c.block_out_channels[0], 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, conditioning_channels, 8 h, 8 w) -> (b, c, h, w)."""
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        x = self.conv_out(x)
        return x


@dataclass(eq=False)
class ControlNetOutput(Output):
    """What is added inside the UNet, (b, c, h, w) or smaller each.

    To each of its skips, and to the output of its middle block.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


class ControlNetModel(Conditioned):
    """The ControlNet.

    Its options are those of diffusers; see `UNet2DConditionModel`.

    Raises:
        ValueError: the options ask for something that is not implemented.
    """

    @configured
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Blocks = DOWN_BLOCKS,
        mid_block_type: Literal[
            "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
        ] = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: Each = 2,
        downsample_padding: Literal[1] = 1,
        mid_block_scale_factor: Literal[1] = 1,
        act_fn: Literal["silu", "swish"] = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: Each = 1280,
        transformer_layers_per_block: Depths = 1,
        encoder_hid_dim: Literal[None] = None,
        encoder_hid_dim_type: Literal[None] = None,
        attention_head_dim: Each = 8,
        num_attention_heads: Literal[None] = None,
        use_linear_projection: bool = False,
        class_embed_type: Literal[None] = None,
        addition_embed_type: Literal[None, "text_time"] = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: Literal["default"] = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        self._make_embeddings()
        c = self.config
        levels = read_levels(c)
        self.controlnet_cond_embedding = ConditioningEmbedding(c)
        self.down_blocks = nn.ModuleList()
        self.controlnet_down_blocks = nn.ModuleList([_silent(levels[0].channels)])
        for level, block in zip(levels, make_down_blocks(c, levels), strict=True):
            self.down_blocks.append(block)
            for _ in (*block.resnets, *block.downsamplers):
                self.controlnet_down_blocks.append(_silent(level.channels))
        self.controlnet_mid_block = _silent(levels[-1].channels)
        self.mid_block = make_mid_block(c, levels[-1])

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> Self:
        """A ControlNet to be trained: a copy of a UNet's encoder that adds nothing yet."""
        known = inspect.signature(cls.__init__).parameters.keys()
        options = {key: value for key, value in unet.config.items() if key in known}
        net = cls(
            **options,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )
        if load_weights_from_unet:
            copied = net.state_dict()
            weights = unet.state_dict()
            net.load_state_dict({key: weights.get(key, value) for key, value in copied.items()})
        return net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
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
            timestep_cond: as of the UNet.
            attention_mask: None.
            cross_attention_kwargs: None, or empty.
            added_cond_kwargs: as of the UNet.
            guess_mode: weaken the outputs, from a tenth at the finest to all of it in the middle
                block.
            return_dict: False returns a plain tuple.

        Raises:
            ValueError: a condition that the config requires is missing.
        """
        c = self.config
        emb = self.embed(sample, timestep, class_labels, timestep_cond, added_cond_kwargs or {})
        image = controlnet_cond
        if c.controlnet_conditioning_channel_order == "bgr":
            image = image.flip(1)
        x = self.conv_in(sample) + self.controlnet_cond_embedding(image)
        text = text_of(encoder_hidden_states, None, attention_mask, cross_attention_kwargs)
        x, skips = self.encode(x, emb, text)

        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        weakest = -1 if guess_mode and not c.global_pool_conditions else 0
        scales = torch.logspace(weakest, 0, len(convs), device=x.device) * conditioning_scale
        inputs = zip(convs, [*skips, x], scales, strict=True)
        outputs = [conv(y) * scale for conv, y, scale in inputs]
        if c.global_pool_conditions:
            outputs = [output.mean((2, 3), keepdim=True) for output in outputs]
        return ControlNetOutput.asked(return_dict, tuple(outputs[:-1]), outputs[-1])


class MultiControlNetModel(nn.Module):
    """Several ControlNets whose outputs are added.

    In a repository they are `controlnet`, `controlnet_1`, and so on.
    """

    library = "diffusers"

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)
