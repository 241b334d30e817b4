"""Checkpoints with random weights, full-size, of half the width or narrow, made from the mapping
tables."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weightport.converters.checkpoint import Computed
from weightport.converters.outputs.kerascv_file import write_keras
from weightport.converters.planning.candidates import Candidate, candidates
from weightport.converters.writers.safetensors import Output, write_safetensors
from weightport.io.arrays import DTYPES, Array
from weightport.mappings.families import families

Shape = tuple[int, ...]
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 96, 96]},
    "vae": {"block_out_channels": [32, 64, 96, 96]},
}
"""Component -> what its config says in place of the stock one."""
SIZES: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "full": {},
    "half": {
        "unet": {"block_out_channels": [160, 320, 640, 640]},
        "transformer": {"num_layers": 10, "num_single_layers": 18},
    },
    "narrow": {**NARROW, "transformer": {"num_layers": 2, "num_single_layers": 4}},
}
"""Of Stable Diffusion 1.5: 4.3, 1.7 and 0.5 GB in float32; of FLUX.1's transformer, in full width
and of fewer blocks: 23.8, 11.9 and 2.5 GB in bfloat16."""


def keras_unet(path: Path, size: str = "full") -> None:
    """A KerasCV UNet of Stable Diffusion 1.x as `.weights.h5`, 3.4 GB.

    Every kernel has to be transposed.
    """
    parts = {(known.family.name, known.part): known for known in candidates("kerascv")}
    shapes = _shapes(parts["sd1", "unet"], size)
    random = _random()
    tensors = {key: functools.partial(random, shape) for key, shape in shapes.items()}
    write_keras(path, "unet", tensors, lambda nbytes: None)
    os.sync()


def original(
    path: Path, family: str, dtype: str, size: str = "full", part: str | None = None
) -> None:
    """A whole model under its original keys as `.safetensors`, with the noise schedule.

    Args:
        part: this one alone.
    """
    random = _random()
    shapes = {"alphas_cumprod": (1000,), "betas": (1000,)} if part is None else {}
    for candidate in candidates("ldm"):
        component = candidate.component
        is_stock = candidate.family.components.get(component.name) is component
        written = not candidate.table.about.get("read_only")
        wanted = is_stock and written and not component.extends
        wanted = wanted and part in (None, candidate.part)
        if candidate.family.name == family and wanted:
            shapes |= _shapes(candidate, size)

    def compute(shape: Shape) -> Array:
        return random(shape).astype(DTYPES[dtype])

    tensors = [
        Computed(key, dtype, shape, (), functools.partial(compute, shape), "")
        for key, shape in shapes.items()
    ]
    outputs = [Output(tensor.name, dtype, tensor.shape, (tensor,)) for tensor in tensors]
    write_safetensors(path.parent, path.name, outputs, max_shard_size=1 << 40)
    os.sync()


def pickled(source: Path, path: Path) -> None:
    """The same as a `.ckpt` of PyTorch Lightning."""
    import torch
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(source), "global_step": 840_000}, path)
    os.sync()


def config(family: str, component: str, size: str) -> dict[str, Any]:
    """The config of a model of some size."""
    return {**families()[family].components[component].config, **SIZES[size].get(component, {})}


def _shapes(candidate: Candidate, size: str) -> dict[str, Shape]:
    """Source key -> shape of a whole part."""
    component = candidate.component
    own = config(candidate.family.name, component.name, size)
    targets = component.model.tensors(own)
    links = candidate.table.links(targets, component.model.names(own))
    return {key: link.source_shape(targets) for link in links for key in link.sources}


def _random() -> Callable[[Shape], Array]:
    """A function that makes weights: slices of a million random numbers, quicker than new ones."""
    pool = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    return lambda shape: np.resize(pool[math.prod(shape) % 1000 :], shape)
