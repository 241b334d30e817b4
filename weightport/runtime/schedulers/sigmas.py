"""Solvers in the form of k-diffusion: the sample is x₀ + σ·ε, and σ is the time of the ODE dx/dσ =
(x - x₀)/σ.

Formulas: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models; Crowson,
k-diffusion.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device, Scheduler, SchedulerOutput, Timestep, Visits
from .config import Ends, EpsilonOrV, Prediction
from .samples import Draw, Generator, combine
from .spacing import Array, Numbers, TrainedLevels, spaced


class SigmaSolver(Scheduler):
    """A scheduler whose steps go from one σ to the next. `sigmas` has one more entry than there are
    steps: the end."""

    steps_untimed = True
    timestep_dtype: ClassVar[Any] = np.float32
    rounds_karras: ClassVar[bool] = False

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        self._trained = TrainedLevels(self.alphas_cumprod)

    def _training_run(self) -> Visits:
        t = np.arange(len(self), dtype=np.float32)[::-1]
        return self._calls(t, self._trained.at(t), 0.0)

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of pure noise; with `leading` timesteps there is some image in
        it."""
        high = self.sigmas.max()
        pure = self.config.timestep_spacing in ("linspace", "trailing")
        return high if pure else (high**2 + 1).sqrt()

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        if sigmas is not None:
            levels = np.asarray(sigmas, np.float32)
            t = self._trained.timesteps_of(levels[:-1])
            return self._calls(t, levels[:-1], float(levels[-1]))
        t, levels = self._grid(steps, timesteps)
        return self._calls(t, levels, self._end())

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        """Timesteps and σ of the model calls of steps with these, and the end."""
        return timesteps.astype(self.timestep_dtype), np.append(sigmas, end)

    def _end(self) -> float:
        """The σ that the last step ends at."""
        at_lowest = self._own("final_sigmas_type") == "sigma_min"
        return float(self._trained.sigmas[0]) if at_lowest else 0.0

    def _grid(self, steps: int, timesteps: Numbers | None) -> Visits:
        """Timesteps and σ, without the end."""
        dtype = self.timestep_dtype
        t = self._spaced(steps) if timesteps is None else np.asarray(timesteps, dtype)
        sigmas = self._interpolated(t)
        if self._respacing is None:
            return t, sigmas
        ends = sigmas[0].item(), sigmas[-1].item()
        rounds = self.rounds_karras and bool(self.config.use_karras_sigmas)
        return self._respaced(self._trained, steps, timesteps, ends, rounds)

    def _spaced(self, steps: int) -> Array:
        t = spaced(self.config.timestep_spacing, steps, len(self), self.config.steps_offset)
        return t.astype(self.timestep_dtype)

    def _interpolated(self, timesteps: Array) -> Array:
        return self._trained.at(timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample with a variance of 1, as the model was trained."""
        sigma = self._levels[self._here(self.timesteps[0] if timestep is None else timestep)]
        return sample / variance(sigma)[1]

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self._sigma_at(timesteps, like)
        return torch.ones_like(sigmas), sigmas

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        if self.config.prediction_type == "epsilon":
            output = combine(1, x, (-sigma, output))
        elif self.config.prediction_type == "v_prediction":
            squared, deviation = variance(sigma)
            share = float(np.float32(sigma) / np.float32(deviation))
            output = combine(1, x / squared, (-share, output))
        return self._limit(output)


@lru_cache(4096)
def variance(sigma: float) -> tuple[float, float]:
    """Of a noisy sample, and its root: float32 as torch rounds it."""
    squared = torch.tensor(sigma) ** 2 + 1
    return squared.item(), squared.sqrt().item()


def towards(x: Tensor, x0: Tensor, start: float, end: float) -> Tensor:
    """The sample after a step of Euler's method from σ = `start` to `end`, in a straight line to
    x₀.

    Written with the slope: what cancels at large σ then rounds as it does elsewhere.
    """
    return x + (x - x0) / start * (end - start)


def ancestral(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """σ to step down to, and of the noise to add then, so that the variance is that of σ =
    `end`."""
    up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
    down = (end**2 - up**2) ** 0.5
    return down, up


class Churn(NamedTuple):
    """More noise for a step to begin with (Karras et al., algorithm 2): so much is spread over the
    steps from σ = `high` to `low`, scaled by `scale`."""

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0

    def add(self, x: Tensor, sigma: float, steps: int, draw: Draw) -> tuple[Tensor, float]:
        """The sample that a step of `steps` begins with, and its σ."""
        if self.amount <= 0 or not self.low <= sigma <= self.high:
            return x, sigma
        gamma = min(self.amount / steps, 2**0.5 - 1)
        raised = sigma * (1 + gamma)
        return combine(1, x, (self.scale * (raised**2 - sigma**2) ** 0.5, draw())), raised


class EulerDiscreteScheduler(SigmaSolver):
    """Euler's method, with noise to churn the sample (Karras et al., algorithm 2, without its
    second order)."""

    names: ClassVar = {"euler": {}, "euler-karras": {"use_karras_sigmas": True}}
    compatible = True
    clips_alpha_bar = True
    takes = ("timesteps", "sigmas")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        prediction_type: Literal[
            "epsilon", "sample", "v_prediction", "original_sample"
        ] = "epsilon",
        interpolation_type: Literal["linear", "log_linear"] = "linear",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: Literal["discrete", "continuous"] = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
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

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        continuous = self.config.timestep_type == "continuous"
        if continuous and self.config.prediction_type == "v_prediction":
            timesteps = 0.25 * torch.from_numpy(np.array(sigmas, np.float32)).log().numpy()
        return super()._calls(timesteps, sigmas, end)

    def _interpolated(self, timesteps: Array) -> Array:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps)
        high = float(self._trained.logs[-1])
        low = float(self._trained.logs[0])
        return torch.linspace(high, low, len(timesteps) + 1).exp().numpy()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        sigma = self._levels[i]
        x, raised = self._churn.add(x, sigma, len(self._levels) - 1, draw)
        told = self.config.prediction_type != "v_prediction"  # models of v know of no churn
        x0 = self._image(x, output, raised if told else sigma)
        return towards(x, x0, raised, self._levels[i + 1]), x0


class EulerAncestralDiscreteScheduler(SigmaSolver):
    """Euler's method to a lower σ, then noise."""

    names: ClassVar = {"euler-a": {}}
    compatible = True
    stochastic = True
    clips_alpha_bar = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        prediction_type: EpsilonOrV = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        ends, noises = ancestral(self.sigmas[:-1], self.sigmas[1:])
        self._ends: list[float] = ends.tolist()
        self._noises: list[float] = noises.tolist()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        sigma = self._levels[i]
        x0 = self._image(x, output, sigma)
        down = towards(x, x0, sigma, self._ends[i])
        return combine(1, down, (self._noises[i], draw())), x0


