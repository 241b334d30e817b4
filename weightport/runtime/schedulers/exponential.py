"""What exponential integrators share. In λ = log(α/σ) they solve the linear part exactly.

The sample is variance preserving, α² + σ² = 1; but for flows, α + σ = 1. `sigmas` holds σ/α (flows:
σ).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .base import Device, Scheduler, Visits
from .samples import to_image, to_noise
from .spacing import Array, Numbers, TrainedLevels, flow_shifted, spaced

SHORT_RUN = 15  # steps; the last ones of shorter runs are of lower order, which is more stable
Rows = list[tuple[float, ...]]


def as_rows(*tables: Tensor) -> Rows:
    """Tables of coefficients as a row a step; what a step of no length divides by zero plays no
    part in it."""
    return [tuple(row) for row in torch.stack(tables, 1).nan_to_num(0.0, 0.0, 0.0).tolist()]


class Levels(NamedTuple):
    """α, σ and λ where the steps of a run begin, and at its end."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor


def levels_of(alpha: Tensor, sigma: Tensor) -> Levels:
    """With λ = log(α/σ)."""
    return Levels(alpha, sigma, alpha.log() - sigma.log())


class Orders(NamedTuple):
    """Which order the steps of a multistep method have.

    Attributes:
        most: no step has more.
        steps: of the run.
        short: whether the run is so short that its last two steps are of lower order.
        first_at_end: whether the last one is of first order.
    """

    most: int
    steps: int
    short: bool
    first_at_end: bool

    def at(self, i: int, known: int) -> int:
        """The order of step i, where so many outputs are known."""
        left = self.steps - 1 - i
        if left == 0 and (self.short or self.first_at_end):
            return 1
        wanted = 2 if left == 1 and self.short else self.most
        return min(wanted, known)


class ExponentialSolver(Scheduler):
    """A scheduler whose steps are rows of coefficients: for x, the noise, and what is known of the
    outputs."""

    strays_end = True

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        self._trained = TrainedLevels(self.alphas_cumprod)

    def _training_run(self) -> Visits:
        t = np.arange(len(self), dtype=np.float32)[::-1]
        return self._calls(t, self._trained.at(t), 0.0)

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        t, levels = self._grid(steps, timesteps)
        return self._calls(t, levels, self._end(levels))

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        """Timesteps and σ of the model calls, and the end."""
        return timesteps.astype(np.int64), np.append(sigmas, end)

    def _grid(self, steps: int, timesteps: Numbers | None) -> Visits:
        """Timesteps and σ, without the end."""
        if self._respacing:
            ends = self._range()
            return self._respaced(self._trained, steps, timesteps, ends, self._rounds())
        if self._own("use_flow_sigmas"):
            shift = self.config.flow_shift if self._mu is None else math.exp(self._mu)
            evenly = np.linspace(1, 1 / len(self), steps + 1)
            sigmas = flow_shifted(1 - evenly, shift)[::-1][:-1]
            return sigmas * len(self), sigmas
        t = self._spaced(steps) if timesteps is None else np.asarray(timesteps, np.int64)
        return t, self._trained.at(t)

    def _range(self) -> tuple[float, float]:
        """The first and the last σ of a run whose σ are spaced."""
        return self._trained.sigmas[-1].item(), self._trained.sigmas[0].item()

    def _rounds(self) -> bool:
        """Whether timesteps of spaced σ are rounded."""
        return bool(self.config.use_karras_sigmas)

    def _end(self, sigmas: Array) -> float:
        """The σ that the last step ends at, after `sigmas`."""
        at_lowest = self._own("final_sigmas_type") == "sigma_min"
        return float(self._trained.sigmas[0]) if at_lowest else 0.0

    @property
    def _plain(self) -> bool:
        """Whether σ are those of the timesteps."""
        return self._respacing is None and not self._own("use_flow_sigmas")

    def _lowest(self, sigmas: Array) -> float:
        """The smallest σ of training, or of a run whose σ are not those of timesteps."""
        return float(self._trained.sigmas[0] if self._plain else sigmas[-1])

    def _last_timestep(self) -> int:
        """Timesteps in use: `lambda_min_clipped` leaves out the noisiest."""
        clip = self._own("lambda_min_clipped")
        if clip is None:
            return len(self)
        return len(self) - int(np.searchsorted(-self._trained.logs[::-1], clip))

    def _spaced(self, steps: int) -> Array:
        spacing = self._own("timestep_spacing") or "linspace"
        offset = self._own("steps_offset") or 0
        last = self._last_timestep()
        return spaced(spacing, steps, len(self), offset, spare=1, last=last).round()

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        if self.num_inference_steps is not None:
            self.num_inference_steps = len(timesteps)  # without those that were there twice
        alpha, sigma = self._split(self.sigmas)
        self._noise_levels = levels_of(alpha, sigma)
        self._parts = list(zip(alpha.tolist(), sigma.tolist(), strict=True))

    def _split(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of samples where the run has these."""
        if self._own("use_flow_sigmas"):
            return 1 - sigmas, sigmas
        alpha = 1 / (sigmas**2 + 1).sqrt()
        return alpha, sigmas * alpha

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self._sigma_at(timesteps, like))

    @property
    def _images(self) -> bool:
        """Whether x₀ are kept of outputs, or ε."""
        return True

    def _converted(self, i: int, x: Tensor, output: Tensor) -> Tensor:
        """What the model says as x₀, or as ε."""
        kind = self.config.prediction_type
        alpha, sigma = self._parts[i]
        if kind == "epsilon" and self._own("variance_type") in ("learned", "learned_range"):
            output = output[:, :3]  # the rest is the variance
        images = self._images
        if not images and not self._own("thresholding"):
            return to_noise(kind, x, output, alpha, sigma)
        share = self._levels[i] if kind == "flow_prediction" else sigma
        x0 = self._limit(to_image(kind, x, output, alpha, share))
        return x0 if images else to_noise("sample", x, x0, alpha, sigma)
