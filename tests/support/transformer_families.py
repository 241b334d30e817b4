"""Tiny models of SD 3 and Flux with random weights, under the original names.

They have every tensor of the real ones, narrower and of fewer blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from weightport.mappings.families import Component, families
from weightport.mappings.library import load_table

State = dict[str, np.ndarray[Any, Any]]

SD3 = ("sd3", "sd35_medium", "sd35_large")
FLUX = ("flux", "flux_schnell")
_NARROW: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "caption_projection_dim": 128,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 3,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 6,
    },
    "FluxTransformer2DModel": {
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 3,
        "pooled_projection_dim": 8,
    },
    "AutoencoderKL": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 8},
    "T5EncoderModel": {"d_ff": 24, "d_kv": 4, "d_model": 16, "num_heads": 4, "num_layers": 2},
}
_CLIP = {"intermediate_size": 16, "num_hidden_layers": 2}
TABLES = {  # component -> the table that names it in a bundle, of SD 3 and of Flux
    "transformer": ("ldm_mmdit", "ldm_flux"),
    "vae": ("ldm_vae", "ldm_vae"),
    "text_encoder": ("ldm_clip_l", "ldm_clip_l_flux"),
    "text_encoder_2": ("ldm_clip_g", "ldm_t5"),
    "text_encoder_3": ("ldm_t5",),
}
L = "text_encoders.clip_l.transformer."
T5 = "text_encoders.t5xxl.transformer."


def component(family: str, name: str) -> Component:
    """The stock component."""
    return families()[family].components[name]


def config(family: str, name: str) -> dict[str, Any]:
    """The config of a tiny component."""
    stock = component(family, name)
    own = dict(_NARROW.get(stock.class_name, {}))
    if stock.class_name.startswith("CLIP"):
        width = 16 if name == "text_encoder" else 24
        own = _CLIP | {"hidden_size": width, "num_attention_heads": 1}
        if "Projection" in stock.class_name:
            own["projection_dim"] = width
    if family == "sd35_medium" and name == "transformer":
        own["dual_attention_layers"] = [0, 1]
    return {**stock.config, **own}


@cache
def weights(family: str, name: str, seed: int = 0) -> State:
    """The state dict of a tiny component, as diffusers has it. Treat as read-only."""
    rng = np.random.default_rng([seed, *name.encode()])
    shapes = component(family, name).model.tensors(config(family, name))
    state = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    if "ldm_clip_l" in TABLES[name] and "text_projection.weight" in state:
        state["text_projection.weight"] = np.eye(16, dtype=np.float32)
    return state


def original(family: str, name: str, state: State | None = None) -> State:
    """The tensors of a tiny component under the original names."""
    stock = component(family, name)
    state = weights(family, name) if state is None else state
    table = load_table(TABLES[name][family in FLUX])
    return renamed(table.name, state, stock.model.names(config(family, name)))


def renamed(table: str, state: State, names: Mapping[str, Any]) -> State:
    """A state dict through a table, backwards."""
    found = {}
    for link in load_table(table).links(state, names):
        arrays = [state[key] for key in link.targets]
        (source,) = link.op.inverse.apply(arrays) if link.op else arrays
        found[link.sources[0]] = np.ascontiguousarray(source)
    return found


def extras(family: str) -> State:
    """What a bundle holds beside the tensors of its models."""
    rest: State = {
        f"{L}text_model.embeddings.position_ids": np.arange(77)[None],
        f"{T5}encoder.embed_tokens.weight": weights(family, t5_of(family))["shared.weight"],
        "text_encoders.clip_l.logit_scale": np.array(4.6, np.float32),
        "text_encoders.t5xxl.logit_scale": np.array(4.6, np.float32),
    }
    if family in SD3:
        rest[f"{L}text_projection.weight"] = np.full((16, 16), 0.5, np.float32)
    return rest


def t5_of(family: str) -> str:
    """Which component of a family is T5."""
    return "text_encoder_2" if family in FLUX else "text_encoder_3"


def bundle(family: str) -> State:
    """A whole original checkpoint, as ComfyUI's users pass it around."""
    state: State = {}
    for name in families()[family].components:
        state |= original(family, name)
    if family in FLUX:
        front = "first_stage_model."
        state = {key.replace(front, "vae."): array for key, array in state.items()}
    return state | extras(family)


def write(path: Path, state: State) -> Path:
    """A safetensors file of a state dict."""
    save_file(state, path)
    return path