class LMSDiscreteScheduler(SigmaSolver):
    """Linear multistep: the slope is a polynomial through the last four, integrated over the
    step."""

    names: ClassVar = {"lms": {}}
    compatible = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: Prediction = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep, with the slopes of so many steps."""
        self._order = order
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        sigma = self._levels[i]
        x0 = self._image(x, output, sigma)
        slope = (x - x0) / sigma
        self._history = [slope, *self._history[: self._order - 1]]
        # In a run that begins later the first steps lack slopes, and their share is left out, as in
        # diffusers.
        weights = self._weights(i, min(i + 1, self._order))
        return combine(1, x, *zip(weights, self._history, strict=False)), x0

    def _weights(self, i: int, order: int) -> list[float]:
        """Integrals of the Lagrange polynomials; two Gauss points are exact up to the third
        degree."""
        start = self._levels[i]
        end = self._levels[i + 1]
        past = self._levels[i - order + 1 : i + 1][::-1]
        middle = (start + end) / 2
        reach = (end - start) / 2
        points = middle - reach / 3**0.5, middle + reach / 3**0.5
        return [reach * sum(lagrange(past, s, point) for point in points) for s in past]


def lagrange(nodes: list[float], one: float, point: float) -> float:
    """At `point`, the polynomial that is 1 at a node and 0 at the others."""
    return math.prod((point - node) / (one - node) for node in nodes if node != one)
