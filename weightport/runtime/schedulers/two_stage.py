"""Two model calls a step: the second one sees where the first one led, and the step starts again.

The samples are those of `sigmas.py`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device, SchedulerOutput, Timestep, Visits, noiseless_step
from .brownian import BrownianNoise
from .config import EpsilonOrV, Prediction
from .samples import Draw, combine
from .sigmas import SigmaSolver, ancestral, towards
from .spacing import Array, Numbers


class Stages:
    """The steps of a run, of two calls each.

    Attributes:
        starts: σ that the steps start at.
        inner: σ of their second calls.
        levels: σ of all calls.
        start: the sample that a step began with, between its calls.
    """

    def __init__(self, starts: Tensor, inner: Tensor, ends: Tensor, noises: Tensor) -> None:
        """Of σ for every step, with those to step down to, and of the noise to add then."""
        self.inner = inner.nan_to_num(0.0)
        self.levels: list[float] = torch.stack([starts, self.inner], 1).flatten().tolist()
        self.start: Tensor | None = None
        self._slope: Tensor | None = None
        self._ends: list[float] = ends.tolist()
        self._noises: list[float] = noises.tolist()

    def step(self, i: int, x: Tensor, x0: Tensor, draw: Draw, *, mean: bool = False) -> Tensor:
        """The sample after call i: a step goes with the slope of the second call, or the mean of
        both."""
        slope = (x - x0) / self.levels[i]
        if self.start is None or self._slope is None:
            self.start = x
            self._slope = slope
            return x + slope * (self.levels[i + 1] - self.levels[i])
        start = self.start
        self.start = None
        if mean:
            slope = (self._slope + slope) / 2
        length = self._ends[i // 2] - self.levels[i - 1]
        noise = self._noises[i // 2]
        return combine(1, start + slope * length, (noise, draw() if noise else None))


def levels_of(sigmas: Array, end: float) -> tuple[Tensor, Tensor]:
    """σ that the steps of a run start and end at, float32."""
    levels = torch.from_numpy(np.append(sigmas, end).astype(np.float32))
    return levels[:-1], levels[1:]


def between(outer: Array, inner: Array) -> Array:
    """The timesteps of all calls: after those of the first calls, but for the last step, those of
    the second."""
    both = np.append(np.c_[outer[:-1], inner].ravel(), outer[-1])
    return both.astype(outer.dtype)


def twice(sigmas: Array, end: float) -> Array:
    """σ of a run as its `sigmas` have them."""
    return np.append(np.repeat(sigmas, 2)[1:], end)


class HeunDiscreteScheduler(SigmaSolver):
    """Heun's method: the mean of the slopes at both ends (Karras et al., algorithm 1)."""

    names: ClassVar = {"heun": {}}
    compatible = True
    order = 2
    takes = ("timesteps",)

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        prediction_type: Prediction = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        starts, ends = levels_of(sigmas, end)
        self._stages = Stages(starts, ends, ends, 0 * ends)
        t = timesteps.astype(np.float32)
        return between(t, t[1:]), twice(sigmas, end)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = self._stages.levels

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        return self._stages.step(i, x, x0, draw, mean=True), x0


class KDPM2DiscreteScheduler(SigmaSolver):
    """DPM-Solver-2: the slope in the middle of the step, in log σ (Lu et al., DPM-Solver, algorithm
    1)."""

    names: ClassVar = {"kdpm2": {}}
    compatible = True
    order = 2
    rounds_karras = True

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: EpsilonOrV = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        starts, ends = levels_of(sigmas, end)
        middles = ends.log().lerp(starts.log(), 0.5).exp()
        self._stages = Stages(starts, middles, ends, 0 * ends)
        inner = self._trained.timesteps_of(self._stages.inner[:-1].numpy(), np.float32)
        return between(timesteps, inner), twice(sigmas, end)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = self._stages.levels

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        return self._stages.step(i, x, x0, draw), x0


class KDPM2AncestralDiscreteScheduler(SigmaSolver):
    """DPM-Solver-2 to a lower σ, then noise."""

    names: ClassVar = {"kdpm2-a": {}}
    compatible = True
    stochastic = True
    order = 2
    rounds_karras = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: EpsilonOrV = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        starts, ends = levels_of(sigmas, end)
        down, up = ancestral(starts, ends)
        middles = starts.log().lerp(down.log(), 0.5).exp()
        self._stages = Stages(starts, middles, down, up)
        inner = self._trained.timesteps_of(self._stages.inner[:-1].numpy(), np.float32)
        return between(timesteps, inner), twice(sigmas, end)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = self._stages.levels

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        return self._stages.step(i, x, x0, draw), x0


class DPMSolverSDEScheduler(SigmaSolver):
    """DPM-Solver++ in two stages with ancestral noise, of one Brownian path (k-diffusion,
    `sample_dpmpp_sde`)."""

    names: ClassVar = {"dpm++sde": {}}
    compatible = True
    stochastic = True
    order = 2
    timestep_dtype = np.float64

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        prediction_type: EpsilonOrV = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        noise_sampler_seed: int | list[int] | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Visits:
        starts, ends = levels_of(sigmas, end)
        t = -starts.log()
        middles = (-(t + (-ends.log() - t) * 0.5)).exp()
        self._stages = Stages(starts, middles, ends, 0 * ends)
        self._steps = torch.cat([starts, ends[-1:]])
        log = -np.log(np.asarray(sigmas))
        inner = self._trained.timesteps_of(np.exp(-(log[:-1] + np.diff(log) * 0.5)))
        return between(timesteps, inner), twice(sigmas, end)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = self._stages.levels

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> SchedulerOutput:
        """Go to the next timestep, with noise scaled by `s_noise`."""
        self._scale = s_noise
        return super().step(model_output, timestep, sample, return_dict=return_dict)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        if self._path is None:
            low = self._steps[self._steps > 0].min().item()
            high = self._steps.max().item()
            self._path = BrownianNoise(x, low, high, self.config.noise_sampler_seed)
        # as rounded in λ: the path is rough
        start, end = self._steps[i // 2 : i // 2 + 2].log().exp().tolist()
        x0 = self._image(x, output, self._levels[i])
        if end == 0:
            return towards(x, x0, start, 0.0), x0
        if self._start is None:
            self._start = x
            end = self._levels[i + 1]
        else:
            x = self._start
            self._start = None
        down, up = ancestral(torch.tensor(start), torch.tensor(end))
        share = down.item() / start
        noise = self._path(start, end)
        return combine(share, x, (1 - share, x0), (self._scale * up.item(), noise)), x0
