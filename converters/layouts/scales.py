"""Weights of eight bits that were divided by a scale, as ComfyUI keeps them: multiplied again.

How scales are named is data: `mappings/facts/ldm.toml`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import ConversionError, printable
from ...io.dtypes import EIGHT_BITS, FLOATS
from ...mappings.facts import facts
from ..checkpoint import Checkpoint, Computed, Tensor

if TYPE_CHECKING:
    from ...io.arrays import Array


def unscaled(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each scaled weight times its scale, in float32, rounded once.

    Raises:
        ConversionError: a scale has no weight of eight bits beside it, or a shape that is none.
    """
    known = facts("ldm")["scales"]
    scales = _named(checkpoint, known["weights"])
    inputs = _named(checkpoint, known["inputs"])
    markers = [key for key in checkpoint.tensors if key.rpartition(".")[2] == known["marker"]]
    if not scales and not markers:
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for scale, weight in scales.items():
        tensors[weight] = _scaled(checkpoint, scale, weight)
    skipped = dict(checkpoint.skipped)
    reasons = {
        "the scale of a weight, which is multiplied by it": scales,
        "the scale of an input, for programs that compute in 8 bits": inputs,
        "a marker of scaled weights, which are multiplied by their scales": markers,
    }
    for reason, keys in reasons.items():
        for key in keys:
            del tensors[key]
            skipped[key] = reason
    return replace(checkpoint, tensors=tensors, skipped=skipped)


def _named(checkpoint: Checkpoint, names: list[str]) -> dict[str, str]:
    """The tensors with such names, each with the name of the weight beside it."""
    endings = tuple(f".{name}" for name in names)
    found = [key for key in checkpoint.tensors if key.endswith(endings)]
    return {key: f"{key.rpartition('.')[0]}.weight" for key in found}


def _scaled(checkpoint: Checkpoint, scale_key: str, weight_key: str) -> Tensor:
    """A weight times its scale."""
    scale = checkpoint.tensors[scale_key]
    weight = checkpoint.tensors.get(weight_key)
    shown = f"{checkpoint.path}: `{printable(scale_key)}`"
    if weight is None or weight.dtype not in EIGHT_BITS or scale.dtype not in FLOATS:
        raise ConversionError(f"{shown} is the scale of no weight of 8 bits")
    rank = len(weight.shape)
    rows = weight.shape[0] if rank else 1
    count = math.prod(scale.shape)
    if count not in (1, rows) or len(scale.shape) > max(rank, 1):
        raise ConversionError(
            f"{shown} has the shape {list(scale.shape)}: neither one number nor one for each of the"
            f" {rows} rows"
        )

    def compute(values: Array, factors: Array) -> Array:
        import numpy as np

        shaped = factors.astype(np.float32).reshape(count, *[1] * (rank - 1)) if rank else factors
        product: Array = values.astype(np.float32) * shaped
        return product

    return Computed(weight.name, "F32", weight.shape, (weight, scale), compute, "times its scale")
