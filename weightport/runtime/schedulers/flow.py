"""Solvers for flows: the sample is (1 - σ)·x₀ + σ·ε, the model predicts the velocity ε - x₀, and σ is the time.

Flow matching: Lipman et al., Flow Matching for Generative Modeling; shifts: Esser et al., Scaling Rectified Flow
Transformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import base
from .base import Draw, Numbers, Options, Scheduler, beside, combine
from .karras import Choices
from .spacing import Array, flow_shifted, stretched, time_shifted


class FlowSolver(Scheduler):
    """The base of the solvers of flows."""

    has_compatibles = False
    defaults: ClassVar[Options] = {"num_train_timesteps": 1000, "shift": 1.0}

    def _set_training_noise(self) -> None:
        self._shift = self.config.shift
        sigmas = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        if not self._own("use_dynamic_shifting"):
            sigmas = self._shift * sigmas / (1 + (self._shift - 1) * sigmas)
        self.sigma_max, self.sigma_min = sigmas[0].item(), sigmas[-1].item()
        self._begin((sigmas * len(self)).numpy(), sigmas.numpy())

    @property
    def shift(self) -> float:
        """How far runs are moved towards noise."""
        return float(self._shift)

    def set_shift(self, shift: float) -> None:
        """Move the next runs so far."""
        self._shift = shift

    def _spread(self, steps: int) -> Array:
        total = len(self)
        return np.linspace(self.sigma_max * total, self.sigma_min * total, steps) / total

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        levels = flow_shifted(self._spread(steps), self._shift).astype(np.float32)
        return levels * np.float32(len(self)), np.append(levels, 0)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noisy samples as the run has them at `timestep` (b,), or at the step that it begins with."""
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timestep]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timestep)
        sigma = beside(self.sigmas[indices], sample)
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, under the name that it has elsewhere."""
        return self.scale_noise(original_samples, timesteps, noise)


class FlowMatchEulerDiscreteScheduler(FlowSolver):
    """Euler's method, or with `stochastic_sampling` to the image and back with new noise."""

    takes = ("timesteps", "sigmas")
    defaults = (
        FlowSolver.defaults
        | base.RESPACING
        | {
            "use_dynamic_shifting": False,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "invert_sigmas": False,
            "shift_terminal": None,
            "time_shift_type": "exponential",
            "stochastic_sampling": False,
        }
    )
    choices: ClassVar[Choices] = {"time_shift_type": ("exponential", "linear")}

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        config, total = self.config, np.float32(len(self))
        given = None if timesteps is None else np.asarray(timesteps, np.float32)
        if sigmas is not None:
            levels = np.asarray(sigmas, np.float32)
        else:
            levels = self._spread(steps) if given is None else given / total
        dynamic = config.use_dynamic_shifting
        levels = (
            time_shifted(levels, self._mu, config.time_shift_type) if dynamic else flow_shifted(levels, self._shift)
        )
        levels = stretched(levels, config.shift_terminal) if config.shift_terminal else levels
        if self._respacing:
            levels = self._respacing(levels[0].item(), levels[-1].item(), len(levels))
        levels = levels.astype(np.float32)
        if config.invert_sigmas:
            levels = 1 - levels
        t = given if given is not None and not config.invert_sigmas else levels * total
        return t, np.append(levels, 1 if config.invert_sigmas else 0)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma, end = self._levels[i : i + 2]
        if not self.config.stochastic_sampling:
            return combine(1, x, (end - sigma, output)), None
        x0 = combine(1, x, (-sigma, output))
        return combine(1 - end, x0, (end, draw(x0, torch.float32))), None


class FlowMatchHeunDiscreteScheduler(FlowSolver):
    """Heun's method: the mean of the velocities at both ends of the step."""

    order = 2

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        t, levels = super()._plan(steps, timesteps, sigmas)
        return np.repeat(t, 2)[1:], np.append(np.repeat(levels[:-1], 2)[1:], 0)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._start: Tensor | None = None

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        if self._start is None:
            self._start, self._velocity, self._length = x, output, self._levels[i + 1] - self._levels[i]
            return combine(1, x, (self._length, output)), None
        start, self._start = self._start, None
        return combine(1, start, (self._length / 2, self._velocity), (self._length / 2, output)), None


class FlowMatchLCMScheduler(FlowMatchEulerDiscreteScheduler):
    """Jump to the image, add noise, jump again; on the way images can grow by `scale_factors`."""

    defaults: ClassVar[Options] = {
        key: value for key, value in FlowMatchEulerDiscreteScheduler.defaults.items() if key != "stochastic_sampling"
    } | {"scale_factors": None, "upscale_mode": "bicubic"}

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma, end = self._levels[i : i + 2]
        x0 = combine(1, x, (-sigma, output))
        factors = self.config.scale_factors
        if i == 0:
            self._size = x0.shape[2:]
        if factors and i < len(factors):
            size = [round(factors[i] * side) for side in self._size]
            x0 = torch.nn.functional.interpolate(x0, size=size, mode=self.config.upscale_mode)
        return combine(1 - end, x0, (end, draw(x0, torch.float32))), None
