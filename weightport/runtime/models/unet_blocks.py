"""What the UNet and its ControlNet are made of: embeddings of the conditions, and the blocks of
each resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.config import Config
from ..loading.model import Model
from .attention import Level, Transformer2DModel
from .layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Upsample2D, timestep_embedding

# options that a UNet and its ControlNet have
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),  # two names of one function
    "addition_embed_type": (None, "text_time"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (
        None,
    ),  # diffusers refuses it too: the number of heads is `attention_head_dim`
    "resnet_time_scale_shift": ("default",),
    **dict.fromkeys(("downsample_padding", "mid_block_scale_factor"), (1,)),
    **dict.fromkeys(("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
}
IRRELEVANT = {
    "addition_embed_type_num_heads",  # of another addition_embed_type
    "dropout",  # training
    "mid_block_only_cross_attention",  # of another mid_block_type
    "sample_size",  # read by pipelines
    # precision of attention scores; F.scaled_dot_product_attention accumulates in float32
    "upcast_attention",
    # written by diffusers' EMAModel into the config of the averaged model
    *(
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    ),
}


class Block(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the block has any."""

    def __init__(self, c: Config, level: Level, resnet_inputs: list[int], attentions: int) -> None:
        super().__init__()
        width, groups, time_dim = level.channels, c.norm_num_groups, 4 * c.block_out_channels[0]
        self.attentions = nn.ModuleList(Transformer2DModel(c, level) for _ in range(attentions))
        self.resnets = nn.ModuleList(
            ResnetBlock2D(n, width, groups, c.norm_eps, time_dim) for n in resnet_inputs
        )

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Residual block `i`, then attention `i` where there is one."""
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if self.attentions else x


class DownBlock(Block):
    """`CrossAttnDownBlock2D` or `DownBlock2D`."""

    def __init__(self, c: Config, level: Level, in_channels: int, kind: str, last: bool) -> None:
        has_attention = is_attention_block(kind, "DownBlock2D")
        inputs = [in_channels] + [level.channels] * (level.layers - 1)
        super().__init__(c, level, inputs, level.layers * has_attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(level.channels, padding=1)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, h / 2, w / 2); every layer's output is pushed on
        `skips`."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(Block):
    """`UNetMidBlock2DCrossAttn`: residual block, attention, residual block."""

    def __init__(self, c: Config, level: Level) -> None:
        super().__init__(c, level, [level.channels] * 2, attentions=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        x = self.resnets[1](self.layer(0, x, emb, context), emb)
        return x


class UpBlock(Block):
    """`CrossAttnUpBlock2D` or `UpBlock2D`."""

    def __init__(
        self, c: Config, level: Level, in_channels: int, skips: list[int], kind: str, last: bool
    ) -> None:
        has_attention = is_attention_block(kind, "UpBlock2D")
        count = level.layers + 1
        inputs = [(level.channels if i else in_channels) + skips.pop() for i in range(count)]
        super().__init__(c, level, inputs, count * has_attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(level.channels)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, 2 h, 2 w), or to the size of the next skip; pops its
        skips off the list."""
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x


def is_attention_block(kind: str, plain: str) -> bool:
    """Whether a block type of the config has attention; `plain` is the name of the one that has
    not."""
    if kind not in (plain, f"CrossAttn{plain}"):
        raise ValueError(f"block type {kind!r} is not supported; it must be [CrossAttn]{plain}")
    return kind != plain


def read_levels(c: Config) -> list[Level]:
    """The resolutions of the UNet, from the finest. Options may be one value for all, or a list."""
    count = len(c.block_out_channels)

    def per_level(key: str) -> list[Any]:
        values = list(c[key]) if isinstance(c[key], (list, tuple)) else [c[key]] * count
        if len(values) != count or any(isinstance(value, (list, tuple)) for value in values):
            raise ValueError(f"{key} = {c[key]!r} must be one value, or one for each block")
        return values

    for key in {"down_block_types", "up_block_types"} & c.keys():
        per_level(key)
    # `attention_head_dim` is the number of heads, in spite of its name: diffusers keeps the slip
    # for compatibility
    keys = [
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",
        "transformer_layers_per_block",
    ]
    keys += ["cross_attention_dim", "only_cross_attention"]
    return [Level(*values) for values in zip(*map(per_level, keys), strict=True)]


def make_down_blocks(c: Config, levels: list[Level]) -> nn.ModuleList:
    """The encoder: one block a level."""
    inputs = [c.block_out_channels[0], *(level.channels for level in levels)]
    return nn.ModuleList(
        DownBlock(c, level, inputs[i], c.down_block_types[i], last=i == len(levels) - 1)
        for i, level in enumerate(levels)
    )


def skip_channels(levels: list[Level]) -> list[int]:
    """Channels of every output that the encoder hands to the decoder: of `conv_in`, each layer,
    each downsampler."""
    channels = [levels[0].channels]
    for level in levels:
        channels += [level.channels] * (level.layers + 1)
    return channels[:-1]  # the coarsest level is not halved


class Conditioned(Model):
    """What a UNet and its ControlNet share: the embeddings of all global conditions, and the
    encoder."""

    down_blocks: nn.ModuleList
    mid_block: MidBlock

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        width = c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width, c.get("time_cond_proj_dim"))
        self.class_embedding = (
            nn.Embedding(c.num_class_embeds, 4 * width) if c.num_class_embeds else None
        )
        self.add_embedding = make_add_embedding(c)

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added: Mapping[str, Tensor],
    ) -> Tensor:
        """The sum of the embeddings of the timestep and of every other global condition, activated:
        (b, 4 width)."""
        c = self.config
        if sample.shape[1] != c.in_channels:
            raise ValueError(
                f"{sample.shape[1]} channels are given, but this model takes {c.in_channels}"
            )

        def features(values: Tensor, dim: int) -> Tensor:
            return timestep_embedding(values, dim, c.flip_sin_to_cos, c.freq_shift).to(sample.dtype)

        width = c.block_out_channels[0]
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb: Tensor = self.time_embedding(features(timesteps, width), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this model needs class_labels")
            emb = emb + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            if not {"text_embeds", "time_ids"} <= set(added):
                raise ValueError("this model needs added_cond_kwargs text_embeds and time_ids")
            text = added["text_embeds"]
            times = features(added["time_ids"].flatten(), c.addition_time_embed_dim).reshape(
                len(text), -1
            )
            emb = emb + self.add_embedding(torch.cat([text, times], dim=-1).to(emb.dtype))
        return F.silu(emb)  # once, in place of in every residual block

    def encode(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output of the middle block, and that of every layer on the way, from the output of
        `conv_in`."""
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        return self.mid_block(x, emb, context), skips


def make_add_embedding(c: Config) -> nn.Module | None:
    """The MLP over SDXL's pooled text and image sizes, or none."""
    if c.addition_embed_type is None:
        return None
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if c[key] is None:
            raise ValueError(f"the config needs {key}")
    return TimestepEmbedding(c.projection_class_embeddings_input_dim, 4 * c.block_out_channels[0])
