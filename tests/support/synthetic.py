"""Tiny complete models with random weights, made without Keras: a diffusers repo, and KerasCV's
files of it.

They have every tensor of the real ones, only narrower: widths differ where the real ones do, or
shortcuts would vanish.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import weightport
from weightport.mappings.families import families
from weightport.runtime.manifest import manifest

PARTS = ("text_encoder", "unet", "decoder", "image_encoder")
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 64},
    "vae": {"block_out_channels": [32, 64, 96, 96]},
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 1,
        "projection_dim": 64,
    },
    "controlnet": {"block_out_channels": [32, 64, 96, 96], "cross_attention_dim": 64},
    # the stock projection: SDXL's UNet takes it beside six numbers of 256 values each
    "text_encoder_2": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 2,
        "projection_dim": 1280,
    },
}
_UNETS: dict[str, dict[str, Any]] = {  # heads of width 64 where the real ones have that
    "sd1": {},
    "sd2": {"attention_head_dim": [1, 1, 1, 1]},
    "sdxl": {
        "block_out_channels": [32, 64, 96],
        "attention_head_dim": [1, 1, 1],
        "cross_attention_dim": 192,
    },
    "sdxl_refiner": {"attention_head_dim": [1, 1, 1, 1], "cross_attention_dim": 128},
    "upscaler": {"block_out_channels": [32, 64, 64, 96]},
}
_VAES: dict[str, dict[str, Any]] = {"upscaler": {"block_out_channels": [32, 64, 96]}}
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
    "controlnet": "diffusion_pytorch_model",
}
State = dict[str, np.ndarray[Any, Any]]


def config(family: str, component: str) -> dict[str, Any]:
    """The stock config of a component with narrow widths."""
    narrow = deepcopy(families()[family].components[component].config) | NARROW[component]
    own = {"unet": _UNETS, "controlnet": _UNETS, "vae": _VAES}.get(component, {})
    return narrow | own.get(family, {})


@cache
def shapes(family: str, component: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the narrow component."""
    return manifest(families()[family].components[component].class_name, config(family, component))


def weights(family: str, component: str, seed: int = 0) -> State:
    """The narrow component's whole state dict, random."""
    rng = np.random.default_rng(seed)
    return {
        key: rng.standard_normal(shape, np.float32) * np.float32(0.05)
        for key, shape in shapes(family, component).items()
    }


def write_repo(
    folder: Path, family: str, seed: int = 0, components: Sequence[str] | None = None
) -> Path:
    """A diffusers repo of narrow components (by default all that a pipeline has): index, configs
    and weights."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for name in components or pipeline_components(family):
        described = families()[family].components[name]
        index[name] = [described.library, described.class_name]
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config(family, name)))
        save_file(
            weights(family, name, seed),
            folder / name / f"{STEMS[name]}.safetensors",
            {"format": "pt"},
        )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pipeline_components(family: str) -> list[str]:
    """Names of the components that every pipeline of a family has."""
    return [
        name for name, component in families()[family].components.items() if not component.pipelines
    ]


def write_controlnet(folder: Path, family: str) -> Path:
    """A folder that holds a narrow ControlNet alone, as `ControlNetModel.save_pretrained` writes
    it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "ControlNetModel"} | config(family, "controlnet"))
    )
    save_file(
        weights(family, "controlnet"),
        folder / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    return folder


def write_keras(repo: Path, folder: Path, suffix: str) -> dict[str, Path]:
    """KerasCV's files of a repo, `.weights.h5` or legacy `.h5`: part -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    weightport.convert(repo, folder / f"model{suffix}", to="kerascv")
    return {part: folder / f"model.{part}{suffix}" for part in PARTS}


def average_name(key: str) -> str:
    """The name that LitEma gives the average of a tensor of an original checkpoint."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def write_original(repo: Path, file: Path) -> Path:
    """The original checkpoint, one `.safetensors` file, of a repo: the models' own tensors only."""
    made = weightport.convert(repo, file, to="ldm").report["regenerated"]
    save_file(
        {key: tensor for key, tensor in load_file(file).items() if key not in made},
        file,
        {"format": "pt"},
    )
    return file


def write_many_tensors(path: Path, count: int) -> None:
    """A safetensors file of so many tensors of one number; the numbers are a hole in it."""
    entries = {
        f"block.{i}x.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(count)
    }
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * count)
