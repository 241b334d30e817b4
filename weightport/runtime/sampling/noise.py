"""Where random numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import Draws, Generator, require


@dataclass(frozen=True)
class Noise:
    """The generators of a run, and where and in which dtype it computes."""

    generator: Generator
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, draws: Draws, images: int, device: torch.device, dtype: torch.dtype) -> Noise:
        """The noise of a run that makes so many images.

        Raises:
            ValueError: the generators are not as many.
        """
        generator = draws.generator
        if isinstance(generator, list):
            count = len(generator)
            fits = count in (1, images)
            require(fits, f"{count} generators are given for {images} images")
            generator = generator[0] if count == 1 else generator
        return cls(generator, device, dtype)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Normal noise, drawn on the generator's device. With a list of generators, each draws one
        row."""
        if isinstance(self.generator, list):
            row = (1, *shape[1:])
            return torch.cat([self._draw(row, one) for one in self.generator])
        return self._draw(tuple(shape), self.generator)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        drawn = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        return drawn.to(self.device)
