"""What UNet and ControlNet are made of: embeddings of the conditions, blocks of each resolution."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.budget import MOST_PARAMETERS
from ..loading.config import Config
from ..loading.model import Model
from .attention import Level, Transformer2DModel
from .freeu import FreeU
from .layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Upsample2D, timestep_embedding

# a block for each resolution
DOWN_BLOCKS = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
UP_BLOCKS = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
Blocks = Sequence[str]
Text = tuple[Tensor, Tensor | None]  # the states of the tokens, and what is added to their scores
Each = int | Sequence[int]  # one value for all resolutions, or one for each
Depths = int | Sequence[int | Sequence[int]]  # likewise, or one for each attention of one
Middle = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None]
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

    def __init__(
        self, config: Config, level: Level, resnet_inputs: list[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        groups = config.norm_num_groups
        time_dim = 4 * config.block_out_channels[0]
        self.attentions = nn.ModuleList()  # first in the state dict
        self.resnets = nn.ModuleList()
        # in turn, so that one seed draws the weights that it draws in diffusers
        for inputs, depth in itertools.zip_longest(resnet_inputs, depths):
            resnet = ResnetBlock2D(inputs, level.channels, groups, config.norm_eps, time_dim)
            self.resnets.append(resnet)
            if depth is not None:
                self.attentions.append(Transformer2DModel(config, level, depth))

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Text) -> Tensor:
        """Residual block `i`, then attention `i` where there is one."""
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, *text) if self.attentions else x


class DownBlock(Block):
    """`CrossAttnDownBlock2D` or `DownBlock2D`."""

    def __init__(
        self, config: Config, level: Level, in_channels: int, kind: str, last: bool
    ) -> None:
        has_attention = is_attention_block(kind, "DownBlock2D")
        inputs = [in_channels] + [level.channels] * (level.layers - 1)
        depths = level.depths(level.layers) if has_attention else []
        super().__init__(config, level, inputs, depths)
        self.downsamplers = nn.ModuleList()
        if not last:
            self.downsamplers.append(Downsample2D(level.channels, padding=1))

    def forward(self, x: Tensor, emb: Tensor, text: Text, skips: list[Tensor]) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, h / 2, w / 2).

        Every layer's output is pushed on `skips`.
        """
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(Block):
    """`UNetMidBlock2DCrossAttn`: residual block, attention, residual block; `UNetMidBlock2D`: a
    residual block alone."""

    def __init__(self, config: Config, level: Level) -> None:
        has_attention = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        depths = level.depths(1) if has_attention else []
        inputs = [level.channels] * (1 + len(depths))
        super().__init__(config, level, inputs, depths)

    def forward(self, x: Tensor, emb: Tensor, text: Text) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        x = self.layer(0, x, emb, text)
        for resnet in self.resnets[1:]:
            x = resnet(x, emb)
        return x


def make_mid_block(config: Config, level: Level) -> MidBlock | None:
    """The middle block, where the config has one."""
    if config.mid_block_type is None:
        return None
    return MidBlock(config, replace(level, only_cross_attention=False))


class UpBlock(Block):
    """`CrossAttnUpBlock2D` or `UpBlock2D`.

    Attributes:
        freeu: how it weighs its skips, where FreeU is on.
    """

    freeu: FreeU | None = None

    def __init__(
        self,
        config: Config,
        level: Level,
        in_channels: int,
        skips: list[int],
        kind: str,
        last: bool,
    ) -> None:
        has_attention = is_attention_block(kind, "UpBlock2D")
        inputs = [in_channels] + [level.channels] * level.layers
        with_skips = [channels + skips.pop() for channels in inputs]
        depths = level.depths(len(inputs)) if has_attention else []
        super().__init__(config, level, with_skips, depths)
        self.upsamplers = nn.ModuleList()
        if not last:
            self.upsamplers.append(Upsample2D(level.channels))

    def forward(self, x: Tensor, emb: Tensor, text: Text, skips: list[Tensor]) -> Tensor:
        """(b, in_channels, h, w) -> (b, c, 2 h, 2 w), or the size of the next skip.

        Pops its skips off the list.
        """
        for i in range(len(self.resnets)):
            skip = skips.pop()
            if self.freeu is not None:
                x, skip = self.freeu.weigh(x, skip)
            x = torch.cat([x, skip], dim=1)
            x = self.layer(i, x, emb, text)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x


def text_of(
    states: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    cross_attention_kwargs: Mapping[str, Any] | None,
) -> Text:
    """What blocks attend to, by the arguments of a call.

    Args:
        states: of the tokens, (b, m, c).
        mask: 1 on tokens to see and 0 on others, (b, m).
        attention_mask: of an image's pixels, which is refused.
        cross_attention_kwargs: of custom attention processors, which are refused.

    Raises:
        ValueError: something is refused.
    """
    if attention_mask is not None:
        raise ValueError("attention_mask is not supported; give encoder_attention_mask")
    if cross_attention_kwargs:
        names = ", ".join(cross_attention_kwargs)
        raise ValueError(
            f"cross_attention_kwargs: attention processors, which take {names}, are not supported"
        )
    if mask is None:
        return states, None
    return states, (1 - mask.to(states.dtype))[:, None, None] * -10000.0


def is_attention_block(kind: str, plain: str) -> bool:
    """Whether a block type of the config has attention; the one that has not is called `plain`."""
    if kind not in (plain, f"CrossAttn{plain}"):
        raise ValueError(f"block type {kind!r} is not supported; it must be [CrossAttn]{plain}")
    return kind != plain


