"""Random inputs for one model, as both frameworks are given them: images (b, c, h, w), latents
scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]

LENGTH = 77  # tokens of a prompt
START, END = 49406, 49407
POOLED = 1280  # of SDXL's second text encoder
TIMESTEPS = (981, 17)


def inputs(name: str, config: Mapping[str, Any], latent_side: int) -> Arrays:
    """Inputs of a check: a batch of two.

    Args:
        name: `unet`, `controlnet`, `decoder`, `image_encoder` or a text encoder.
        config: the model's, complete.
        latent_side: height and width of the latents.

    The features of the timestep are an input as well, as they are of KerasCV's UNet: frameworks
    compute them in float32, where an ulp in a frequency is 6e-5 in a feature, more than all the
    rounding behind it.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((2, *shape)).astype(np.float32)

    side = latent_side
    if name == "decoder":
        return {"latent": normal(config["latent_channels"], side, side)}
    if name == "image_encoder":
        pixels = side * 2 ** (len(config["block_out_channels"]) - 1)
        return {
            "image": rng.uniform(-1, 1, (2, config["in_channels"], pixels, pixels)).astype(
                np.float32
            )
        }
    if name.startswith("text_encoder"):
        return {"tokens": _tokens(config["vocab_size"], rng)}
    given = {
        "sample": normal(config["in_channels"], side, side),
        "timestep": np.array(TIMESTEPS),
        "context": normal(LENGTH, config["cross_attention_dim"]),
        "features": _features(np.array(TIMESTEPS), config["block_out_channels"][0]),
    }
    if name == "controlnet":
        given["image"] = rng.uniform(0, 1, (2, 3, 8 * side, 8 * side)).astype(np.float32)
    if config.get("addition_embed_type") == "text_time":
        count = (config["projection_class_embeddings_input_dim"] - POOLED) // config[
            "addition_time_embed_dim"
        ]
        given["text_embeds"] = normal(POOLED)
        given["time_ids"] = rng.integers(0, 1024, (2, count)).astype(np.float32)
    if config.get("num_class_embeds"):
        given["class_labels"] = rng.integers(0, config["num_class_embeds"], 2)
    return given


def pipeline_inputs(vocabulary: int, channels: int, latent_side: int) -> Arrays:
    """Token ids of a prompt and of none, and the noise to begin with."""
    rng = np.random.default_rng(1)
    tokens = _tokens(vocabulary, rng)[1:]
    noise = rng.standard_normal((1, channels, latent_side, latent_side)).astype(np.float32)
    return {
        "tokens": tokens,
        "no_tokens": np.where(np.arange(LENGTH) == 0, START, END)[None],
        "noise": noise,
    }


def _tokens(vocabulary: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A short prompt and a longer one, padded with the end of text; added token rows come in the
    second."""
    tokens = np.full((2, LENGTH), END, np.int64)
    tokens[:, 0] = START
    tokens[0, 1:9], tokens[1, 1:41] = rng.integers(0, START, 8), rng.integers(0, START, 40)
    added = np.arange(END + 1, vocabulary)[:40]
    tokens[1, 1 : 1 + len(added)] = added
    return tokens


def _features(timesteps: np.ndarray[Any, Any], dim: int) -> np.ndarray[Any, Any]:
    """Sinusoidal features (b, dim), cosines first, in float64. Ho et al. 2020,
    https://arxiv.org/abs/2006.11239."""
    angles = timesteps[:, None] * np.exp(-math.log(10000) * np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
