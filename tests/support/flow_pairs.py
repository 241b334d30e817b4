"""Tiny pipelines of SD 3 and Flux in pairs: diffusers' and ours, with the same weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import transformers

import weightport
from weightport.converters.repo.t5_tokenizer import write_t5_tokenizer

from .pipeline_pairs import VAE, encoders, pair, tokenizers

T5_WIDTH = 40  # no less than both CLIPs together
POOLED = 12  # of one CLIP
T5 = {
    "d_model": T5_WIDTH,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
SD3 = {
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * POOLED,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3 deep": ("SD3Transformer2DModel", {**SD3, "num_layers": 24}),  # as many as stock ones have
    "sd3 inpaint": ("SD3Transformer2DModel", {**SD3, "in_channels": 33}),
    "schnell": ("FluxTransformer2DModel", FLUX),
    "dev": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}),
    "fill": (
        "FluxTransformer2DModel",
        # two latents are four pixels here, so that a mask has 4 channels a latent
        {**FLUX, "in_channels": 64 + 64 + 16, "out_channels": 64, "guidance_embeds": True},
    ),
    "control": (
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 128, "out_channels": 64, "guidance_embeds": True},
    ),
}
VAE16: dict[str, Any] = {
    **VAE,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}


@cache
def transformer(kind: str) -> tuple[Any, Any]:
    name, config = TRANSFORMERS[kind]
    return pair(getattr(diffusers, name)(**config), getattr(weightport, name)(**config), 1)


@cache
def vae() -> tuple[Any, Any]:
    return pair(diffusers.AutoencoderKL(**VAE16), weightport.AutoencoderKL(**VAE16), 2)


@cache
def t5() -> tuple[Any, Any]:
    theirs = transformers.T5EncoderModel(transformers.T5Config(**T5))
    return pair(theirs, weightport.T5EncoderModel(T5), 5)


@cache
def t5_tokenizer() -> tuple[Any, Any]:
    with TemporaryDirectory() as name:
        folder = Path(name, "tokenizer")
        write_t5_tokenizer(folder)
        return (
            transformers.T5TokenizerFast.from_pretrained(folder),
            weightport.T5Tokenizer.from_pretrained(folder),
        )


def scheduler(kind: str = "FlowMatchEulerDiscreteScheduler", **options: Any) -> tuple[Any, Any]:
    options = options or {"shift": 3.0}
    return getattr(diffusers, kind)(**options), getattr(weightport, kind)(**options)


def build(name: str, kind: str, **parts: Any) -> tuple[Any, Any]:
    """A pipeline in two versions; `parts` are pairs that take the place of others."""
    pairs: dict[str, Any] = {
        "transformer": transformer(kind),
        "scheduler": scheduler(),
        "vae": vae(),
        "tokenizer": tokenizers(),
    }
    if name.startswith("Flux"):
        pairs |= {
            "text_encoder": encoders(),
            "text_encoder_2": t5(),
            "tokenizer_2": t5_tokenizer(),
        }
    else:
        pairs |= {
            "text_encoder": encoders(True),
            "text_encoder_2": encoders(True),
            "tokenizer_2": tokenizers("!"),
            "text_encoder_3": t5(),
            "tokenizer_3": t5_tokenizer(),
        }
    pairs |= parts
    theirs = getattr(diffusers, name)(**{key: value[0] for key, value in pairs.items()})
    ours = getattr(weightport, name)(**{key: value[1] for key, value in pairs.items()})
    theirs.set_progress_bar_config(disable=True)
    return theirs, ours
