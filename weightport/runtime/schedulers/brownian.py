"""Brownian motion over σ, for solvers that look twice at the noise of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import torchsde
except ImportError:  # the extra `sde`
    torchsde = None


class BrownianNoise:
    """Normal noise W(end) - W(start) of variance 1, where σ never rises from call to call.

    With `torchsde` installed the path is its `BrownianInterval`, so that a seed gives the images that it gives
    elsewhere. Without it the path is drawn step by step: as exact, but another one.
    """

    def __init__(self, like: Tensor, low: float, high: float, seed: int | list[int] | None) -> None:
        self._like, self._batched = like, isinstance(seed, list)
        seeds = seed if isinstance(seed, list) else [torch.randint(0, 2**63 - 1, []).item() if seed is None else seed]
        shape = like.shape[1:] if self._batched else like.shape
        if torchsde:
            options: dict[str, Any] = {"tol": 1e-6, "pool_size": 24, "halfway_tree": True}
            options |= {"size": shape, "dtype": like.dtype, "device": like.device}
            self._trees = [torchsde.BrownianInterval(t0=low, t1=high, entropy=one, **options) for one in seeds]
        self._generators = [torch.Generator(like.device).manual_seed(int(one) % 2**63) for one in seeds]
        self._path = {high: torch.zeros_like(like)}

    def __call__(self, start: float, end: float) -> Tensor:
        """The noise of a step from σ = `start` to `end`."""
        if start == end:
            return torch.zeros_like(self._like)
        if torchsde:
            moved = torch.stack([-tree(torch.tensor(end), torch.tensor(start)) for tree in self._trees])
            moved = moved if self._batched else moved[0]
        else:
            moved = self._at(end) - self._at(start)
        noise: Tensor = moved / (start - end) ** 0.5
        return noise

    def _at(self, sigma: float) -> Tensor:
        if sigma not in self._path:
            low = min(self._path)
            shape = self._like.shape[1:] if self._batched else self._like.shape
            drawn = [torch.randn(shape, generator=g, device=g.device, dtype=self._like.dtype) for g in self._generators]
            noise = torch.stack(drawn) if self._batched else drawn[0]
            self._path[sigma] = self._path[low] + (low - sigma) ** 0.5 * noise
        return self._path[sigma]
