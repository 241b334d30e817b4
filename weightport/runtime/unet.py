"""`UNet2DConditionModel`: the denoiser of Stable Diffusion 1, 2, XL and their relatives, written from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, read_config
from .layers import (
    Downsample2D,
    ResnetBlock2D,
    Semantics,
    TimestepEmbedding,
    Upsample2D,
    apply_semantics,
    timestep_embedding,
)
from .transformer import Transformer2DModel

DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
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
    "time_cond_proj_dim": None,
    "projection_class_embeddings_input_dim": None,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),  # two names of one function
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "timestep", "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),  # diffusers refuses it too: the number of heads is `attention_head_dim`
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
IRRELEVANT = {
    "addition_embed_type_num_heads",  # of another addition_embed_type
    "dropout",  # training
    "mid_block_only_cross_attention",  # of another mid_block_type
    "sample_size",  # read by pipelines
    "upcast_attention",  # precision of attention scores; F.scaled_dot_product_attention accumulates in float32
    # written by diffusers' EMAModel into the config of the averaged model
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
}


@dataclass(frozen=True)
class Level:
    """What a config says of one resolution of the UNet."""

    channels: int
    layers: int
    heads: int
    depth: int  # transformer blocks per attention
    context_dim: int
    only_cross_attention: bool


class Block(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the block has any."""

    attentions: nn.ModuleList
    resnets: nn.ModuleList

    def __init__(self, c: Config, level: Level, resnet_inputs: list[int], attentions: int) -> None:
        super().__init__()
        groups, time_dim = c.norm_num_groups, 4 * c.block_out_channels[0]
        self.attentions = nn.ModuleList(
            Transformer2DModel(
                level.channels,
                level.heads,
                level.depth,
                level.context_dim,
                level.only_cross_attention,
                groups,
                c.use_linear_projection,
            )
            for _ in range(attentions)
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(n, level.channels, groups, c.norm_eps, time_dim) for n in resnet_inputs
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
        """(b, in_channels, h, w) -> (b, c, h / 2, w / 2); every layer's output is pushed on `skips`."""
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
        x = self.layer(0, x, emb, context)
        x = self.resnets[1](x, emb)
        return x


class UpBlock(Block):
    """`CrossAttnUpBlock2D` or `UpBlock2D`."""

    def __init__(self, c: Config, level: Level, in_channels: int, skips: list[int], kind: str, last: bool) -> None:
        has_attention = is_attention_block(kind, "UpBlock2D")
        count = level.layers + 1
        inputs = [(level.channels if i else in_channels) + skips.pop() for i in range(count)]
        super().__init__(c, level, inputs, count * has_attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(level.channels)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, 2 h, 2 w), or to the size of the next skip; pops its skips off the list."""
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x


def is_attention_block(kind: str, plain: str) -> bool:
    """Whether a block type of the config has attention; `plain` is the name of the one that has not."""
    if kind not in (plain, f"CrossAttn{plain}"):
        raise ValueError(f"UNet2DConditionModel: block type {kind!r} is not supported; it must be [CrossAttn]{plain}")
    return kind != plain


def read_levels(c: Config) -> list[Level]:
    """The resolutions of the UNet, from the finest. Options may be one value for all, or a list."""
    count = len(c.block_out_channels)

    def per_level(key: str) -> list[Any]:
        values = list(c[key]) if isinstance(c[key], (list, tuple)) else [c[key]] * count
        if len(values) != count or any(isinstance(value, (list, tuple)) for value in values):
            raise ValueError(f"UNet2DConditionModel: {key} = {c[key]!r} must be one value, or one for each block")
        return values

    keys = (
        "block_out_channels",
        "layers_per_block",
        "attention_head_dim",  # the number of heads, in spite of its name: diffusers keeps the slip for compatibility
        "transformer_layers_per_block",
        "cross_attention_dim",
        "only_cross_attention",
    )
    for key in ("down_block_types", "up_block_types"):
        per_level(key)
    return [Level(*values) for values in zip(*map(per_level, keys), strict=True)]


class UNet2DConditionOutput(NamedTuple):
    """The prediction, (b, out_channels, h, w)."""

    sample: Tensor


class UNet2DConditionModel(nn.Module):
    """The denoising UNet.

    Args:
        config: the content of `unet/config.json`; absent keys take the defaults of diffusers.
        semantics: whose maths to follow, see `apply_semantics`.

    Raises:
        ValueError: the config asks for something that is not implemented.
    """

    def __init__(self, config: Mapping[str, Any], semantics: Semantics = "diffusers") -> None:
        super().__init__()
        c = self.config = read_config("UNet2DConditionModel", config, DEFAULTS, CHOICES, IRRELEVANT)
        levels, width = read_levels(c), c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width, c.time_cond_proj_dim)
        self.class_embedding = make_class_embedding(c)
        self.add_embedding = make_add_embedding(c)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()  # the order of the state dict
        channels, skips = width, [width]
        for level, kind in zip(levels, c.down_block_types, strict=True):
            last = len(self.down_blocks) == len(levels) - 1
            self.down_blocks.append(DownBlock(c, level, channels, kind, last))
            channels = level.channels
            skips += [channels] * (level.layers + (not last))
        self.mid_block = MidBlock(c, replace(levels[-1], only_cross_attention=False))
        for level, kind in zip(reversed(levels), c.up_block_types, strict=True):
            last = len(self.up_blocks) == len(levels) - 1
            self.up_blocks.append(UpBlock(c, level, channels, skips, kind, last))
            channels = level.channels

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, c.norm_eps)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)
        apply_semantics(self, semantics)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> UNet2DConditionOutput:
        """Predict the noise, or what else the model was trained to predict.

        Args:
            sample: (b, in_channels, h, w); h and w need not be divisible by anything.
            timestep: one for all, or (b,).
            encoder_hidden_states: (b, tokens, cross_attention_dim).
            class_labels: (b,) for `num_class_embeds` (the upscaler's noise level) and `timestep`; (b, d) for
                `projection`.
            timestep_cond: (b, time_cond_proj_dim), the embedded guidance scale of LCM.
            added_cond_kwargs: `text_embeds` (b, d) and `time_ids` (b, k) of SDXL.

        Raises:
            ValueError: a condition that the config requires is missing.
        """
        emb = self.embed(sample, timestep, class_labels, timestep_cond, added_cond_kwargs or {})
        x: Tensor = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, encoder_hidden_states, skips)
        x = self.mid_block(x, emb, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, emb, encoder_hidden_states, skips)
        return UNet2DConditionOutput(self.conv_out(F.silu(self.conv_norm_out(x))))

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added: Mapping[str, Tensor],
    ) -> Tensor:
        """The sum of the embeddings of the timestep and of every other global condition: (b, 4 width)."""
        c = self.config

        def features(values: Tensor, dim: int) -> Tensor:
            return timestep_embedding(values, dim, c.flip_sin_to_cos, c.freq_shift).to(sample.dtype)

        width = c.block_out_channels[0]
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb: Tensor = self.time_embedding(features(timesteps, width), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("UNet2DConditionModel: this model needs class_labels")
            labels = features(class_labels, width) if c.class_embed_type == "timestep" else class_labels
            emb = emb + self.class_embedding(labels)
        if self.add_embedding is not None:
            if not {"text_embeds", "time_ids"} <= set(added):
                raise ValueError("UNet2DConditionModel: this model needs added_cond_kwargs text_embeds and time_ids")
            text = added["text_embeds"]
            times = features(added["time_ids"].flatten(), c.addition_time_embed_dim).reshape(len(text), -1)
            emb = emb + self.add_embedding(torch.cat([text, times], dim=-1).to(emb.dtype))
        return emb


def make_class_embedding(c: Config) -> nn.Module | None:
    """The embedding of `class_labels`: a table, an MLP over sinusoidal features or over a given vector, or none."""
    width = c.block_out_channels[0]
    match c.class_embed_type:
        case "timestep":
            return TimestepEmbedding(width, 4 * width)
        case "projection":
            return TimestepEmbedding(required(c, "projection_class_embeddings_input_dim"), 4 * width)
    return nn.Embedding(c.num_class_embeds, 4 * width) if c.num_class_embeds is not None else None


def make_add_embedding(c: Config) -> nn.Module | None:
    """The MLP over SDXL's pooled text and image sizes, or none."""
    if c.addition_embed_type is None:
        return None
    required(c, "addition_time_embed_dim")
    return TimestepEmbedding(required(c, "projection_class_embeddings_input_dim"), 4 * c.block_out_channels[0])


def required(c: Config, key: str) -> int:
    """An option that another one makes mandatory."""
    if c[key] is None:
        raise ValueError(f"UNet2DConditionModel: the config needs {key}")
    return int(c[key])
