"""Tiny pipelines in pairs: diffusers' and ours, with the same weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers

import weightport
import weightport.models
from weightport.runtime.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from weightport.runtime.models.controlnet import ControlNetModel
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.models.vae import AutoencoderKL
from weightport.runtime.text.tokenizer import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 12

VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "sample_size": 16,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "projection_dim": 12,
}
XL = {
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd": UNET,
    "v": {**UNET, "use_linear_projection": True, "attention_head_dim": [1, 2]},
    "inpaint": {**UNET, "in_channels": 9},
    "pix2pix": {**UNET, "in_channels": 8},
    "depth": {**UNET, "in_channels": 5},
    "upscale": {
        **UNET,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, False],
    },
    "lcm": {**UNET, "time_cond_proj_dim": 16},
    "xl": {**UNET, **XL},
    "xl inpaint": {**UNET, **XL, "in_channels": 9},
    "xl pix2pix": {**UNET, **XL, "in_channels": 8},
    "refiner": {
        **UNET,
        **XL,
        "cross_attention_dim": 16,
        "projection_class_embeddings_input_dim": 12 + 5 * 8,
    },
}
VAES: dict[str, dict[str, Any]] = {
    "sd": VAE,
    "upscale": {**VAE, "scaling_factor": 0.08333},
    "means": {**VAE, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 1.0, 2.0]},
}
OTHER_VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (4, 4),
            "decoder_block_out_channels": (4, 4),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 16),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (8, 16),
            "norm_num_groups": 4,
        },
    ),
}
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every tensor, norms and biases too.

    Zeros and ones would hide what is not connected.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.2 * noise + (1 if key.endswith("weight") else 0))
    return model.eval()


def pair(theirs: Any, ours: Any, seed: int) -> tuple[Any, Any]:
    """Random weights for both."""
    state = randomise(theirs, seed).state_dict()
    names = {key: ours.rename(key) for key in state}
    used = {name: state[key] for key, name in names.items() if name is not None}
    ours.load_state_dict(used, strict=True)
    return theirs, ours.eval()


@cache
def unets(kind: str) -> tuple[Any, Any]:
    theirs, ours = pair(
        diffusers.UNet2DConditionModel(**UNETS[kind]), UNet2DConditionModel(**UNETS[kind]), 1
    )
    for model in (
        theirs,
        ours,
    ):  # a trained UNet does not blow up what it gets, and so no rounding error either
        model.conv_out.weight.data *= 0.25
    return theirs, ours


@cache
def controlnets(kind: str, seed: int, **options: Any) -> tuple[Any, Any]:
    skipped = ("up_block_types", "time_cond_proj_dim")
    config = {
        key: value for key, value in UNETS[kind].items() if key not in (*skipped, "sample_size")
    }
    config |= {"conditioning_embedding_out_channels": [4, 8], "in_channels": 4, **options}
    return pair(diffusers.ControlNetModel(**config), ControlNetModel(**config), seed)


@cache
def vaes(kind: str = "sd") -> tuple[Any, Any]:
    if kind not in OTHER_VAES:
        return pair(diffusers.AutoencoderKL(**VAES[kind]), AutoencoderKL(**VAES[kind]), 2)
    name, options = OTHER_VAES[kind]
    theirs = getattr(diffusers, name)(**options)
    return pair(theirs, getattr(weightport.models, name)(**options), 2)


@cache
def encoders(projected: bool = False) -> tuple[Any, Any]:
    size = len(tokenizers()[1])
    config: dict[str, Any] = {
        **CLIP,
        "vocab_size": size,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
    }
    if projected:
        config["hidden_act"] = "gelu"
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    theirs = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    config.setdefault("hidden_act", "quick_gelu")
    return pair(
        theirs, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), 3 + projected
    )


@cache
def tokenizers(pad: str = END) -> tuple[Any, Any]:
    """A byte-level vocabulary without merges, read by both from the same files."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        letters = [
            chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
        ]
        words = [*letters, *(letter + "</w>" for letter in letters), START, END]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        config = {
            "model_max_length": MAX_TOKENS,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(
            folder
        )


def schedulers(kind: str = "DDIMScheduler", **options: Any) -> tuple[Any, Any]:
    """One of each library."""
    config = {**NOISE, **options}
    if kind == "DDIMScheduler":
        config.setdefault("clip_sample", False)
    theirs = getattr(diffusers, kind)(**config)
    return theirs, getattr(weightport, kind)(**config)


def build(
    name: str, unet: str = "sd", scheduler: tuple[Any, Any] | None = None, **parts: Any
) -> tuple[Any, Any]:
    """A pipeline in two versions. `parts`: pairs for components, plain values for options."""
    xl, refiner = "XL" in name, unet == "refiner"
    pairs: dict[str, Any] = {
        "vae": vaes("upscale" if unet == "upscale" else "sd"),
        "unet": unets(unet),
        "scheduler": scheduler or schedulers(),
        "text_encoder": (None, None) if refiner else encoders(),
        "tokenizer": (None, None) if refiner else tokenizers(),
    }
    if xl:
        pairs |= {"text_encoder_2": encoders(True), "tokenizer_2": tokenizers("!")}
    elif "Depth" in name:
        pairs |= {"depth_estimator": (None, None), "feature_extractor": (None, None)}
    elif "Upscale" in name:
        pairs |= {"low_res_scheduler": schedulers("DDPMScheduler")}
    else:
        pairs |= {"safety_checker": (None, None), "feature_extractor": (None, None)}
        parts.setdefault("requires_safety_checker", False)
    if "Depth" in name or "Upscale" in name:
        parts.pop("requires_safety_checker", None)
    pairs |= {key: value for key, value in parts.items() if isinstance(value, tuple)}
    options = {key: value for key, value in parts.items() if not isinstance(value, tuple)}
    theirs = getattr(diffusers, name)(**{key: value[0] for key, value in pairs.items()}, **options)
    ours = getattr(weightport, name)(**{key: value[1] for key, value in pairs.items()}, **options)
    theirs.set_progress_bar_config(disable=True)
    return theirs, ours
