"""What SDXL is told of sizes, crops and beauty."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .arguments import Described, Size
from .guidance import Guide
from .noise import Noise

# what the negative prompt is told: the same, unless both sizes are given; or sizes of its own; or
# scores in place of the target size
Negative = Literal["same", "own", "scored"]
Numbers = tuple[float, ...]


def describe(described: Described, size: Size, negative: Negative) -> tuple[Numbers, Numbers]:
    """What the prompt and the negative prompt are told of an image of this size."""
    original = described.original_size or size
    target = described.target_size or size
    crop = described.crops_coords_top_left
    negative_original = described.negative_original_size
    negative_target = described.negative_target_size
    negative_crop = described.negative_crops_coords_top_left
    positive = (*original, *crop, *target)
    if negative == "scored":
        return (
            (*original, *crop, described.aesthetic_score),
            (*(negative_original or original), *negative_crop, described.negative_aesthetic_score),
        )
    if negative == "own":
        # the crop is the prompt's, as in diffusers
        return positive, (*(negative_original or original), *crop, *(negative_target or target))
    if negative_original is not None and negative_target is not None:
        return positive, (*negative_original, *negative_crop, *negative_target)
    return positive, positive


def rows(
    told: tuple[Numbers, Numbers], guide: Guide, noise: Noise, batch: int, *, joins_late: bool
) -> Tensor:
    """A row for each row of the model's batch. Joined first, rows of both signs alternate:
    diffusers does so in text-to-image, and images depend on it."""
    positive, negative = (
        torch.tensor([numbers], dtype=noise.dtype, device=noise.device) for numbers in told
    )
    if joins_late:
        return guide.join(positive.repeat(batch, 1), negative.repeat(batch, 1))
    return guide.join(positive, negative).repeat(batch, 1)
