"""Solvers that step between training timesteps, by their ᾱ: DDIM, KerasCV's, DDPM, PNDM, iPNDM, and
LCM and TCD."""

from __future__ import annotations

import math
from collections import namedtuple
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import Draw, Generator, Numbers, Plan, Scheduler, Timestep, combine, to_image, to_noise
from .config import (
    CLIPPING,
    ENDS,
    LEADING,
    STABLE_DIFFUSION,
    THRESHOLDING,
    TRAINING,
    VE,
    VP,
    options,
)
from .spacing import Array, spaced


class DiscreteSolver(Scheduler):
    """A scheduler whose steps depend on the timestep alone: step number and timestep are the same
    thing."""

    predicts: ClassVar[tuple[str, ...]] = VP

    def _set_training_noise(self) -> None:
        super()._set_training_noise()
        one = self._own("set_alpha_to_one") in (None, True)
        self.final_alpha_cumprod = torch.tensor(1.0) if one else self.alphas_cumprod[0]

    def _training_run(self) -> Plan:
        return np.arange(len(self))[::-1], np.empty(0)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        return self._spaced(steps) if timesteps is None else self._descending(timesteps), np.empty(
            0
        )

    def _spaced(self, steps: int) -> Array:
        """Timesteps as the config wants them, descending.

        Raises:
            ValueError: more steps than training had.
        """
        if steps > len(self):
            raise ValueError(f"{steps} steps: there are only {len(self)} timesteps")
        config = self.config
        return (
            spaced(config.timestep_spacing, steps, len(self), config.steps_offset)
            .round()
            .astype(np.int64)
        )

    def _begin(self, timesteps: Array, sigmas: Array, device: Any = None) -> None:
        super()._begin(timesteps, sigmas, device)
        self._following = dict(pairwise([*timesteps.tolist(), -1]))
        self._stride = len(self) // (self.num_inference_steps or 1)  # training timesteps a step

    def previous_timestep(self, timestep: Timestep) -> int:
        """The timestep that a step from this one goes to; -1 is the clean image."""
        return int(self._following[int(timestep)])

    def _next(self, timestep: Timestep) -> int:
        return int(timestep)

    def _alpha_bar(self, timestep: int) -> np.float32:
        """ᾱ of a training timestep; before the first one, that of the clean image."""
        return np.float32(
            self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod
        )

    def _parts(self, timestep: int) -> tuple[float, float]:
        """α and σ there."""
        return parts(float(self._alpha_bar(timestep)))

    def _image(self, x: Tensor, output: Tensor, timestep: int) -> Tensor:
        return self._limit(to_image(self.config.prediction_type, x, output, *self._parts(timestep)))

    def _noise(self, x: Tensor, output: Tensor, timestep: int) -> Tensor:
        return to_noise(self.config.prediction_type, x, output, *self._parts(timestep))


@lru_cache(4096)
def parts(alpha_bar: float) -> tuple[float, float]:
    """α and σ that belong to ᾱ, float32 as torch rounds them."""
    share = torch.tensor(alpha_bar)
    return share.sqrt().item(), (1 - share).sqrt().item()


class DDIMScheduler(DiscreteSolver):
    """DDIM (Song et al., Denoising Diffusion Implicit Models, eq. 12): deterministic at η = 0,
    DDPM-like at η = 1."""

    defaults = options(TRAINING, LEADING, CLIPPING, THRESHOLDING, ENDS)

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
    ) -> Any:
        """Go to the next timestep, with η = `eta`, and where asked in the direction away from the
        clipped image."""
        self._eta, self._from_clipped = eta, use_clipped_model_output
        return super().step(model_output, timestep, sample, generator, variance_noise)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to = i - self._stride
        (alpha, sigma), x0 = self._parts(to), self._image(x, output, i)
        eps = (
            to_noise("sample", x, x0, *self._parts(i))
            if self._from_clipped
            else self._noise(x, output, i)
        )
        if self._eta <= 0:
            return combine(alpha, x0, (sigma, eps)), x0
        now, end = self._alpha_bar(i), self._alpha_bar(to)
        variance = float(self._eta**2 * ((1 - end) / (1 - now) * (1 - now / end)))
        direction = max(float(1 - end) - variance, 0.0) ** 0.5
        return combine(alpha, x0, (direction, eps), (variance**0.5, draw())), x0


