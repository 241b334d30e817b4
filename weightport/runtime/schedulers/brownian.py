"""Brownian motion over σ, for solvers that look twice at the noise of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BrownianNoise:
    """Normal noise W(end) - W(start) of variance 1, where σ never rises from call to call.

    With `torchsde` installed the path is its `BrownianInterval`, so that a seed gives the images
    that it gives elsewhere. Without it the path is drawn step by step: as exact, but another one.
    """

    def __init__(self, like: Tensor, low: float, high: float, seed: int | list[int] | None) -> None:
        low = round(low, 6)  # torchsde rounds its ends so
        high = round(high, 6)
        if isinstance(seed, list):
            seeds = seed
            self._parts = like  # a seed draws a part
        else:
            seeds = [int(torch.randint(0, 2**63 - 1, [])) if seed is None else seed]
            self._parts = like[None]
        self._trees = _trees(self._parts[0], low, high, seeds)
        self._generators = [
            torch.Generator(like.device).manual_seed(int(one) % 2**63) for one in seeds
        ]
        self._low = low
        self._high = high
        self._path = {high: torch.zeros_like(self._parts)}
        self._shape = like.shape

    def __call__(self, start: float, end: float) -> Tensor:
        """The noise of a step from σ = `start` to `end`."""
        t = self._inside(start)
        to = self._inside(end)
        if t == to:
            return torch.zeros_like(self._parts).view(self._shape)
        if self._trees:
            moved = torch.stack([-tree(to, t) for tree in self._trees])
        else:
            moved = self._at(to) - self._at(t)
        noise: Tensor = moved / (start - end) ** 0.5
        return noise.view(self._shape)

    def _inside(self, sigma: float) -> float:
        """σ on the path: by rounding it can lie outside."""
        return min(max(sigma, self._low), self._high)

    def _at(self, sigma: float) -> Tensor:
        """The path at σ, which is drawn on from the lowest one so far."""
        if sigma not in self._path:
            low = min(self._path)
            part = self._parts[0]
            drawn = [
                torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
                for generator in self._generators
            ]
            self._path[sigma] = self._path[low] + (low - sigma) ** 0.5 * torch.stack(drawn)
        return self._path[sigma]


def _trees(like: Tensor, low: float, high: float, seeds: list[int]) -> list[Any]:
    """The paths of `torchsde`, one for each seed; none without it, which is the extra `sde`."""
    try:
        from torchsde import BrownianInterval
    except ImportError:
        return []
    options: dict[str, Any] = {"tol": 1e-6, "pool_size": 24, "halfway_tree": True}
    options |= {"size": like.shape, "dtype": like.dtype, "device": like.device}
    return [BrownianInterval(t0=low, t1=high, entropy=seed, **options) for seed in seeds]
