"""Random inputs for one model, as both frameworks are given them.

Images are (b, c, h, w), latents scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..differences import Array

Arrays = dict[str, Array]

BATCH = 2
LENGTH = 77  # tokens of a prompt
START = 49406
END = 49407
FLOW_FEATURES = 256  # of a timestep, in SD 3
POOLED = 1280  # of SDXL's second text encoder
TIMESTEPS = (981, 17)


def inputs(call: str, config: Mapping[str, Any], latent_side: int) -> Arrays:
    """Inputs of a check: a batch of two.

    Args:
        call: how the model is called.
        config: the model's, complete.
        latent_side: height and width of the latents.
    """
    rng = np.random.default_rng(0)
    match call:
        case "embed":
            return {"tokens": _tokens(config["vocab_size"], rng)}
        case "read":
            return {"tokens": rng.integers(0, config["vocab_size"], (BATCH, LENGTH))}
        case "flow":
            return _flowing(config, latent_side, rng)
        case "flow of patches":
            return _flowing_patches(config, latent_side, rng)
        case "decode":
            return {"latent": _normal(rng, config["latent_channels"], latent_side, latent_side)}
        case "encode":
            pixels = latent_side * _scale(config["block_out_channels"])
            return {"image": _uniform(rng, -1, config["in_channels"], pixels, pixels)}
    return _noised(config, latent_side, rng) | _conditions(call, config, latent_side, rng)


def _noised(config: Mapping[str, Any], side: int, rng: np.random.Generator) -> Arrays:
    """What every denoiser is given.

    The features of the timestep are an input as well, as they are of KerasCV's UNet: frameworks
    compute them in float32, where an ulp in a frequency is 6e-5 in a feature, more than all the
    rounding behind it.
    """
    timesteps = np.array(TIMESTEPS)
    return {
        "sample": _normal(rng, config["in_channels"], side, side),
        "timestep": timesteps,
        "context": _normal(rng, LENGTH, config["cross_attention_dim"]),
        "features": _features(timesteps, config["block_out_channels"][0]),
    }


def largest_side(config: Mapping[str, Any], side: int) -> int:
    """The side of latents, or the largest that a denoiser with a table of positions has."""
    positions = config.get("pos_embed_max_size")
    return min(side, config["patch_size"] * positions) if positions else side


def _flowing(config: Mapping[str, Any], side: int, rng: np.random.Generator) -> Arrays:
    """What SD 3's transformer is given."""
    side = largest_side(config, side)
    timesteps = np.array(TIMESTEPS, np.float32)
    return {
        "sample": _normal(rng, config["in_channels"], side, side),
        "timestep": timesteps,
        "features": _features(timesteps, FLOW_FEATURES),
        **_texts(config, rng),
    }


def _flowing_patches(config: Mapping[str, Any], side: int, rng: np.random.Generator) -> Arrays:
    """What Flux's transformer is given: patches of 2 x 2 latents, and where they are."""
    rows, columns = np.indices((side // 2, side // 2)).reshape(2, -1)
    return {
        "sample": _normal(rng, len(rows), config["in_channels"]),
        "timestep": np.array(TIMESTEPS, np.float32) / 1000,
        "places": np.stack([np.zeros_like(rows), rows, columns], axis=1).astype(np.float32),
        "text_places": np.zeros((LENGTH, 3), np.float32),
        "guidance": np.full(BATCH, 3.5, np.float32),
        **_texts(config, rng),
    }


def _texts(config: Mapping[str, Any], rng: np.random.Generator) -> Arrays:
    """The states of a text, and what stands for the whole of it."""
    return {
        "context": _normal(rng, LENGTH, config["joint_attention_dim"]),
        "pooled": _normal(rng, config["pooled_projection_dim"]),
    }


def _conditions(
    call: str, config: Mapping[str, Any], side: int, rng: np.random.Generator
) -> Arrays:
    """What some denoisers are given besides: an image, SDXL's sizes, a class."""
    given: Arrays = {}
    if call == "control":
        pixels = side * _scale(config["conditioning_embedding_out_channels"])
        given["image"] = _uniform(rng, 0, 3, pixels, pixels)
    if config.get("addition_embed_type") == "text_time":
        features = config["projection_class_embeddings_input_dim"] - POOLED
        count = features // config["addition_time_embed_dim"]
        given["text_embeds"] = _normal(rng, POOLED)
        given["time_ids"] = rng.integers(0, 1024, (BATCH, count)).astype(np.float32)
    if config.get("num_class_embeds"):
        given["class_labels"] = rng.integers(0, config["num_class_embeds"], BATCH)
    return given


def pipeline_inputs(vocabulary: int, channels: int, latent_side: int) -> Arrays:
    """Token ids of a prompt and of none, and the noise to begin with."""
    rng = np.random.default_rng(1)
    tokens = _tokens(vocabulary, rng)[1:]
    nothing = np.full((1, LENGTH), END)
    nothing[0, 0] = START
    noise = rng.standard_normal((1, channels, latent_side, latent_side)).astype(np.float32)
    return {"tokens": tokens, "no_tokens": nothing, "noise": noise}


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal((BATCH, *shape)).astype(np.float32)


def _uniform(rng: np.random.Generator, low: int, *shape: int) -> Array:
    """Numbers from `low` to 1."""
    return rng.uniform(low, 1, (BATCH, *shape)).astype(np.float32)


def _scale(stages: list[int]) -> int:
    """Pixels along a side for each latent pixel; every stage but the last halves the image."""
    return int(2 ** (len(stages) - 1))


def _tokens(vocabulary: int, rng: np.random.Generator) -> Array:
    """A short prompt and a longer one, padded with the end of text.

    Added token rows come in the second.
    """
    tokens = np.full((BATCH, LENGTH), END, np.int64)
    tokens[:, 0] = START
    tokens[0, 1:9] = rng.integers(0, START, 8)
    tokens[1, 1:41] = rng.integers(0, START, 40)
    added = np.arange(END + 1, vocabulary)[:40]
    tokens[1, 1 : 1 + len(added)] = added
    return tokens


def _features(timesteps: Array, dim: int) -> Array:
    """Sinusoidal features (b, dim), cosines first, in float64.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / half)
    angles = timesteps[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