class DDIMInverseScheduler(DiscreteSolver):
    """DDIM backwards, from an image to the noise that it is made of (Song et al., section 4.3)."""

    has_compatibles = False
    defaults = options(TRAINING, LEADING, CLIPPING, ENDS)

    def _training_run(self) -> Plan:
        return np.arange(len(self)), np.empty(0)

    def _spaced(self, steps: int) -> Array:
        return super()._spaced(steps)[::-1]

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        now, (alpha, sigma) = min(i - self._stride, len(self) - 1), self._parts(i)
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
    defaults = options(STABLE_DIFFUSION, beta_schedule="scaled_linear", generation="0.7")
    choices = options(generation=("0.7", "0.8"))

    def _spaced(self, steps: int) -> Array:
        if self.config.generation == "0.7":
            return np.arange(1, len(self), len(self) // steps)[::-1]
        return (
            (np.arange(steps) * ((len(self) - 1) / max(steps - 1, 1)))
            .round()
            .astype(np.int64)[::-1]
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Any]:
        (alpha, sigma), x0 = self._parts(self.previous_timestep(i)), self._image(x, output, i)
        return combine(sigma, self._noise(x, output, i), (alpha, x0)), x0


class DDPMScheduler(DiscreteSolver):
    """The reverse process of training (Ho et al., Denoising Diffusion Probabilistic Models, eq. 7
    and algorithm 2)."""

    takes = ("timesteps",)
    defaults = options(
        TRAINING,
        LEADING,
        CLIPPING,
        THRESHOLDING,
        variance_type="fixed_small",
        rescale_betas_zero_snr=False,
    )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        now, to = self._alpha_bar(i), self._alpha_bar(self.previous_timestep(i))
        kind, learned = self.config.variance_type, None
        if kind in ("learned", "learned_range"):
            if output.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"variance_type = {kind!r} needs a model that predicts the variance too"
                )
            output, learned = output.chunk(2, dim=1)
        x0 = self._image(x, output, i)
        alpha = now / to
        beta = 1 - alpha
        mean = combine(
            float(to**0.5 * beta / (1 - now)), x0, (float(alpha**0.5 * (1 - to) / (1 - now)), x)
        )
        if i <= 0:
            return mean, x0
        small, large, noise = (
            max(float((1 - to) / (1 - now) * beta), 1e-20),
            float(beta),
            draw(output),
        )
        if learned is None:
            fixed = large if str(kind).startswith("fixed_large") else small
            return combine(1, mean, (fixed**0.5, noise)), x0
        if kind == "learned":
            deviation = learned.clamp(min=0).sqrt()
        else:  # between both in the log; Nichol and Dhariwal, Improved DDPM, eq. 15
            deviation = torch.exp(
                0.25 * ((learned + 1) * math.log(large) + (1 - learned) * math.log(small))
            )
        return mean + noise * deviation, x0


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def extrapolated(history: list[Tensor]) -> Tensor:
    """The mean of the noise over the next step, from up to four values, newest first."""
    first, *rest = zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True)
    return combine(*first, *rest)


