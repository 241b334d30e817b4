"""Solvers in the form of k-diffusion: the sample is x₀ + σ·ε, and σ is the time of the ODE dx/dσ =
(x - x₀)/σ.

Formulas: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models; Crowson,
k-diffusion.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import Draw, Generator, Numbers, Plan, Scheduler, Timestep, combine
from .brownian import BrownianNoise
from .config import (
    CLIPPING,
    EDM,
    RESPACING,
    SIGMAS,
    SPACING,
    STABLE_DIFFUSION,
    TRAINING,
    VP,
    options,
)
from .spacing import Array, power_spaced, spaced, timestep_of


class SigmaSolver(Scheduler):
    """A scheduler whose steps go from one σ to the next. `sigmas` has one more entry than there are
    steps: the end."""

    defaults = options(TRAINING, SPACING, RESPACING)
    timestep_dtype: ClassVar[Any] = np.float32
    rounds_karras: ClassVar[bool] = False

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        self._trained = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        self._log_trained = np.log(self._trained)

    def _training_run(self) -> Plan:
        return self._calls(np.arange(len(self), dtype=np.float32)[::-1], self._trained[::-1], 0.0)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of pure noise; with `leading` timesteps there is some image in
        it."""
        high = float(self.sigmas.max())
        return (
            high if self.config.timestep_spacing in ("linspace", "trailing") else _variance(high)[1]
        )

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        if sigmas is not None:
            levels = np.asarray(sigmas, np.float32)
            return self._calls(
                timestep_of(levels[:-1], self._log_trained), levels[:-1], float(levels[-1])
            )
        t, levels = self._grid(steps, timesteps)
        return self._calls(t, levels, self._end(levels))

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Plan:
        """Timesteps and σ of the model calls of steps with these, and the end."""
        return timesteps.astype(self.timestep_dtype), np.append(sigmas, end)

    def _end(self, sigmas: Array) -> float:
        """The σ that the last step ends at."""
        return float(self._trained[0]) if self._own("final_sigmas_type") == "sigma_min" else 0.0

    def _grid(self, steps: int, timesteps: Numbers | None) -> Plan:
        """Timesteps and σ, without the end."""
        t = self._spaced(steps) if timesteps is None else np.asarray(timesteps, self.timestep_dtype)
        sigmas, respace = self._interpolated(t), self._respacing
        if respace is None:
            return t, sigmas
        if timesteps is not None:
            raise ValueError(
                "timesteps cannot be given where the config asks for a spacing of sigmas"
            )
        (high, low), own_high, own_low = (
            self._range(sigmas),
            self._own("sigma_max"),
            self._own("sigma_min"),
        )
        sigmas = respace(
            high if own_high is None else own_high, low if own_low is None else own_low, steps
        )
        t = timestep_of(sigmas, self._log_trained)
        return t.round() if self._rounds() else t, sigmas

    def _spaced(self, steps: int) -> Array:
        spacing, offset = self.config.timestep_spacing, self.config.steps_offset
        return spaced(spacing, steps, len(self), offset).astype(self.timestep_dtype)

    def _range(self, sigmas: Array) -> tuple[float, float]:
        """The first and the last σ of a run whose σ are spaced, where `sigmas` are those of
        timesteps."""
        return sigmas[0].item(), sigmas[-1].item()

    def _rounds(self) -> bool:
        """Whether timesteps of spaced σ are rounded."""
        return self.rounds_karras and bool(self.config.use_karras_sigmas)

    def _interpolated(self, timesteps: Array) -> Array:
        return np.asarray(np.interp(timesteps, np.arange(len(self)), self._trained))

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample with a variance of 1, as the model was trained."""
        sigma = self._levels[self._here(self.timesteps[0] if timestep is None else timestep)]
        return sample / _variance(sigma)[1]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy samples as the run has them at `timesteps` (b,), or at the step that it begins
        with."""
        alpha, sigma = self._split(self._sigma_at(timesteps, original_samples))
        return (original_samples * alpha + noise * sigma).to(original_samples.dtype)

    def _split(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of image and noise in samples with these σ."""
        return torch.ones_like(sigmas), sigmas

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        if self.config.prediction_type == "epsilon":
            output = combine(1, x, (-sigma, output))
        elif self.config.prediction_type == "v_prediction":
            variance, deviation = _variance(sigma)
            output = combine(
                1, x / variance, (-float(np.float32(sigma) / np.float32(deviation)), output)
            )
        return self._limit(output)


@lru_cache(4096)
def _variance(sigma: float) -> tuple[float, float]:
    """Of a noisy sample, and its root: float32 as torch rounds it."""
    variance = torch.tensor(sigma) ** 2 + 1
    return variance.item(), variance.sqrt().item()


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
    return (end**2 - up**2) ** 0.5, up


class Churning(Scheduler):
    """Steps that can begin with more noise (Karras et al., algorithm 2)."""

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
    ) -> Any:
        """Go to the next timestep.

        `s_churn` noise is spread over the steps from σ = `s_tmax` to `s_tmin`, scaled by `s_noise`.
        """
        self._churn = s_churn, s_tmin, s_tmax, s_noise
        return super().step(model_output, timestep, sample, generator)

    def _churned(self, i: int, x: Tensor, draw: Draw) -> tuple[Tensor, float]:
        """The sample that step i begins with, and its σ."""
        (churn, low, high, scale), sigma = self._churn, self._levels[i]
        if churn <= 0 or not low <= sigma <= high:
            return x, sigma
        raised = sigma * (1 + min(churn / (len(self._levels) - 1), 2**0.5 - 1))
        return combine(1, x, (scale * (raised**2 - sigma**2) ** 0.5, draw())), raised


class EulerDiscreteScheduler(Churning, SigmaSolver):
    """Euler's method, with noise to churn the sample (Karras et al., algorithm 2, without its
    second order)."""

    clips_alpha_bar = True
    knows_churn: ClassVar[bool] = False  # whether models that predict v are told of it
    takes: ClassVar[tuple[str, ...]] = ("timesteps", "sigmas")
    predicts = (*VP, "original_sample")
    defaults = options(
        options(SigmaSolver.defaults, interpolation_type="linear", timestep_type="discrete"),
        options(
            sigma_min=None, sigma_max=None, rescale_betas_zero_snr=False, final_sigmas_type="zero"
        ),
    )

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Plan:
        if (
            self._own("timestep_type") == "continuous"
            and self.config.prediction_type == "v_prediction"
        ):
            timesteps = 0.25 * torch.from_numpy(np.array(sigmas, np.float32)).log().numpy()
        return super()._calls(timesteps, sigmas, end)

    def _interpolated(self, timesteps: Array) -> Array:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps)
        high, low = float(self._log_trained[-1]), float(self._log_trained[0])
        return torch.linspace(high, low, len(timesteps) + 1).exp().numpy()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x, raised = self._churned(i, x, draw)
        knows = self.knows_churn or self.config.prediction_type != "v_prediction"
        x0 = self._image(x, output, raised if knows else self._levels[i])
        return towards(x, x0, raised, self._levels[i + 1]), x0


class EulerAncestralDiscreteScheduler(SigmaSolver):
    """Euler's method to a lower σ, then noise."""

    clips_alpha_bar = True
    defaults = options(TRAINING, SPACING, rescale_betas_zero_snr=False)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._ends, self._noises = (
            table.tolist() for table in ancestral(self.sigmas[:-1], self.sigmas[1:])
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        return combine(
            1, towards(x, x0, self._levels[i], self._ends[i]), (self._noises[i], draw())
        ), x0


class LMSDiscreteScheduler(SigmaSolver):
    """Linear multistep: the slope is a polynomial through the last four, integrated over the
    step."""

    predicts = VP

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> Any:
        """Go to the next timestep, with the slopes of so many steps."""
        self._order = order
        return super().step(model_output, timestep, sample)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        self._history = [(x - x0) / self._levels[i], *self._history[: self._order - 1]]
        # In a run that begins later the first steps lack slopes, and their share is left out, as in
        # diffusers.
        return combine(
            1, x, *zip(self._weights(i, min(i + 1, self._order)), self._history, strict=False)
        ), x0

    def _weights(self, i: int, order: int) -> list[float]:
        """Integrals of the Lagrange polynomials; two Gauss points are exact up to the third
        degree."""
        start, end = self._levels[i : i + 2]
        past = self._levels[i - order + 1 : i + 1][::-1]
        middle, reach = (start + end) / 2, (end - start) / 2
        points = middle - reach / 3**0.5, middle + reach / 3**0.5
        return [
            reach * sum(math.prod((p - t) / (s - t) for t in past if t != s) for p in points)
            for s in past
        ]


class TwoStageSolver(SigmaSolver):
    """Two model calls a step; the second one sees where the first one led, and the step starts
    again."""

    order = 2
    defaults = options(SigmaSolver.defaults, STABLE_DIFFUSION)

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Plan:
        self._steps = torch.from_numpy(np.append(sigmas, end).astype(np.float32))
        inner, ends, noises = self._stages(self._steps[:-1], self._steps[1:])
        self._inner, self._ends, self._noises = (
            inner.nan_to_num(0.0),
            ends.tolist(),
            noises.tolist(),
        )
        t = np.append(
            np.c_[timesteps[:-1], self._inner_timesteps(timesteps, sigmas)].ravel(), timesteps[-1]
        )
        return t.astype(timesteps.dtype), np.append(np.repeat(sigmas, 2)[1:], end)

    def _stages(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every step σ of its second call, σ to step down to, and that of the noise to add
        then."""
        raise NotImplementedError

    def _inner_timesteps(self, timesteps: Array, sigmas: Array) -> Array:
        return timestep_of(self._inner[:-1].numpy(), self._log_trained, np.float32)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = torch.stack([self._steps[:-1], self._inner], 1).flatten().tolist()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        slope = (x - x0) / self._levels[i]
        if self._start is None:
            self._start, self._slope = x, slope
            return x + slope * (self._levels[i + 1] - self._levels[i]), x0
        start, self._start = self._start, None
        length, noise = self._ends[i // 2] - self._levels[i - 1], self._noises[i // 2]
        return combine(
            1, start + self._mean(slope) * length, (noise, draw() if noise else None)
        ), x0

    def _mean(self, slope: Tensor) -> Tensor:
        """The slope to take over the whole step, when the second one is known."""
        return slope


class HeunDiscreteScheduler(TwoStageSolver):
    """Heun's method: the mean of the slopes at both ends (Karras et al., algorithm 1)."""

    takes = ("timesteps",)
    predicts = VP
    defaults = options(TwoStageSolver.defaults, CLIPPING, clip_sample=False)

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> Plan:
        return super()._calls(timesteps.astype(np.float32), sigmas, end)

    def _stages(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return end, end, 0 * end

    def _inner_timesteps(self, timesteps: Array, sigmas: Array) -> Array:
        return timesteps[1:]

    def _mean(self, slope: Tensor) -> Tensor:
        return (self._slope + slope) / 2


class KDPM2DiscreteScheduler(TwoStageSolver):
    """DPM-Solver-2: the slope in the middle of the step, in log σ (Lu et al., DPM-Solver, algorithm
    1)."""

    rounds_karras = True

    def _stages(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return end.log().lerp(start.log(), 0.5).exp(), end, 0 * end


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 to a lower σ, then noise."""

    def _stages(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        down, up = ancestral(start, end)
        return start.log().lerp(down.log(), 0.5).exp(), down, up


class DPMSolverSDEScheduler(TwoStageSolver):
    """DPM-Solver++ in two stages with ancestral noise, of one Brownian path (k-diffusion,
    `sample_dpmpp_sde`)."""

    timestep_dtype = np.float64
    defaults = options(TwoStageSolver.defaults, noise_sampler_seed=None)

    def _stages(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = -start.log()
        return (-(t + (-end.log() - t) * 0.5)).exp(), end, 0 * end

    def _inner_timesteps(self, timesteps: Array, sigmas: Array) -> Array:
        t = -np.log(np.asarray(sigmas))
        return timestep_of(np.exp(-(t[:-1] + np.diff(t) * 0.5)), self._log_trained)

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> Any:
        """Go to the next timestep, with noise scaled by `s_noise`."""
        self._scale = s_noise
        return super().step(model_output, timestep, sample)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        if self._path is None:
            low, high = self._steps[self._steps > 0].min().item(), self._steps.max().item()
            self._path = BrownianNoise(x, low, high, self.config.noise_sampler_seed)
        start, end = (
            self._steps[i // 2 : i // 2 + 2].log().exp().tolist()
        )  # as rounded in λ: the path is rough
        x0 = self._image(x, output, self._levels[i])
        if end == 0:
            return towards(x, x0, start, 0.0), x0
        if self._start is None:
            self._start, end = x, self._levels[i + 1]
        else:
            x, self._start = self._start, None
        down, up = (value.item() for value in ancestral(torch.tensor(start), torch.tensor(end)))
        return combine(
            down / start, x, (1 - down / start, x0), (self._scale * up, self._path(start, end))
        ), x0


class Preconditioned(SigmaSolver):
    """For models with the inputs and outputs of Karras et al., table 1: any σ, no training
    table."""

    has_compatibles = False
    defaults = EDM
    ramp_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of noise and images together."""
        return float((self.config.sigma_max**2 + 1) ** 0.5)

    def _condition(self, sigmas: Tensor) -> Tensor:
        """What the model is told instead of a timestep."""
        return 0.25 * sigmas.log()

    def _training_run(self) -> Plan:
        return self._plan(len(self), None, None)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        ramp = (
            torch.linspace(0, 1, steps, dtype=self.ramp_dtype)
            if sigmas is None
            else torch.as_tensor(sigmas)
        )
        config, high, low = self.config, self.config.sigma_max, self.config.sigma_min
        if config.sigma_schedule == "karras":
            levels = power_spaced(high, low, ramp.to(self.ramp_dtype), config.rho).float()
        else:
            levels = torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)
        end = levels[-1].item() if config.final_sigmas_type == "sigma_min" else 0.0
        return self._calls(self._condition(levels).numpy(), levels.numpy(), end)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample with a variance of 1."""
        sigma = self._levels[self._here(self.timesteps[0] if timestep is None else timestep)]
        return sample * float(1 / (sigma**2 + self.config.sigma_data**2) ** 0.5)

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        data = self.config.sigma_data
        scale = sigma**2 + data**2
        out = sigma * data / scale**0.5
        sign = 1 if self.config.prediction_type == "epsilon" else -1
        return self._limit(combine(data**2 / scale, x, (sign * out, output)))


class EDMEulerScheduler(Preconditioned, EulerDiscreteScheduler):
    """Euler's method for preconditioned models (Karras et al., algorithm 2, without its second
    order)."""

    takes = ("sigmas",)
    defaults = EDM
    ramp_dtype = torch.float64
    knows_churn = True


class CMStochasticIterativeScheduler(Preconditioned):
    """Multistep sampling of consistency models (Song et al., Consistency Models, algorithm 1)."""

    takes = ("timesteps",)
    defaults = options(SIGMAS, num_train_timesteps=40, s_noise=1.0, clip_denoised=True)
    timestep_dtype = np.float64

    @property
    def init_noise_sigma(self) -> float:
        """The largest σ."""
        return float(self.config.sigma_max)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        total, config = len(self), self.config
        chosen = self._descending(
            spaced("leading", steps, total) if timesteps is None else timesteps
        )
        levels = power_spaced(
            config.sigma_max, config.sigma_min, chosen[::-1] / (total - 1), config.rho
        )
        return self._calls(1000 * 0.25 * np.log(levels + 1e-44), levels, config.sigma_min)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        config, sigma, low = self.config, self._levels[i], self.config.sigma_min
        data = config.sigma_data  # c_skip and c_out: appendix C
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        x0 = combine(skip, x, ((sigma - low) * data / (sigma**2 + data**2) ** 0.5, output))
        x0 = x0.clamp(-1, 1) if config.clip_denoised else x0
        noise = draw() if len(self._levels) > 2 else None
        end = min(max(self._levels[i + 1], low), config.sigma_max)
        return combine(1, x0, (config.s_noise * (end**2 - low**2) ** 0.5, noise)), None
