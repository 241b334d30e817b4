"""Solvers in the form of k-diffusion: the sample is x₀ + σ·ε, and σ is the time of the ODE dx/dσ = (x - x₀)/σ.

Formulas: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models; Crowson, k-diffusion.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import base
from .base import Draw, Generator, Numbers, Options, Scheduler, Timestep, beside, combine
from .brownian import BrownianNoise
from .spacing import Array, spaced, timestep_of

Choices = dict[str, tuple[Any, ...]]
DENSER: Options = base.TRAINING | base.SPACING | base.RESPACING
LATER: Options = DENSER | {"beta_start": 0.00085, "beta_end": 0.012}


class SigmaSolver(Scheduler):
    """A scheduler whose steps go from one σ to the next. `sigmas` has one more entry than there are steps: the end."""

    defaults = DENSER
    choices: ClassVar[Choices] = {"prediction_type": ("epsilon", "v_prediction")}
    timestep_dtype: ClassVar[Any] = np.float32

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        t, sigmas = np.arange(len(self), dtype=np.float32)[::-1], self._trained[::-1]
        self._begin(*self._calls(t, sigmas, 0.0))

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        self._trained = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        self._log_trained = np.log(self._trained)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of pure noise; with `leading` timesteps there is some image in it."""
        high = float(self.sigmas.max())
        return high if self.config.timestep_spacing in ("linspace", "trailing") else (high**2 + 1) ** 0.5

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        if sigmas is not None:
            levels = np.asarray(sigmas, np.float32)
            return self._calls(timestep_of(levels[:-1], self._log_trained), levels[:-1], float(levels[-1]))
        t, levels = self._grid(steps, timesteps)
        return self._calls(t, levels, float(self._trained[0]) if self._own("final_sigmas_type") == "sigma_min" else 0.0)

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        """Timesteps and σ of the model calls of steps with these, and the end."""
        return timesteps.astype(self.timestep_dtype), np.append(sigmas, end)

    def _grid(self, steps: int, timesteps: Numbers | None) -> tuple[Array, Array]:
        """Timesteps and σ, without the end."""
        config, respace = self.config, self._respacing
        t = spaced(config.timestep_spacing, steps, len(self), config.steps_offset) if timesteps is None else timesteps
        t = np.asarray(t, self.timestep_dtype)
        sigmas = self._interpolated(t)
        if respace is None:
            return t, sigmas
        if timesteps is not None:
            raise ValueError("timesteps cannot be given where the config asks for a spacing of sigmas")
        high, low = self._own("sigma_max"), self._own("sigma_min")
        high, low = sigmas[0].item() if high is None else high, sigmas[-1].item() if low is None else low
        sigmas = respace(high, low, steps)
        return timestep_of(sigmas, self._log_trained), sigmas

    def _interpolated(self, timesteps: Array) -> Array:
        return np.asarray(np.interp(timesteps, np.arange(len(self)), self._trained))

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
        sigma = beside(self.sigmas[indices], original_samples)
        return self._noised(original_samples, noise, sigma).to(original_samples.dtype)

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return x0 + noise * sigma

    def _image(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        scale = sigma**2 + 1
        match self.config.prediction_type:
            case "epsilon":
                return self._limit(combine(1, x, (-sigma, output)))
            case "v_prediction":
                return self._limit(combine(1 / scale, x, (-sigma / scale**0.5, output)))
        return self._limit(output)


def towards(x: Tensor, x0: Tensor, start: float, end: float) -> Tensor:
    """The sample after a step of Euler's method from σ = `start` to `end`, in a straight line to x₀.

    Written with the slope: what cancels at large σ then rounds as it does elsewhere.
    """
    return x + (x - x0) / start * (end - start)


def ancestral(start: float, end: float) -> tuple[float, float]:
    """σ to step down to, and of the noise to add then, so that the variance is that of σ = `end`."""
    up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
    return (end**2 - up**2) ** 0.5, up


class EulerDiscreteScheduler(SigmaSolver):
    """Euler's method, with noise to churn the sample (Karras et al., algorithm 2, without its second order)."""

    clips_alpha_bar = True
    takes: ClassVar[tuple[str, ...]] = ("timesteps", "sigmas")
    defaults = DENSER | {
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    }
    choices: ClassVar[Choices] = {
        "prediction_type": ("epsilon", "sample", "original_sample", "v_prediction"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            timesteps = 0.25 * torch.from_numpy(np.array(sigmas, np.float32)).log().numpy()
        return super()._calls(timesteps, sigmas, end)

    def _interpolated(self, timesteps: Array) -> Array:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(timesteps)
        high, low = float(self._log_trained[-1]), float(self._log_trained[0])
        return torch.linspace(high, low, len(timesteps) + 1).exp().numpy()

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

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        churn, low, high, scale = self._churn
        sigma = raised = self._levels[i]
        if churn > 0 and low <= sigma <= high:
            raised = sigma * (1 + min(churn / (len(self._levels) - 1), 2**0.5 - 1))
            x = combine(1, x, (scale * (raised**2 - sigma**2) ** 0.5, draw()))
        x0 = self._image(x, output, sigma if self.config.prediction_type == "v_prediction" else raised)
        return towards(x, x0, raised, self._levels[i + 1]), x0


class EulerAncestralDiscreteScheduler(SigmaSolver):
    """Euler's method to a lower σ, then noise."""

    clips_alpha_bar = True
    defaults = base.TRAINING | base.SPACING | {"rescale_betas_zero_snr": False}

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        down, up = ancestral(*self._levels[i : i + 2])
        return combine(1, towards(x, x0, self._levels[i], down), (up, draw())), x0


class LMSDiscreteScheduler(SigmaSolver):
    """Linear multistep: the slope is a polynomial through the last four, integrated over the step."""

    choices: ClassVar[Choices] = {"prediction_type": ("epsilon", "v_prediction", "sample")}

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._slopes: list[Tensor] = []

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        self._slopes = [(x - x0) / self._levels[i], *self._slopes[:3]]
        # In a run that begins later the first steps lack slopes, and their share is left out, as in diffusers.
        return combine(1, x, *zip(self._weights(i, min(i + 1, 4)), self._slopes, strict=False)), x0

    def _weights(self, i: int, order: int) -> list[float]:
        """Integrals of the Lagrange polynomials; two Gauss points are exact up to the third degree."""
        start, end = self._levels[i : i + 2]
        past = self._levels[i - order + 1 : i + 1][::-1]
        middle, reach = (start + end) / 2, (end - start) / 2
        points = middle - reach / 3**0.5, middle + reach / 3**0.5
        others = [[t for t in past if t != s] for s in past]
        return [
            reach * sum(math.prod((p - t) / (s - t) for t in rest) for p in points)
            for s, rest in zip(past, others, strict=True)
        ]


class TwoStageSolver(SigmaSolver):
    """Two model calls a step; the second one sees where the first one led, and the step starts again."""

    order = 2
    defaults = LATER

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        levels = np.append(sigmas, end)
        self._steps = torch.from_numpy(levels.astype(np.float32))
        self._inner = self._inner_levels(self._steps).nan_to_num(0.0)
        t = np.append(np.c_[timesteps[:-1], self._inner_timesteps(sigmas)].ravel(), timesteps[-1])
        return t.astype(timesteps.dtype), np.append(np.repeat(levels, 2)[1:], end)

    def _inner_levels(self, levels: Tensor) -> Tensor:
        """σ of the second call of every step."""
        raise NotImplementedError

    def _inner_timesteps(self, sigmas: Array) -> Array:
        return timestep_of(self._inner[:-1].numpy(), self._log_trained, np.float32)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._levels = torch.stack([self._steps[:-1], self._inner], 1).flatten().tolist()
        self._start: Tensor | None = None


class HeunDiscreteScheduler(SigmaSolver):
    """Heun's method: the mean of the slopes at both ends (Karras et al., algorithm 1)."""

    order = 2
    takes = ("timesteps",)
    defaults = LATER | base.CLIPPING | {"clip_sample": False}
    choices: ClassVar[Choices] = {"prediction_type": ("epsilon", "v_prediction", "sample")}

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        return np.repeat(timesteps.astype(np.float32), 2)[1:], np.append(np.repeat(sigmas, 2)[1:], end)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._start: Tensor | None = None

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        x0 = self._image(x, output, self._levels[i])
        slope = (x - x0) / self._levels[i]
        if self._start is None:
            self._start, self._slope, self._length = x, slope, self._levels[i + 1] - self._levels[i]
            return x + slope * self._length, x0
        x, self._start = self._start, None
        return x + (self._slope + slope) / 2 * self._length, x0


class KDPM2DiscreteScheduler(TwoStageSolver):
    """DPM-Solver-2: the slope in the middle of the step, in log σ (Lu et al., DPM-Solver, algorithm 1)."""

    def _grid(self, steps: int, timesteps: Numbers | None) -> tuple[Array, Array]:
        t, sigmas = super()._grid(steps, timesteps)
        return t.round() if self.config.use_karras_sigmas else t, sigmas

    def _inner_levels(self, levels: Tensor) -> Tensor:
        self._targets, self._noises = levels[1:].tolist(), [0.0] * len(levels)
        return levels[1:].log().lerp(levels[:-1].log(), 0.5).exp()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        sigma = self._levels[i]
        x0 = self._image(x, output, sigma)
        if self._start is None:
            self._start = x
            return towards(x, x0, sigma, self._levels[i + 1]), x0
        start, self._start = self._start, None
        length, noise = self._targets[i // 2] - self._levels[i - 1], self._noises[i // 2]
        return combine(1, start + (x - x0) / sigma * length, (noise, draw() if noise else None)), x0


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 to a lower σ, then noise."""

    def _inner_levels(self, levels: Tensor) -> Tensor:
        start, end = levels[:-1], levels[1:]
        up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
        down = (end**2 - up**2) ** 0.5
        self._targets, self._noises = down.tolist(), up.tolist()
        return start.log().lerp(down.log(), 0.5).exp()


class DPMSolverSDEScheduler(TwoStageSolver):
    """DPM-Solver++ in two stages with ancestral noise, of one Brownian path (k-diffusion, `sample_dpmpp_sde`)."""

    timestep_dtype = np.float64
    defaults = LATER | {"noise_sampler_seed": None}

    def _inner_levels(self, levels: Tensor) -> Tensor:
        t = -levels.log()
        return (-(t[:-1] + t.diff() * 0.5)).exp()

    def _inner_timesteps(self, sigmas: Array) -> Array:
        t = -np.log(np.asarray(sigmas))
        return timestep_of(np.exp(-(t[:-1] + np.diff(t) * 0.5)), self._log_trained)

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._path: BrownianNoise | None = None

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
        start, end = self._steps[i // 2 : i // 2 + 2].log().exp().tolist()  # as rounded in λ: the path is rough
        x0 = self._image(x, output, self._levels[i])
        if end == 0:
            return towards(x, x0, start, 0.0), x0
        if self._start is None:
            self._start, end = x, self._levels[i + 1]
        else:
            x, self._start = self._start, None
        down, up = ancestral(start, end)
        return combine(down / start, x, (1 - down / start, x0), (self._scale * up, self._path(start, end))), x0


EDM: Options = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
EDM_CHOICES: Choices = {
    "prediction_type": ("epsilon", "v_prediction"),
    "sigma_schedule": ("karras", "exponential"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


class Preconditioned(SigmaSolver):
    """For models with the inputs and outputs of Karras et al., table 1: any σ, no training table."""

    has_compatibles = False
    defaults = EDM
    choices = EDM_CHOICES
    ramp_dtype: ClassVar[torch.dtype] = torch.float32

    def _set_training_noise(self) -> None:
        self._trained = np.ones(len(self), np.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of noise and images together."""
        return float((self.config.sigma_max**2 + 1) ** 0.5)

    def _grid(self, steps: int, timesteps: Numbers | None) -> tuple[Array, Array]:
        return self._spread(torch.linspace(0, 1, steps, dtype=self.ramp_dtype))

    def _spread(self, ramp: Tensor) -> tuple[Array, Array]:
        config = self.config
        if config.sigma_schedule == "karras":
            start, end = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
            sigmas = (start + ramp * (end - start)) ** config.rho
        else:
            sigmas = torch.linspace(math.log(config.sigma_min), math.log(config.sigma_max), len(ramp)).exp().flip(0)
        sigmas = sigmas.float()
        return self._condition(sigmas).numpy(), sigmas.numpy()

    def _condition(self, sigmas: Tensor) -> Tensor:
        """What the model is told instead of a timestep."""
        return 0.25 * sigmas.log()

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        t, levels = self._grid(steps, None) if sigmas is None else self._spread(torch.as_tensor(sigmas).double())
        return self._calls(t, levels, self._last(levels) if self.config.final_sigmas_type == "sigma_min" else 0.0)

    def _last(self, levels: Array) -> float:
        return float(self.config.sigma_min)

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
    """Euler's method for preconditioned models (Karras et al., algorithm 2, without its second order)."""

    takes = ("sigmas",)
    defaults = EDM
    choices = EDM_CHOICES
    ramp_dtype = torch.float64

    def _calls(self, timesteps: Array, sigmas: Array, end: float) -> tuple[Array, Array]:
        return SigmaSolver._calls(self, timesteps, sigmas, end)

    def _last(self, levels: Array) -> float:
        return float(levels[-1])


class CMStochasticIterativeScheduler(Preconditioned):
    """Multistep sampling of consistency models (Song et al., Consistency Models, algorithm 1)."""

    takes = ("timesteps",)
    defaults: ClassVar[Options] = {
        "num_train_timesteps": 40,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigma_data": 0.5,
        "s_noise": 1.0,
        "rho": 7.0,
        "clip_denoised": True,
    }
    choices: ClassVar[Choices] = {}
    timestep_dtype = np.float64

    @property
    def init_noise_sigma(self) -> float:
        """The largest σ."""
        return float(self.config.sigma_max)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> tuple[Array, Array]:
        total, config = len(self), self.config
        chosen = spaced("leading", steps, total) if timesteps is None else np.asarray(timesteps)
        if (np.diff(chosen) >= 0).any() or chosen[0] >= total or steps > total:
            raise ValueError(f"timesteps must descend, from less than {total}")
        start, end = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
        levels = (start + chosen[::-1] / (total - 1) * (end - start)) ** config.rho
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
