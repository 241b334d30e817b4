"""Solvers for flows: the sample is (1 - σ)·x₀ + σ·ε, the model predicts the velocity ε - x₀, and σ
is the time.

Flow matching: Lipman et al., Flow Matching for Generative Modeling; shifts: Esser et al., Scaling
Rectified Flow Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Scheduler, SchedulerOutput, Timestep, Visits
from .config import TimeShift
from .samples import Draw, Generator, combine
from .sigmas import Churn
from .spacing import Array, Numbers, flow_shifted, shifted


class FlowSolver(Scheduler):
    """The base of the solvers of flows."""

    has_compatibles = False
    steps_untimed = True

    def _training_run(self) -> Visits:
        self.shift = self.config.shift
        sigmas = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        if not self._own("use_dynamic_shifting"):
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        self.sigma_max = sigmas[0].item()
        self.sigma_min = sigmas[-1].item()
        return (sigmas * len(self)).numpy(), sigmas.numpy()

    def set_shift(self, shift: float) -> None:
        """Move the next runs so far towards noise."""
        self.shift = shift

    def _spread(self, steps: int) -> Array:
        """σ, evenly."""
        total = len(self)
        return np.linspace(self.sigma_max * total, self.sigma_min * total, steps) / total

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        config = self.config
        total = np.float32(len(self))
        if sigmas is not None:
            levels = np.asarray(sigmas, np.float32)
        elif timesteps is not None:
            levels = np.asarray(timesteps, np.float32) / total
        else:
            levels = self._spread(steps)
        levels = shifted(levels, config, self.shift, self._mu)
        if self._respacing:
            levels = self._respacing(levels[0].item(), levels[-1].item(), len(levels))
        levels = levels.astype(np.float32)
        end = 0
        if config.invert_sigmas:
            levels = 1 - levels
            end = 1
        if timesteps is None or config.invert_sigmas:
            t = levels * total
        else:
            t = np.asarray(timesteps, np.float32)
        return t, np.append(levels, end)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noisy samples as the run has them at `timestep` (b,), or at the step that it begins
        with."""
        sigma = self._sigma_at(timestep, sample).to(sample.dtype)
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, under the name that it has elsewhere."""
        return self.scale_noise(original_samples, timesteps, noise)


class FlowMatchEulerDiscreteScheduler(FlowSolver):
    """Euler's method, or with `stochastic_sampling` to the image and back with new noise."""

    takes = ("timesteps", "sigmas")
    widens_outputs = False

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: TimeShift = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        self._prepare()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma = self._levels[i]
        end = self._levels[i + 1]
        if not self.config.stochastic_sampling:
            return combine(1, x, (_rounded(end - sigma, output), output)), None
        x0 = combine(1, x, (-_rounded(sigma, output), output))
        return combine(1 - end, x0, (end, draw(x0, torch.float32))), None


class FlowMatchHeunDiscreteScheduler(FlowSolver):
    """Heun's method: the mean of the velocities at both ends of the step."""

    order = 2

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
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

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        ends = flow_shifted(self._spread(steps), self.shift).astype(np.float32)
        levels = np.repeat(ends, 2)[1:]
        return levels * np.float32(len(self)), np.append(levels, 0)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        steps = len(self._levels) - 1
        if self._start is None:
            sigma = self._levels[i]
            self._start, raised = self._churn.add(x, sigma, steps, draw)
            self._velocity = combine(sigma / raised, output)
            self._length = self._levels[i + 1] - raised
            return combine(1, self._start, (self._length, self._velocity)), None
        # draws noise again, which has no effect
        self._churn.add(x, self._levels[i - 1], steps, draw)
        start = self._start
        self._start = None
        half = self._length / 2
        return combine(1, start, (half, self._velocity), (half, output)), None


class FlowMatchLCMScheduler(FlowSolver):
    """Jump to the image, add noise, jump again; on the way images can grow by `scale_factors`."""

    stochastic = True
    takes = ("timesteps", "sigmas")
    widens_outputs = False

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: TimeShift = "exponential",
        scale_factors: Sequence[float] | None = None,
        upscale_mode: str = "bicubic",
    ) -> None:
        self._prepare()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        sigma = self._levels[i]
        end = self._levels[i + 1]
        x0 = combine(1, x, (-_rounded(sigma, output), output))
        factors = self.config.scale_factors
        if i == 0:
            self._size = x0.shape[2:]
        if factors and i < len(factors):
            size = [round(factors[i] * side) for side in self._size]
            x0 = torch.nn.functional.interpolate(x0, size=size, mode=self.config.upscale_mode)
        return combine(1 - end, x0, (end, draw(x0, torch.float32))), None


def _rounded(factor: float, output: Tensor) -> float:
    """A factor as the dtype of the output has it: in 16 bits these solvers multiply before they
    widen."""
    return torch.tensor(factor, dtype=output.dtype).item()