# options that make a `Level`, in the order of its fields; `attention_head_dim` is the number of
# heads, in spite of its name: diffusers keeps the slip for compatibility
_LEVEL_OPTIONS = (
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "only_cross_attention",
)


_NESTED = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")


def read_levels(config: Config) -> list[Level]:
    """The resolutions of the UNet, from the finest. Options may be one value for all, or a list."""
    for key in ("down_block_types", "up_block_types"):
        if key in config:
            _per_level(config, key)
    options = [_per_level(config, key) for key in _LEVEL_OPTIONS]
    levels = [Level(*values) for values in zip(*options, strict=True)]
    if sum(level.layers for level in levels) > MOST_PARAMETERS:
        raise ValueError(
            f"layers_per_block = {reprlib.repr(config.layers_per_block)} is more than a model has"
        )
    return levels


def upwards(config: Config, levels: list[Level]) -> list[Level]:
    """The resolutions on the way up, from the coarsest; attentions may be of other depths there.

    Raises:
        ValueError: nothing says of which.
    """
    reverse = list(reversed(levels))
    if config.reverse_transformer_layers_per_block is not None:
        depths = _per_level(config, "reverse_transformer_layers_per_block")
        return [replace(level, depth=depth) for level, depth in zip(reverse, depths, strict=True)]
    if not all(isinstance(level.depth, int) for level in levels):
        raise ValueError(
            "reverse_transformer_layers_per_block is needed where transformer_layers_per_block has"
            " a list for a block"
        )
    return reverse


def _per_level(config: Config, key: str) -> list[Any]:
    """The values of an option, one for each resolution."""
    count = len(config.block_out_channels)
    given = config[key]
    values = list(given) if isinstance(given, (list, tuple)) else [given] * count
    is_nested = any(isinstance(value, (list, tuple)) for value in values)
    if len(values) != count or (is_nested and key not in _NESTED):
        raise ValueError(f"{key} = {given!r} must be one value, or one for each block")
    return values


def make_down_blocks(config: Config, levels: list[Level]) -> Iterator[DownBlock]:
    """The encoder: one block a level."""
    channels = levels[0].channels
    for level, kind in zip(levels, config.down_block_types, strict=True):
        yield DownBlock(config, level, channels, kind, last=level is levels[-1])
        channels = level.channels


def skip_channels(levels: list[Level]) -> list[int]:
    """Channels of every output that the encoder hands to the decoder.

    These are the outputs of `conv_in`, of each layer and of each downsampler.
    """
    channels = [levels[0].channels]
    for level in levels:
        channels += [level.channels] * (level.layers + 1)
    return channels[:-1]  # the coarsest level is not halved


class Conditioned(Model):
    """What a UNet and its ControlNet share: embeddings of global conditions, and the encoder."""

    down_blocks: nn.ModuleList
    mid_block: MidBlock | None
    irrelevant = IRRELEVANT

    def _make_embeddings(self) -> None:
        """Make the layers of the global conditions, and the first convolution."""
        config = self.config
        width = config.block_out_channels[0]
        classes = config.num_class_embeds
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, 4 * width, config.get("time_cond_proj_dim"))
        self.class_embedding = nn.Embedding(classes, 4 * width) if classes else None
        self.add_embedding = make_add_embedding(config)

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added: Mapping[str, Tensor],
    ) -> Tensor:
        """The embeddings of the timestep and of every other global condition, summed, activated.

        Returns:
            (b, 4 width).

        Raises:
            ValueError: a condition is missing, or the sample has another number of channels.
        """
        in_channels = self.config.in_channels
        if sample.shape[1] != in_channels:
            raise ValueError(
                f"{sample.shape[1]} channels are given, but this model takes {in_channels}"
            )
        width = self.config.block_out_channels[0]
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        features = self._features(timesteps, width).to(sample.dtype)
        emb: Tensor = self.time_embedding(features, timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this model needs class_labels")
            emb = emb + self.class_embedding(class_labels)
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(self._text_and_sizes(added, sample).to(emb.dtype))
        return F.silu(emb)  # once, in place of in every residual block

    def _features(self, values: Tensor, dim: int) -> Tensor:
        """Sinusoidal features (n, dim) of numbers (n,)."""
        config = self.config
        return timestep_embedding(values, dim, config.flip_sin_to_cos, config.freq_shift)

    def _text_and_sizes(self, added: Mapping[str, Tensor], sample: Tensor) -> Tensor:
        """SDXL's pooled text and the features of its image sizes, side by side."""
        if not {"text_embeds", "time_ids"} <= set(added):
            raise ValueError("this model needs added_cond_kwargs text_embeds and time_ids")
        text = added["text_embeds"]
        sizes = added["time_ids"].flatten()
        features = self._features(sizes, self.config.addition_time_embed_dim).to(sample.dtype)
        return torch.cat([text, features.reshape(len(text), -1)], dim=-1)

    def encode(self, x: Tensor, emb: Tensor, text: Text) -> tuple[Tensor, list[Tensor]]:
        """The output of the middle block, and that of every layer on the way from `conv_in`."""
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, text, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, text)
        return x, skips


def make_add_embedding(config: Config) -> nn.Module | None:
    """The MLP over SDXL's pooled text and image sizes, or none."""
    if config.addition_embed_type is None:
        return None
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if config[key] is None:
            raise ValueError(f"the config needs {key}")
    width = config.block_out_channels[0]
    return TimestepEmbedding(config.projection_class_embeddings_input_dim, 4 * width)
