"""Solvers that step between training timesteps, by their ᾱ: DDPM, DDIM, PNDM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import (
    CLIPPING,
    SPACING,
    THRESHOLDING,
    TRAINING,
    Generator,
    Scheduler,
    SchedulerOutput,
    Timestep,
    combine,
    draw_noise,
    to_image,
    to_noise,
    widened,
)
from .spacing import spaced

LEADING: dict[str, Any] = SPACING | {"timestep_spacing": "leading"}
PREDICTIONS: dict[str, tuple[Any, ...]] = {"prediction_type": ("epsilon", "sample", "v_prediction")}


class DiscreteScheduler(Scheduler):
    """A scheduler whose steps depend on the timestep alone, so that they may be taken in any order."""

    choices = PREDICTIONS

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        one = self._own("set_alpha_to_one") in (None, True)
        self.final_alpha_cumprod = torch.tensor(1.0) if one else self.alphas_cumprod[0]
        self.timesteps = torch.arange(self.config.num_train_timesteps).flip(0)

    def _spaced(self, steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Timesteps as the config wants them, descending.

        Raises:
            ValueError: more steps than training had.
        """
        total = self.config.num_train_timesteps
        if steps > total:
            raise ValueError(f"{steps} steps: there are only {total} timesteps")
        return spaced(self.config.timestep_spacing, steps, total, self.config.steps_offset).round().astype(np.int64)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a run of so many steps."""
        self.timesteps = torch.from_numpy(self._spaced(num_inference_steps)).to(device)
        self.num_inference_steps = num_inference_steps
        self._restart()

    @property
    def _stride(self) -> int:
        """Training timesteps a step."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step")
        return int(self.config.num_train_timesteps) // self.num_inference_steps

    def _alpha_bar(self, timestep: int) -> np.float32:
        """ᾱ of a training timestep; before the first one, that of the clean image."""
        return np.float32(self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod)

    def _image(self, x: Tensor, output: Tensor, alpha_bar: float) -> Tensor:
        return self._limit(to_image(self.config.prediction_type, x, output, alpha_bar**0.5, (1 - alpha_bar) ** 0.5))

    def _noise(self, x: Tensor, output: Tensor, alpha_bar: float) -> Tensor:
        return to_noise(self.config.prediction_type, x, output, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)


