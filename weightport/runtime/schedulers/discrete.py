"""Solvers that step between training timesteps, by their ᾱ: DDIM, KerasCV's, DDPM, PNDM, iPNDM."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..loading.options import configured
from .base import Device, Scheduler, SchedulerOutput, Timestep, Visits, noiseless_step, stray
from .config import EpsilonOrV, Prediction, Variance
from .samples import Draw, Generator, combine, to_image, to_noise
from .spacing import Array, Numbers, spaced

NO_SIGMAS: Array = np.empty(0)


class DiscreteSolver(Scheduler):
    """A scheduler whose steps depend on the timestep alone: step number and timestep are the same
    thing.

    Attributes:
        counts_steps: whether a step goes to what the run visits next, whatever timestep it is told.
    """

    counts_steps: ClassVar[bool] = False

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        one = self._own("set_alpha_to_one") in (None, True)
        self.final_alpha_cumprod = torch.tensor(1.0) if one else self.alphas_cumprod[0]

    def _training_run(self) -> Visits:
        return np.arange(len(self))[::-1], NO_SIGMAS

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        if timesteps is None:
            return self._spaced(steps), NO_SIGMAS
        return self._descending(timesteps), NO_SIGMAS

    def _spaced(self, steps: int) -> Array:
        """Timesteps as the config wants them, descending.

        Raises:
            ValueError: more steps than training had.
        """
        if steps > len(self):
            raise ValueError(f"{steps} steps: there are only {len(self)} timesteps")
        spacing = self.config.timestep_spacing
        t = spaced(spacing, steps, len(self), self.config.steps_offset)
        return t.round().astype(np.int64)

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._following: dict[int, int] = dict(pairwise([*timesteps.tolist(), -1]))
        self._stride = len(self) // (self.num_inference_steps or 1)  # training timesteps a step

    def previous_timestep(self, timestep: Timestep) -> Tensor:
        """The timestep that a step from this one goes to; -1 is the clean image.

        Raises:
            ValueError: the run does not visit this one.
        """
        return torch.tensor(self._previous(int(timestep)))

    def _previous(self, timestep: int) -> int:
        if timestep not in self._following:
            raise stray(timestep)
        return self._following[timestep]

    def _next(self, timestep: Timestep) -> int:
        if self.counts_steps:
            following = self.timesteps[self._count(timestep) + 1 :]
            self._to = int(following[0]) if len(following) else -1
        return int(timestep)

    def _alpha_bar(self, timestep: int) -> np.float32:
        """ᾱ of a training timestep; before the first one, that of the clean image."""
        known = self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod
        return np.float32(known)

    def _parts(self, timestep: int) -> tuple[float, float]:
        """α and σ there."""
        return parts(float(self._alpha_bar(timestep)))

    def _image(self, x: Tensor, output: Tensor, timestep: int) -> Tensor:
        alpha, sigma = self._parts(timestep)
        return self._limit(to_image(self.config.prediction_type, x, output, alpha, sigma))

    def _noise(self, x: Tensor, output: Tensor, timestep: int) -> Tensor:
        alpha, sigma = self._parts(timestep)
        return to_noise(self.config.prediction_type, x, output, alpha, sigma)


@lru_cache(4096)
def parts(alpha_bar: float) -> tuple[float, float]:
    """α and σ that belong to ᾱ, float32 as torch rounds them."""
    share = torch.tensor(alpha_bar)
    return share.sqrt().item(), (1 - share).sqrt().item()


class DDIMScheduler(DiscreteSolver):
    """DDIM (Song et al., Denoising Diffusion Implicit Models, eq. 12): deterministic at η = 0,
    DDPM-like at η = 1."""

    names: ClassVar = {"ddim": {}}
    compatible = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep, with η = `eta`, and where asked in the direction away from the
        clipped image."""
        self._eta = eta
        self._from_clipped = use_clipped_model_output
        parts = self._step(model_output, timestep, sample, generator, variance_noise)
        return SchedulerOutput.asked(return_dict, *parts)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to = i - self._stride
        alpha, sigma = self._parts(to)
        x0 = self._image(x, output, i)
        if self._from_clipped:
            eps = to_noise("sample", x, x0, *self._parts(i))
        else:
            eps = self._noise(x, output, i)
        eta = self._eta
        if eta <= 0:
            return combine(alpha, x0, (sigma, eps)), x0
        variance = float(eta**2 * self._get_variance(i, to))
        direction = max(float(1 - self._alpha_bar(to)) - variance, 0.0) ** 0.5
        return combine(alpha, x0, (direction, eps), (variance**0.5, draw())), x0

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Of the noise of a step at η = 1."""
        now = self._alpha_bar(timestep)
        end = self._alpha_bar(prev_timestep)
        return torch.tensor((1 - end) / (1 - now) * (1 - now / end))


class DDIMInverseScheduler(DiscreteSolver):
    """DDIM backwards, from an image to the noise that it is made of (Song et al., section 4.3)."""

    has_compatibles = False
    ignored: ClassVar[tuple[str, ...]] = (
        "thresholding",
        "dynamic_thresholding_ratio",
        "sample_max_value",
    )

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Prediction = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def _training_run(self) -> Visits:
        return np.arange(len(self)), NO_SIGMAS

    def _spaced(self, steps: int) -> Array:
        return super()._spaced(steps)[::-1]

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        now = min(i - self._stride, len(self) - 1)
        alpha, sigma = self._parts(i)
        x0 = self._image(x, output, now)
        return combine(alpha, x0, (sigma, self._noise(x, output, now))), x0


class KerasCVScheduler(DiscreteSolver):
    """KerasCV's own sampler, the loop in its `generate_image`: DDIM steps in its order of
    operations.

    `generation` says which: `"0.7"`, of keras-cv until 0.7.2, visits 1, 1+k, 1+2k, … with k =
    ⌊1000/steps⌋, which can be more timesteps than steps; `"0.8"`, from 0.8.2 on, visits evenly
    spaced ones from 0 to 999. The last step ends at the image.
    """

    has_compatibles = False

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Numbers | None = None,
        prediction_type: Prediction = "epsilon",
        generation: Literal["0.7", "0.8"] = "0.7",
    ) -> None:
        self._prepare()

    def _spaced(self, steps: int) -> Array:
        if self.config.generation == "0.7":
            return np.arange(1, len(self), len(self) // steps)[::-1]
        stride = (len(self) - 1) / max(steps - 1, 1)
        return (np.arange(steps) * stride).round().astype(np.int64)[::-1]

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Any]:
        alpha, sigma = self._parts(self._previous(i))
        x0 = self._image(x, output, i)
        return combine(sigma, self._noise(x, output, i), (alpha, x0)), x0


class DDPMScheduler(DiscreteSolver):
    """The reverse process of training (Ho et al., Denoising Diffusion Probabilistic Models, eq. 7
    and algorithm 2)."""

    names: ClassVar = {"ddpm": {}}
    compatible = True
    stochastic = True
    steps_untimed = True
    takes = ("timesteps",)

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        variance_type: Variance = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Prediction = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._prepare()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        now = self._alpha_bar(i)
        to = self._alpha_bar(self._previous(i))
        kind = self.config.variance_type
        learned = None
        if kind in ("learned", "learned_range"):
            if output.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"variance_type = {kind!r} needs a model that predicts the variance too"
                )
            output, learned = output.chunk(2, dim=1)
        x0 = self._image(x, output, i)
        alpha = now / to
        beta = 1 - alpha
        share = float(to**0.5 * beta / (1 - now))
        rest = float(alpha**0.5 * (1 - to) / (1 - now))
        mean = combine(share, x0, (rest, x))
        if i <= 0:
            return mean, x0
        noise = draw(output)
        if learned is None:
            fixed = self._get_variance(i).item()
            return combine(1, mean, (fixed**0.5, noise)), x0
        if kind == "learned":
            deviation = learned.clamp(min=0).sqrt()
        else:  # between both in the log; Nichol and Dhariwal, Improved DDPM, eq. 15
            small, large = self._variances(i)
            log_large = (learned + 1) * math.log(large)
            log_small = (1 - learned) * math.log(small)
            deviation = torch.exp(0.25 * (log_large + log_small))
        return mean + noise * deviation, x0

    def _variances(self, timestep: int) -> tuple[float, float]:
        """The least and the most that the noise of a step can have (section 3.2)."""
        now = self._alpha_bar(timestep)
        to = self._alpha_bar(self._previous(timestep))
        beta = 1 - now / to
        return max(float((1 - to) / (1 - now) * beta), 1e-20), float(beta)

    def _get_variance(self, t: int) -> Tensor:
        """Of the noise of a step, where it is not learned."""
        small, large = self._variances(t)
        is_large = str(self.config.variance_type).startswith("fixed_large")
        return torch.tensor(large if is_large else small, dtype=torch.float64)


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def extrapolated(history: list[Tensor]) -> Tensor:
    """The mean of the noise over the next step, from up to four values, newest last."""
    first, *rest = zip(ADAMS_BASHFORTH[len(history) - 1], history[::-1], strict=True)
    return combine(*first, *rest)


class PNDMScheduler(DiscreteSolver):
    """Pseudo numerical methods (Liu et al., Pseudo Numerical Methods for Diffusion Models on
    Manifolds, algorithm 2).

    Four-step Adams-Bashforth on the noise. The first three steps are of a Runge-Kutta method, four
    calls each; or with `skip_prk_steps` of lower order, the first one repeated with the mean of
    both its ends.
    """

    names: ClassVar = {"pndm": {}}
    compatible = True

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Numbers | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: EpsilonOrV = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()

    def _training_run(self) -> Visits:
        self.prk_timesteps: Array = np.empty(0)
        self.plms_timesteps: Array = np.empty(0)
        return super()._training_run()

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        grid = self._spaced(steps)
        half = len(self) // steps // 2
        if self.config.skip_prk_steps:
            self.prk_timesteps = np.empty(0, np.int64)
            self.plms_timesteps = np.concatenate([grid[:2], grid[1:2], grid[2:]])
        else:
            stages = [t for end in grid[:4].tolist() for t in (end + half, end)]
            self.prk_timesteps = np.repeat(stages[1:], 2)[1:-1]
            self.plms_timesteps = grid[3:]
        visited = np.concatenate([self.prk_timesteps, self.plms_timesteps])
        return visited.astype(np.int64), NO_SIGMAS

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._sum: Tensor | None = None
        self._calls = 0
        self.ets: list[Tensor] = []

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep: first `step_prk`, later `step_plms`."""
        warms_up = self._calls < len(self.prk_timesteps)
        step = self.step_prk if warms_up else self.step_plms
        return step(model_output, timestep, sample, return_dict)

    def step_prk(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Make one of the four calls of a Runge-Kutta step."""
        self._method = self._runge_kutta
        return noiseless_step(self, model_output, timestep, sample, return_dict)

    def step_plms(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Make an Adams-Bashforth step.

        Raises:
            ValueError: it needs Runge-Kutta steps before it.
        """
        timed = self.num_inference_steps is not None
        if timed and not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("step_plms follows twelve calls of step_prk; or set skip_prk_steps")
        self._method = self._adams_bashforth
        return noiseless_step(self, model_output, timestep, sample, return_dict)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        moved = self._method(i, x, output)
        self._calls += 1
        return moved, None

    def _adams_bashforth(self, t: int, x: Tensor, output: Tensor) -> Tensor:
        """The sample after a step on the noise of the last ones."""
        if self._calls == 1:
            mean = combine(0.5, output, (0.5, self.ets[-1]))
            return self._transfer(x, mean, t + self._stride, t)
        self.ets = [*self.ets[-3:], output]
        self._start = x
        return self._transfer(x, extrapolated(self.ets), t, t - self._stride)

    def _runge_kutta(self, t: int, x: Tensor, output: Tensor) -> Tensor:
        """The sample after one of four calls, all of which go from the first one's."""
        stage = self._calls % 4
        share = (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage]
        self._sum = combine(share, output, (1, self._sum if stage else None))
        if stage == 0:
            self.ets.append(output)
            self._start = x
        start = int(self.prk_timesteps[self._calls - stage])
        end = t if stage % 2 else t - self._stride // 2
        return self._transfer(x, self._sum if stage == 3 else output, start, end)

    def _transfer(self, x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        """Along the ODE with this output all the way, from where the step began (Liu et al., eq.
        11)."""
        if self._start is not None:
            x = self._start
        start = min(start, len(self) - 1)
        now = float(self._alpha_bar(start))
        to = float(self._alpha_bar(end))
        slope = (to - now) / (now * (1 - to) ** 0.5 + (now * (1 - now) * to) ** 0.5)
        return combine((to / now) ** 0.5, x, (-slope, self._noise(x, output, start)))


class IPNDMScheduler(Scheduler):
    """PNDM's Adams-Bashforth steps in the angle of α and σ (Zhang and Chen, Fast Sampling with
    Exponential Integrator).

    Its model predicts v, and its `timesteps` are angles, from 1 for noise to 0.
    """

    has_compatibles = False
    steps_untimed = True

    step = noiseless_step  # type: ignore[assignment]

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        trained_betas: Numbers | None = None,
    ) -> None:
        self._prepare()

    def _visits(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Visits:
        angles = torch.cat([torch.linspace(1, 0, steps + 1)[:-1], torch.zeros(1)])
        trained = self.config.trained_betas
        if trained is None:
            self.betas = (angles * math.pi / 2).sin() ** 2
        else:
            self.betas = torch.as_tensor(trained, dtype=torch.float32)
        self.alphas = (1 - self.betas**2) ** 0.5
        self._angles = list(zip(self.alphas.tolist(), self.betas.tolist(), strict=True))
        t = torch.atan2(self.betas, self.alphas) / math.pi * 2
        return t[:-1].numpy(), self.betas.numpy()

    def _begin(self, timesteps: Array, sigmas: Array, device: Device = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self.ets: list[Tensor] = []

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        (alpha, sigma), (alpha_to, sigma_to) = self._angles[i : i + 2]
        noise = to_noise("v_prediction", x, output, alpha, sigma)
        self.ets = [*self.ets[-3:], noise]
        eps = extrapolated(self.ets)
        x0 = combine(1, x, (-sigma, eps)) / max(alpha, 1e-8)
        return combine(alpha_to, x0, (sigma_to, eps)), None
