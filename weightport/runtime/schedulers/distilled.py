"""Solvers for models distilled on few timesteps of a longer run: LCM and TCD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ..loading.options import configured
from ..outputs import Output
from .base import Device, Timestep, Visits
from .config import Prediction
from .discrete import NO_SIGMAS, DiscreteSolver, parts
from .samples import Draw, Generator, combine, to_image
from .spacing import Array, Numbers


@dataclass(eq=False)
class LCMSchedulerOutput(Output):
    """The sample at the next timestep, and the image that the model sees in this one."""

    prev_sample: Tensor
    denoised: Tensor | None = None


@dataclass(eq=False)
class TCDSchedulerOutput(Output):
    """The sample at the next timestep, and as it was before noise was added."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


def long_run(total: int, steps: int, strength: float) -> Array:
    """The timesteps that a model was distilled on, ascending: of `total`, so many; `strength`
    leaves out noisy ones."""
    return np.arange(1, int(steps * strength) + 1) * (total // steps) - 1


def chosen(distilled: Array, steps: int) -> Array:
    """So many of the `distilled` timesteps, descending.

    Raises:
        ValueError: there are not so many.
    """
    if steps > len(distilled):
        raise ValueError(
            f"{steps} steps: there are only {len(distilled)} distilled ones; raise strength"
        )
    places = np.floor(np.linspace(0, len(distilled), steps, endpoint=False))
    return np.asarray(distilled[::-1][places.astype(int)])


def latest(timesteps: Array, strength: float) -> Array:
    """The clean end of a run, where `strength` leaves out the noisy one."""
    steps = len(timesteps)
    return timesteps[steps - min(int(steps * strength), steps) :]


class LCMScheduler(DiscreteSolver):
    """Jump to the image, add noise, jump again (Luo et al., Latent Consistency Models, algorithm
    3)."""

    names: ClassVar = {"lcm": {}}
    has_compatibles = False
    stochastic = True
    counts_steps = True
    takes = ("timesteps",)

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Numbers | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Numbers | None = None,
        strength: float = 1.0,
    ) -> None:
        """Begin a run of so many distilled timesteps, or of these timesteps; `strength` leaves out
        noisy ones."""
        self._original = original_inference_steps or self.config.original_inference_steps
        self._strength = strength
        super().set_timesteps(num_inference_steps, device, timesteps)

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        if timesteps is not None:
            return latest(self._descending(timesteps), self._strength), NO_SIGMAS
        distilled = long_run(len(self), self._original, self._strength)
        return chosen(distilled, steps), NO_SIGMAS

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput:
        """Go to the next timestep, with noise from the generator."""
        parts = self._step(model_output, timestep, sample, generator)
        return LCMSchedulerOutput.asked(return_dict, *parts)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to = self._to
        scaled = i * self.config.timestep_scaling
        skip = 0.25 / (scaled**2 + 0.25)  # section 4.2, with σ_data = 0.5
        out = scaled / (scaled**2 + 0.25) ** 0.5
        x0 = combine(out, self._image(x, output, i), (skip, x))
        if to < 0:
            return x0, x0
        alpha, sigma = self._parts(to)
        return combine(alpha, x0, (sigma, draw())), x0


class TCDScheduler(DiscreteSolver):
    """Jump beyond the next timestep, and back to it with noise (Zheng et al., Trajectory
    Consistency, algorithm 4)."""

    names: ClassVar = {"tcd": {}}
    has_compatibles = False
    stochastic = True
    counts_steps = True
    takes = ("timesteps",)

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Numbers | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Numbers | None = None,
        strength: float = 1.0,
    ) -> None:
        """Begin a run of so many distilled timesteps, or of these timesteps; `strength` leaves out
        noisy ones."""
        self._original = original_inference_steps
        self._strength = strength
        super().set_timesteps(num_inference_steps, device, timesteps)

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        if timesteps is not None:
            return latest(self._descending(timesteps), self._strength), NO_SIGMAS
        if self._original:  # of training, all
            distilled: Array = np.arange(int(len(self) * self._strength))
        else:
            original = self.config.original_inference_steps
            distilled = long_run(len(self), original, self._strength)
        return chosen(distilled, steps), NO_SIGMAS

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput:
        """Go to the next timestep; `eta` is the γ of the paper, from 0 without noise to 1 with
        most."""
        self._eta = eta
        parts = self._step(model_output, timestep, sample, generator)
        return TCDSchedulerOutput.asked(return_dict, *parts)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to = self._to
        beyond = int(np.float32(1 - self._eta) * np.float32(max(to, 0)))
        alpha, sigma = self._parts(beyond)
        x0 = to_image(self.config.prediction_type, x, output, *self._parts(i))
        x = combine(alpha, x0, (sigma, self._noise(x, output, i)))
        if self._eta <= 0 or to < 0:
            return x, x
        alpha, sigma = parts(float(self._alpha_bar(to) / self._alpha_bar(beyond)))
        return combine(alpha, x, (sigma, draw())), x
