"""What scripts take from `diffusers.utils.torch_utils`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.sampling.arguments import Draws, Generator
from ..runtime.sampling.noise import Noise

__all__ = ["randn_tensor"]


def randn_tensor(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise, drawn where the generator is and then moved; of several generators
    each draws a row.

    Raises:
        ValueError: the generators are not as many as rows.
    """
    place = torch.device(device or "cpu")
    noise = Noise.of(Draws(generator), shape[0], place, dtype or torch.get_default_dtype())
    return noise.draw(shape)