class PNDMScheduler(DiscreteSolver):
    """Pseudo numerical methods (Liu et al., Pseudo Numerical Methods for Diffusion Models on
    Manifolds, algorithm 2).

    Four-step Adams-Bashforth on the noise. The first three steps are of a Runge-Kutta method, four
    calls each; or with `skip_prk_steps` of lower order, the first one repeated with the mean of
    both its ends.
    """

    predicts = VE
    defaults = options(TRAINING, LEADING, skip_prk_steps=False, set_alpha_to_one=False)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        grid, half = self._spaced(steps), len(self) // steps // 2
        self._sum: Tensor | None = None
        self._calls, self._warm_up = 0, list[int]()
        if self.config.skip_prk_steps:
            return np.concatenate([grid[:2], grid[1:2], grid[2:]]), np.empty(0)
        stages = [t for end in grid[:4].tolist() for t in (end + half, end)]
        self._warm_up = [t for stage in stages[1:] for t in (stage, stage)][1:-1]
        return np.concatenate([self._warm_up, grid[3:]]).astype(np.int64), np.empty(0)

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        start, end, call = i, i - self._stride, self._calls
        self._calls += 1
        if call < len(self._warm_up):
            stage = call % 4
            start, end = self._warm_up[call - stage], i - (0 if stage % 2 else self._stride // 2)
            self._sum = mean = combine(
                (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage], output, (1, self._sum if stage else None)
            )
            if stage == 0:
                self._history, self._start = [output, *self._history], x
            output = mean if stage == 3 else output
        elif call == 1 and not self._warm_up:
            start, end = i + self._stride, i
            output = combine(0.5, output, (0.5, self._history[0]))
        else:
            self._history, self._start = [output, *self._history[:3]], x
            output = extrapolated(self._history)
        return self._transfer(x if self._start is None else self._start, output, start, end), None

    def _transfer(self, x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        """Along the ODE with this output all the way (Liu et al., eq. 11)."""
        start = min(start, len(self) - 1)
        now, to = float(self._alpha_bar(start)), float(self._alpha_bar(end))
        slope = (to - now) / (now * (1 - to) ** 0.5 + (now * (1 - now) * to) ** 0.5)
        return combine((to / now) ** 0.5, x, (-slope, self._noise(x, output, start)))


class IPNDMScheduler(Scheduler):
    """PNDM's Adams-Bashforth steps in the angle of α and σ (Zhang and Chen, Fast Sampling with
    Exponential Integrator).

    Its model predicts v, and its `timesteps` are angles, from 1 for noise to 0.
    """

    has_compatibles = False
    defaults = options(num_train_timesteps=1000, trained_betas=None)

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        angles = torch.cat([torch.linspace(1, 0, steps + 1)[:-1], torch.zeros(1)])
        trained = self.config.trained_betas
        self.betas = (angles * math.pi / 2).sin() ** 2 if trained is None else torch.tensor(trained)
        self.alphas = (1 - self.betas**2) ** 0.5
        self._angles = list(zip(self.alphas.tolist(), self.betas.tolist(), strict=True))
        return (torch.atan2(self.betas, self.alphas) / math.pi * 2)[:-1].numpy(), self.betas.numpy()

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, None]:
        (alpha, sigma), (alpha_to, sigma_to) = self._angles[i : i + 2]
        self._history = [to_noise("v_prediction", x, output, alpha, sigma), *self._history[:3]]
        eps = extrapolated(self._history)
        x0 = combine(1, x, (-sigma, eps)) / max(alpha, 1e-8)
        return combine(alpha_to, x0, (sigma_to, eps)), None


LCMSchedulerOutput = namedtuple("LCMSchedulerOutput", ["prev_sample", "denoised"])
TCDSchedulerOutput = namedtuple("TCDSchedulerOutput", ["prev_sample", "pred_noised_sample"])


class DistilledSolver(DiscreteSolver):
    """For models distilled on few timesteps of a longer run, of `original_inference_steps`."""

    has_compatibles = False
    takes = ("timesteps",)
    defaults = options(
        options(
            STABLE_DIFFUSION, LEADING, CLIPPING, THRESHOLDING, ENDS, beta_schedule="scaled_linear"
        ),
        options(clip_sample=False, original_inference_steps=50, timestep_scaling=10.0),
    )

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Numbers | None = None,
        strength: float = 1.0,
    ) -> None:
        """Begin a run of so many distilled timesteps, or of these timesteps; `strength` leaves out
        noisy ones."""
        self._original, self._strength = original_inference_steps, strength
        super().set_timesteps(num_inference_steps, device, timesteps)

    def _distilled(self) -> Array:
        """The timesteps of the longer run, ascending."""
        steps = self._original or self.config.original_inference_steps
        return np.arange(1, int(steps * self._strength) + 1) * (len(self) // steps) - 1

    def _plan(self, steps: int, timesteps: Numbers | None, sigmas: Numbers | None) -> Plan:
        if timesteps is not None:
            return self._descending(timesteps)[
                steps - min(int(steps * self._strength), steps) :
            ], np.empty(0)
        all_of_them = self._distilled()[::-1]
        if steps > len(all_of_them):
            raise ValueError(
                f"{steps} steps: there are only {len(all_of_them)} distilled ones; raise strength"
            )
        return all_of_them[
            np.floor(np.linspace(0, len(all_of_them), steps, endpoint=False)).astype(int)
        ], np.empty(0)


class LCMScheduler(DistilledSolver):
    """Jump to the image, add noise, jump again (Luo et al., Latent Consistency Models, algorithm
    3)."""

    output = LCMSchedulerOutput

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to, scaled = self.previous_timestep(i), i * self.config.timestep_scaling
        skip, out = (
            0.25 / (scaled**2 + 0.25),
            scaled / (scaled**2 + 0.25) ** 0.5,
        )  # section 4.2, with σ_data = 0.5
        x0 = combine(out, self._image(x, output, i), (skip, x))
        if to < 0:
            return x0, x0
        alpha, sigma = self._parts(to)
        return combine(alpha, x0, (sigma, draw())), x0


class TCDScheduler(DistilledSolver):
    """Jump beyond the next timestep, and back to it with noise (Zheng et al., Trajectory
    Consistency, algorithm 4)."""

    output = TCDSchedulerOutput

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> Any:
        """Go to the next timestep; `eta` is the γ of the paper, from 0 without noise to 1 with
        most."""
        self._eta = eta
        return super().step(model_output, timestep, sample, generator)

    def _distilled(self) -> Array:
        return (
            np.arange(int(len(self) * self._strength)) if self._original else super()._distilled()
        )

    def _solve(self, i: int, x: Tensor, output: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        to = self.previous_timestep(i)
        beyond = int(np.float32(1 - self._eta) * np.float32(max(to, 0)))
        (alpha, sigma), x0 = (
            self._parts(beyond),
            to_image(self.config.prediction_type, x, output, *self._parts(i)),
        )
        x = combine(alpha, x0, (sigma, self._noise(x, output, i)))
        if self._eta <= 0 or to < 0:
            return x, x
        alpha, sigma = parts(float(self._alpha_bar(to) / self._alpha_bar(beyond)))
        return combine(alpha, x, (sigma, draw())), x
