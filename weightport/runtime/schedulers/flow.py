"""Solvers for flows: the sample is (1 - σ)·x₀ + σ·ε, the model predicts the velocity ε - x₀, and σ
is the time.

Flow matching: Lipman et al., Flow Matching for Generative Modeling; shifts: Esser et al., Scaling
Rectified Flow Transformers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import Draw, Numbers, Plan, Scheduler, combine
from .config import RESPACING, SHIFT, options
from .sigmas import Churning
from .spacing import Array, flow_shifted, shifted


class FlowSolver(Scheduler):
    """The base of the solvers of flows."""

    has_compatibles = False
    defaults = options(num_train_timesteps=1000, shift=1.0)

    def _training_run(self) -> Plan:
        self.shift = self.config.shift
        sigmas = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        if not self._own("use_dynamic_shifting"):
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        self.sigma_max, self.sigma_min = sigmas[0].item(), sigmas[-1].item()
        return (sigmas * len(self)).numpy(), sigmas.numpy()

    def set_shift(self, shift: float) -> None:
        """Move the next runs so far towards noise."""
        self.shift = shift

    def _spread(self, steps: int) -> Array:
        return np.linspace(self.sigma_max * len(self), self.sigma_min * len(self), steps) / len(
            self
        )

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noisy samples as the run has them at `timestep` (b,), or at the step that it begins
        with."""
        sigma = self._sigma_at(timestep, sample)
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, under the name that it has elsewhere."""
        return self.scale_noise(original_samples, timesteps, noise)


class FlowMatchEulerDiscreteScheduler(FlowSolver):
    """Euler's method, or with `stochastic_sampling` to the image and back with new noise."""

    takes = ("timesteps", "sigmas")
    defaults = options(
        options(
            FlowSolver.defaults,
            RESPACING,
            SHIFT,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
        ),
        options(
            max_image_seq_len=4096,
            invert_sigmas=False,
            shift_terminal=None,
            stochastic_sampling=False,
        ),
    )

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        config, total = self.config, np.float32(len(self))
        levels = (
            self._spread(steps) if timesteps is None else np.asarray(timesteps, np.float32) / total
        )
        levels = shifted(
            levels if sigmas is None else np.asarray(sigmas, np.float32),
            config,
            self.shift,
            self._mu,
        )
        if self._respacing:
            levels = self._respacing(levels[0].item(), levels[-1].item(), len(levels))
        levels = levels.astype(np.float32)
        levels, end = (1 - levels, 1) if config.invert_sigmas else (levels, 0)
        t = (
            levels * total
            if timesteps is None or config.invert_sigmas
            else np.asarray(timesteps, np.float32)
        )
        return t, np.append(levels, end)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma, end = self._levels[i : i + 2]
        if not self.config.stochastic_sampling:
            return combine(1, x, (end - sigma, output)), None
        x0 = combine(1, x, (-sigma, output))
        return combine(1 - end, x0, (end, draw(x0, torch.float32))), None


class FlowMatchHeunDiscreteScheduler(Churning, FlowSolver):
    """Heun's method: the mean of the velocities at both ends of the step."""

    order = 2

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        levels = np.repeat(flow_shifted(self._spread(steps), self.shift).astype(np.float32), 2)[1:]
        return levels * np.float32(len(self)), np.append(levels, 0)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        if self._start is None:
            self._start, raised = self._churned(i, x, draw)
            self._velocity, self._length = (
                combine(self._levels[i] / raised, output),
                self._levels[i + 1] - raised,
            )
            return combine(1, self._start, (self._length, self._velocity)), None
        self._churned(i - 1, x, draw)  # draws noise again, which has no effect
        start, self._start = self._start, None
        return combine(
            1, start, (self._length / 2, self._velocity), (self._length / 2, output)
        ), None


class FlowMatchLCMScheduler(FlowMatchEulerDiscreteScheduler):
    """Jump to the image, add noise, jump again; on the way images can grow by `scale_factors`."""

    defaults = options(
        options(FlowMatchEulerDiscreteScheduler.defaults, without=("stochastic_sampling",)),
        options(scale_factors=None, upscale_mode="bicubic"),
    )

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
