"""For models with the inputs and outputs of Karras et al. (Elucidating the Design Space of
Diffusion-Based Generative Models), table 1: any σ, no training table. The sample is x₀ + σ·ε."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Scheduler, SchedulerOutput, Timestep, Visits
from .config import Ends, EpsilonOrV, Spread
from .samples import Draw, Generator, combine
from .sigmas import Churn, towards
from .spacing import Array, Numbers, power_spaced, spaced


class Preconditioned(Scheduler):
    """The base of schedulers for such models."""

    has_compatibles = False
    timestep_dtype: ClassVar[Any] = np.float32
    ramp_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of noise and images together."""
        return float((self.config.sigma_max**2 + 1) ** 0.5)

    def _condition(self, sigmas: Tensor) -> Tensor:
        """What the model is told instead of a timestep."""
        return 0.25 * sigmas.log()

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        if sigmas is None:
            ramp = torch.linspace(0, 1, steps, dtype=self.ramp_dtype)
        else:
            ramp = torch.as_tensor(sigmas)
        high = self.config.sigma_max
        low = self.config.sigma_min
        if self.config.sigma_schedule == "karras":
            levels = power_spaced(high, low, ramp.to(self.ramp_dtype), self.config.rho).float()
        else:
            levels = torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)
        end = levels[-1].item() if self.config.final_sigmas_type == "sigma_min" else 0.0
        return self._calls(self._condition(levels).numpy(), levels.numpy(), end)

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        return timesteps.astype(self.timestep_dtype), np.append(sigmas, end)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample with a variance of 1."""
        sigma = self._levels[self._here(self.timesteps[0] if timestep is None else timestep)]
        return sample * float(1 / (sigma**2 + self.config.sigma_data**2) ** 0.5)

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self._sigma_at(timesteps, like)
        return torch.ones_like(sigmas), sigmas

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        data = self.config.sigma_data
        scale = sigma**2 + data**2
        skip = data**2 / scale
        out = sigma * data / scale**0.5
        sign = 1 if self.config.prediction_type == "epsilon" else -1
        return self._limit(combine(skip, x, (sign * out, output)))


class EDMEulerScheduler(Preconditioned):
    """Euler's method for preconditioned models (Karras et al., algorithm 2, without its second
    order)."""

    compatible = True
    steps_untimed = True
    takes = ("sigmas",)
    ramp_dtype = torch.float64

    @configured
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Spread = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: EpsilonOrV = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: Ends = "zero",
    ) -> None:
        self._prepare()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep.

        `s_churn` noise is spread over the steps from σ = `s_tmax` to `s_tmin`, scaled by `s_noise`.
        """
        self._churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
        return super().step(model_output, timestep, sample, generator, return_dict)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x, raised = self._churn.add(x, self._levels[i], len(self._levels) - 1, draw)
        x0 = self._image(x, output, raised)
        return towards(x, x0, raised, self._levels[i + 1]), x0


class CMStochasticIterativeScheduler(Preconditioned):
    """Multistep sampling of consistency models (Song et al., Consistency Models, algorithm 1)."""

    stochastic = True
    steps_untimed = True
    takes = ("timesteps",)
    timestep_dtype = np.float64

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
    ) -> None:
        self._prepare()

    @property
    def init_noise_sigma(self) -> float:
        """The largest σ."""
        return float(self.config.sigma_max)

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        total = len(self)
        high = self.config.sigma_max
        low = self.config.sigma_min
        if timesteps is None:
            timesteps = spaced("leading", steps, total)
        ramp = self._descending(timesteps)[::-1] / max(total - 1, 1)
        levels = power_spaced(high, low, ramp, self.config.rho)
        return self._calls(self.sigma_to_t(levels), levels, low)

    def sigma_to_t(self, sigmas: float | Array) -> Array:
        """What the model is told of noise levels."""
        return np.asarray(1000 * 0.25 * np.log(np.asarray(sigmas, np.float64) + 1e-44))

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma = self._levels[i]
        low = self.config.sigma_min
        data = self.config.sigma_data
        skip = data**2 / ((sigma - low) ** 2 + data**2)  # appendix C
        out = (sigma - low) * data / (sigma**2 + data**2) ** 0.5
        x0 = combine(skip, x, (out, output))
        if self.config.clip_denoised:
            x0 = x0.clamp(-1, 1)
        noise = draw() if len(self._levels) > 2 else None
        end = min(max(self._levels[i + 1], low), self.config.sigma_max)
        up = self.config.s_noise * (end**2 - low**2) ** 0.5
        return combine(1, x0, (up, noise)), None