class DDIMScheduler(DiscreteScheduler):
    """DDIM (Song et al., Denoising Diffusion Implicit Models, eq. 12): deterministic at η = 0, DDPM-like at η = 1."""

    defaults = (
        TRAINING | LEADING | CLIPPING | THRESHOLDING | {"set_alpha_to_one": True, "rescale_betas_zero_snr": False}
    )

    def step(
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
        """Go to the next timestep.

        Args:
            model_output: what the model predicts, as `prediction_type` says.
            timestep: the one that the model was called with.
            sample: what it was called for, before `scale_model_input`.
            eta: share of DDPM's noise.
            use_clipped_model_output: go in the direction away from the clipped image.
            generator: draws the noise.
            variance_noise: the noise, instead of drawing it.
            return_dict: of no effect, the result is a tuple with names.
        """
        t, x = int(timestep), widened(sample)
        now, to = self._alpha_bar(t), self._alpha_bar(t - self._stride)
        x0 = self._image(x, model_output, float(now))
        if use_clipped_model_output:
            sigma = float(1 - now) ** 0.5
            eps = combine(1 / sigma, x, (-(float(now) ** 0.5) / sigma, x0))
        else:
            eps = self._noise(x, model_output, float(now))
        variance = float(eta**2 * ((1 - to) / (1 - now) * (1 - now / to))) if eta else 0.0
        direction = max(float(1 - to) - variance, 0.0) ** 0.5
        noise = None
        if eta > 0:
            noise = draw_noise(model_output, generator) if variance_noise is None else variance_noise
        x = combine(float(to) ** 0.5, x0, (direction, eps), (variance**0.5, noise))
        return SchedulerOutput(x.to(sample.dtype), x0.to(sample.dtype))


class DDIMInverseScheduler(DiscreteScheduler):
    """DDIM backwards, from an image to the noise that it is made of (Song et al., section 4.3)."""

    has_compatibles = False
    defaults = TRAINING | LEADING | CLIPPING | {"set_alpha_to_one": True, "rescale_betas_zero_snr": False}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.timesteps = self.timesteps.flip(0)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a run of so many steps."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps.flip(0)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """Go from the timestep before to this one; see `DDIMScheduler.step`."""
        t, x = int(timestep), widened(sample)
        now = float(self._alpha_bar(min(t - self._stride, len(self) - 1)))
        to = float(self._alpha_bar(t))
        x0, eps = self._image(x, model_output, now), self._noise(x, model_output, now)
        x = combine(to**0.5, x0, ((1 - to) ** 0.5, eps))
        return SchedulerOutput(x.to(sample.dtype), x0.to(sample.dtype))


class DDPMScheduler(DiscreteScheduler):
    """The reverse process of training (Ho et al., Denoising Diffusion Probabilistic Models, eq. 7 and algorithm 2)."""

    defaults = (
        TRAINING
        | LEADING
        | CLIPPING
        | THRESHOLDING
        | {
            "variance_type": "fixed_small",
            "rescale_betas_zero_snr": False,
        }
    )
    choices = PREDICTIONS | {
        "variance_type": (
            *("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
            None,
        )
    }

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Begin a run of so many steps, or of these timesteps.

        Raises:
            ValueError: not exactly one of both is given, or `timesteps` do not descend within the range of training.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if timesteps is None:
            super().set_timesteps(int(num_inference_steps or 0), device)
        else:
            if any(a <= b for a, b in pairwise(timesteps)) or timesteps[0] >= len(self):
                raise ValueError(f"timesteps must descend, from less than {len(self)}")
            self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
            self.num_inference_steps = len(timesteps)
            self._restart()
        points = [*self.timesteps.tolist(), -1]
        self._following = dict(pairwise(points))

    def previous_timestep(self, timestep: Timestep) -> int:
        """The timestep that a step from this one goes to; -1 is the clean image."""
        t = int(timestep)
        return t - 1 if self.num_inference_steps is None else self._following[t]

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """Go to the next timestep; see `DDIMScheduler.step`."""
        t, x = int(timestep), widened(sample)
        now, to = self._alpha_bar(t), self._alpha_bar(self.previous_timestep(t))
        kind, learned = self.config.variance_type, None
        if kind in ("learned", "learned_range"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(f"variance_type = {kind!r} needs a model that predicts the variance too")
            model_output, learned = model_output.chunk(2, dim=1)
        x0 = self._image(x, model_output, float(now))
        alpha = now / to
        beta = 1 - alpha
        mean = combine(float(to**0.5 * beta / (1 - now)), x0, (float(alpha**0.5 * (1 - to) / (1 - now)), x))
        if t > 0:
            small, large = max(float((1 - to) / (1 - now) * beta), 1e-20), float(beta)
            noise = draw_noise(model_output, generator)
            if kind == "learned_range" and learned is not None:  # between both in the log; Nichol and Dhariwal, eq. 15
                share = (widened(learned) + 1) / 2
                noise = noise * torch.exp(0.5 * (share * np.log(large) + (1 - share) * np.log(small)))
            elif learned is not None:
                noise = noise * widened(learned).clamp(min=0).sqrt()
            else:
                noise = noise * (large if kind in ("fixed_large", "fixed_large_log") else small) ** 0.5
            mean = mean + noise
        return SchedulerOutput(mean.to(sample.dtype), x0.to(sample.dtype))


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PNDMScheduler(DiscreteScheduler):
    """Pseudo numerical methods (Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds, algorithm 2).

    Four-step Adams-Bashforth on the noise. The first three steps are of a Runge-Kutta method, four calls each; or with
    `skip_prk_steps` of lower order, the first one repeated with the mean of both its ends.
    """

    defaults = TRAINING | LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"prediction_type": ("epsilon", "v_prediction")}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a run of so many steps."""
        grid, half = self._spaced(num_inference_steps), len(self) // num_inference_steps // 2
        if self.config.skip_prk_steps:
            calls, self._warm_up = np.concatenate([grid[:2], grid[1:2], grid[2:]]), []
        else:
            stages = [t for end in grid[:4] for t in (int(end) + half, int(end))]
            self._warm_up = [t for stage in stages[1:] for t in (stage, stage)][1:-1]
            calls = np.concatenate([self._warm_up, grid[3:]])
        self.timesteps = torch.from_numpy(calls.astype(np.int64)).to(device)
        self.num_inference_steps = num_inference_steps
        self._history: list[Tensor] = []
        self._sum: Tensor | None = None
        self._calls = 0
        self._restart()

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """Go to the next timestep, or a stage of it; see `DDIMScheduler.step`."""
        t, x, out, stride = int(timestep), widened(sample), widened(model_output), self._stride
        call, self._calls = self._calls, self._calls + 1
        start, end = t, t - stride
        if call < len(self._warm_up):
            stage = call % 4
            start, end = self._warm_up[call - stage], t - (0 if stage % 2 else stride // 2)
            mean = combine((1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage], out, (1.0, self._sum if stage else None))
            if stage == 0:
                self._history.append(out)
                self._base = x
            self._sum, x = mean, self._base
            out = mean if stage == 3 else out
        elif call == 1 and not self._warm_up:
            start, end = t + stride, t
            x, out = self._base, combine(0.5, out, (0.5, self._history[-1]))
        else:
            self._history = [*self._history[-3:], out]
            self._base = x
            first, *rest = zip(ADAMS_BASHFORTH[len(self._history) - 1], reversed(self._history), strict=True)
            out = combine(*first, *rest)
        return SchedulerOutput(self._transfer(x, out, start, end).to(sample.dtype))

    def _transfer(self, x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
        """Along the ODE with this output all the way (Liu et al., eq. 11)."""
        now, to = float(self._alpha_bar(min(start, len(self) - 1))), float(self._alpha_bar(end))
        eps = self._noise(x, output, now)
        slope = (to - now) / (now * (1 - to) ** 0.5 + (now * (1 - now) * to) ** 0.5)
        return combine((to / now) ** 0.5, x, (-slope, eps))
