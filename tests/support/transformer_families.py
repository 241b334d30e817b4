"""Tiny models of SD 3, Flux and their relatives with random weights, under the original names.

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
from weightport.mappings.library import all_tables, load_table
from weightport.mappings.table import Table

State = dict[str, np.ndarray[Any, Any]]

SD3 = ("sd3", "sd35_medium", "sd35_large")
FLUX = ("flux", "flux_schnell")
CHROMA = ("chroma", "chroma_base", "chroma_flash")
ZIMAGE = ("zimage_turbo", "zimage")
FLUX2 = (
    "flux2",
    "flux2_klein_4b",
    "flux2_klein_base_4b",
    "flux2_klein_9b",
    "flux2_klein_base_9b",
)
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
    "ChromaTransformer2DModel": {
        "approximator_hidden_dim": 20,
        "approximator_layers": 2,
        "approximator_num_channels": 8,
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 3,
    },
    "ZImageTransformer2DModel": {
        "cap_feat_dim": 24,
        "dim": 128,
        "n_heads": 1,
        "n_kv_heads": 1,
        "n_layers": 2,
        "n_refiner_layers": 1,
    },
    "Flux2Transformer2DModel": {
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 3,
        "timestep_guidance_channels": 8,
    },
    "AutoencoderKL": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 8},
    "T5EncoderModel": {"d_ff": 24, "d_kv": 4, "d_model": 16, "num_heads": 4, "num_layers": 2},
}
_CLIP = {"intermediate_size": 16, "num_hidden_layers": 2}
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
    if name == "text_encoder" and "text_projection.weight" in state:
        state["text_projection.weight"] = np.eye(16, dtype=np.float32)
    return state


def original(family: str, name: str, state: State | None = None) -> State:
    """The tensors of a tiny component under the original names."""
    stock = component(family, name)
    state = weights(family, name) if state is None else state
    return renamed(table_of(family, name).name, state, stock.model.names(config(family, name)))


def table_of(family: str, name: str) -> Table:
    """The table that names a component in a bundle."""
    known = (table for table in all_tables() if table.about["layout"] == "ldm")
    return next(
        table
        for table in known
        if family in table.about["families"]
        and not table.about.get("read_only")
        and families()[family].filled_by(table) is component(family, name)
    )


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
