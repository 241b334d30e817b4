"""Solvers in the form of k-diffusion: the sample is x₀ + σ·ε, and σ is the time of the ODE dx/dσ = (x - x₀)/σ.

Formulas: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models; Crowson, k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import (
    RESPACING,
    SPACING,
    TRAINING,
    Generator,
    Scheduler,
    SchedulerOutput,
    Timestep,
    combine,
    draw_noise,
    widened,
)
from .spacing import Array, spaced, timestep_of

PREDICTIONS: dict[str, tuple[Any, ...]] = {"prediction_type": ("epsilon", "v_prediction")}
Device = str | torch.device | None


class SigmaScheduler(Scheduler):
    """A scheduler whose steps go from one σ to the next. `sigmas` has one more entry than there are steps: the end."""

    choices = PREDICTIONS
    rounds_karras: ClassVar[bool] = False  # whether timesteps of Karras' σ are whole numbers

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._trained = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        self._log_trained = np.log(self._trained)
        self._begin(np.arange(len(self), dtype=np.float32)[::-1].copy(), self._trained[::-1])
        self.num_inference_steps = None

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of pure noise; with `leading` timesteps there is some image in it."""
        high = float(self.sigmas.max())
        return high if self.config.timestep_spacing in ("linspace", "trailing") else (high**2 + 1) ** 0.5

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of so many steps."""
        self._begin(*self._grid(num_inference_steps), device=device)

    def _grid(self, steps: int, timesteps: Sequence[float] | None = None) -> tuple[Array, Array]:
        """Timesteps and σ of a run, without the end; `timesteps` instead of those that the config asks for."""
        config, respace = self.config, self._respacing
        t = spaced(config.timestep_spacing, steps, len(self), config.steps_offset) if timesteps is None else timesteps
        t = np.asarray(t).astype(np.float32)
        sigmas = self._interpolated(t)
        if respace is None:
            return t, sigmas
        if timesteps is not None:
            raise ValueError("timesteps cannot be given where the config asks for Karras, exponential or beta sigmas")
        high, low = self._own("sigma_max"), self._own("sigma_min")
        high, low = sigmas[0].item() if high is None else high, sigmas[-1].item() if low is None else low
        sigmas = respace(high, low, steps)
        t = timestep_of(sigmas, self._log_trained)
        return t.round() if self.rounds_karras and config.use_karras_sigmas else t, sigmas

    def _interpolated(self, timesteps: Array) -> Array:
        return np.asarray(np.interp(timesteps, np.arange(len(self)), self._trained))

    def _begin(self, timesteps: Array, sigmas: Array, end: float = 0.0, device: Device = None) -> None:
        """Take these timesteps and σ for a run, which ends at `end`."""
        self.sigmas = torch.from_numpy(np.append(sigmas, end).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(device)
        self._levels: list[float] = self.sigmas.tolist()  # σ of every model call, and the end
        self.num_inference_steps = len(timesteps)
        self._restart()

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample with a variance of 1, as the model was trained."""
        sigma = self._levels[self._here(self.timesteps[0] if timestep is None else timestep)]
        return sample / float((sigma**2 + 1) ** 0.5)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as the run has them at `timesteps` (b,), or at the step that it begins with."""
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)
        sigma = self.sigmas[indices].to(original_samples).view(-1, *[1] * (original_samples.ndim - 1))
        return self._noised(original_samples, noise, sigma)

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        noisy: Tensor = x0 + sigma * noise
        return noisy

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        match self.config.prediction_type:
            case "epsilon":
                return self._limit(combine(1, x, (-sigma, output)))
            case "v_prediction":
                scale = sigma**2 + 1
                return self._limit(combine(1 / scale, x, (-sigma / scale**0.5, output)))
        return self._limit(output)


def towards(x: Tensor, x0: Tensor, start: float, end: float) -> Tensor:
    """The sample after a step of Euler's method from σ = `start` to `end`, in a straight line to x₀.

    Written with the slope: what cancels at large σ then rounds as it does elsewhere.
    """
    return x + (x - x0) / start * (end - start)


class EulerDiscreteScheduler(SigmaScheduler):
    """Euler's method, with noise to churn the sample (Karras et al., algorithm 2, without its second order)."""

    clips_alpha_bar = True
    defaults = (
        TRAINING
        | SPACING
        | RESPACING
        | {
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        }
    )
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "prediction_type": ("epsilon", "sample", "original_sample", "v_prediction"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Begin a run of so many steps, or of these timesteps, or of these σ, the end among them.

        Raises:
            ValueError: not exactly one of them is given, or the config does not go with it.
        """
        if sum(given is not None for given in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        if sigmas is not None:
            levels = np.asarray(sigmas, dtype=np.float32)
            t, table, end = timestep_of(levels[:-1], self._log_trained), levels[:-1], float(levels[-1])
        else:
            steps = num_inference_steps if timesteps is None else len(timesteps)
            t, table = self._grid(int(steps or 0), timesteps)
            end = float(self._trained[0]) if self.config.final_sigmas_type == "sigma_min" else 0.0
        self._begin(t, table, end, device)

    def _begin(self, timesteps: Array, sigmas: Array, end: float = 0.0, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, end, device)
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            self.timesteps = (0.25 * self.sigmas[:-1].log()).to(device)

    def _interpolated(self, timesteps: Array) -> Array:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps)
        high, low = float(self._log_trained[-1]), float(self._log_trained[0])
        return torch.linspace(high, low, len(timesteps) + 1).exp().numpy()

    def step(
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

        Args:
            model_output: what the model predicts, as `prediction_type` says.
            timestep: the one that the model was called with.
            sample: what it was called for, before `scale_model_input`.
            s_churn: amount of noise that is added before the steps, over the whole run.
            s_tmin: churn from this σ …
            s_tmax: … to this one.
            s_noise: scale of the added noise.
            generator: draws it.
            return_dict: of no effect, the result is a tuple with names.
        """
        i, x = self._next(timestep), widened(sample)
        sigma = raised = self._levels[i]
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            raised = sigma * (1 + min(s_churn / (len(self._levels) - 1), 2**0.5 - 1))
            noise = draw_noise(model_output, generator)
            x = combine(1, x, (s_noise * (raised**2 - sigma**2) ** 0.5, noise))
        x0 = self._image(x, model_output, raised if self.config.prediction_type == "epsilon" else sigma)
        x = towards(x, x0, raised, self._levels[i + 1])
        return SchedulerOutput(x.to(model_output.dtype), x0)
